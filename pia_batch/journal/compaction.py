"""Compaction during a run: keeps the journal's index close to its end, so that a killed run leaves little to read."""

from __future__ import annotations

import logging
import threading

from pia_batch.errors import PiaBatchError
from pia_batch.journal.log import Journal

log = logging.getLogger(__name__)

MAX_UNINDEXED_FRAGMENTS = 2000
"""Fragments that a killed run may leave outside the index, approximately. Reading them takes 6 s, with 16 concurrent
requests of 50 ms each."""

MIN_UNINDEXED_FRAGMENTS = 64
"""Fragments below which compaction is not worthwhile: reading them takes less time than the index saves."""


MIN_SHARE = 64
"""A compaction waits for at least one part in so many of the rows committed so far, because each one lists the whole
journal: otherwise the driver's time for the listings grows with the square of the rows."""


class Compactor:
    """Compacts a journal in a thread of its own, one compaction at a time. A failed compaction does not stop the run.

    Args:
        journal: Journal of the output. No other thread may use this object.
        batch_size: Approximate number of rows per fragment.
        fragments: Number of new fragments after which it compacts.
    """

    def __init__(self, journal: Journal, batch_size: int, fragments: int = MAX_UNINDEXED_FRAGMENTS) -> None:
        self._journal, self._rows = journal, batch_size * fragments
        self._compacted_rows = 0
        self._thread: threading.Thread | None = None

    def record_committed(self, num_rows: int) -> None:
        """Record the total number of rows that the run has committed; start a compaction if there are enough."""
        wanted = max(self._rows, num_rows // MIN_SHARE)
        if num_rows - self._compacted_rows < wanted or (self._thread is not None and self._thread.is_alive()):
            return
        self._compacted_rows = num_rows
        self._thread = threading.Thread(target=self._compact, name="compaction", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for a running compaction, then index the remaining fragments if that is worthwhile."""
        if self._thread is not None:
            self._thread.join()
        self._compact()

    def _compact(self) -> None:
        try:
            self._journal.compact(MIN_UNINDEXED_FRAGMENTS)
        except PiaBatchError as err:
            log.warning("compaction_failed output=%s error=%s", self._journal.store.uri, err)
