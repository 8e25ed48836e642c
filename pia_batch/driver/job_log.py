"""Job log: follows the log of a Ray job over connections that may break."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from pia_batch.errors import message_of

log = logging.getLogger(__name__)

RECONNECT_S = 1.0
"""Seconds before a broken connection is opened again."""

LAST_LINES_S = 5.0
"""Seconds that the log of a job that has ended gets to end too."""


class Client(Protocol):
    """Methods of `ray.job_submission.JobSubmissionClient` that this module calls."""

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Yield the log in pieces, from its beginning to the job's end."""

    def get_job_logs(self, job_id: str) -> str:
        """Return the log so far."""


class FollowedLog:
    """Thread that shows a job's log as it grows, each piece once.

    Args:
        client: Client of the cluster.
        job_id: Id of the job.
        show: Function that gets the pieces, in order.
    """

    def __init__(self, client: Client, job_id: str, show: Callable[[str], None]) -> None:
        self._client, self._job_id, self._show = client, job_id, show
        self._num_shown = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="log", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Show the rest of the log of a job that is over."""
        self._over.set()
        self._thread.join(LAST_LINES_S)
        try:
            whole = self._client.get_job_logs(self._job_id)
        except (RuntimeError, OSError) as err:
            log.warning("job_log_incomplete job=%s: %s", self._job_id, message_of(err))
        else:
            self._show_new(whole, 0)

    def _follow(self) -> None:
        while not self._over.is_set():
            try:
                asyncio.run(self._tail())
            except Exception as err:  # noqa: BLE001 - any broken connection; the waiting thread reports the job itself
                log.debug("job_log_disconnected job=%s: %s", self._job_id, message_of(err))
                self._over.wait(RECONNECT_S)
            else:
                return

    async def _tail(self) -> None:
        start = 0
        async for text in self._client.tail_job_logs(self._job_id):
            self._show_new(text, start)
            start += len(text)

    def _show_new(self, text: str, start: int) -> None:
        """Show the new part of `text`, whose first character is number `start` of the log."""
        with self._lock:
            new = text[max(0, self._num_shown - start) :]
            self._num_shown = max(self._num_shown, start + len(text))
            if new:
                self._show(new)
