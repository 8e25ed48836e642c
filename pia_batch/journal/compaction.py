"""Keeps the journal's index near the journal's end while a run goes on, so that a killed run leaves little to read."""

from __future__ import annotations

import logging
import threading

from pia_batch.errors import PiaBatchError
from pia_batch.journal.log import Journal

log = logging.getLogger(__name__)

FRAGMENTS = 2000
"""Fragments that a killed run may leave outside the index, about: 6 s of reading at 16 requests of 50 ms at a time."""

WORTH_FRAGMENTS = 64
"""Fewer fragments are left as they are at the end of a run: to read them takes less than the index saves."""


class Compactor:
    """Compacts a journal in a thread of its own, one compaction at a time. The run goes on whatever becomes of it.

    Args:
        journal: of the output, not used by others at the same time.
        batch_size: rows of one fragment, about.
        fragments: after how many of them it compacts.
    """

    def __init__(self, journal: Journal, batch_size: int, fragments: int = FRAGMENTS) -> None:
        self._journal, self._rows = journal, batch_size * fragments
        self._seen = 0
        self._thread: threading.Thread | None = None

    def see(self, num_rows: int) -> None:
        """Be told how many rows the run has committed so far; begins a compaction where there is enough for one."""
        if num_rows - self._seen < self._rows or (self._thread is not None and self._thread.is_alive()):
            return
        self._seen = num_rows
        self._thread = threading.Thread(target=self._compact, name="compaction", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the compaction that goes on, then index the rest if that is worth it."""
        if self._thread is not None:
            self._thread.join()
        self._compact()

    def _compact(self) -> None:
        try:
            self._journal.compact(WORTH_FRAGMENTS)
        except PiaBatchError as err:
            log.warning("not_compacted output=%s: %s", self._journal.store.uri, err)
