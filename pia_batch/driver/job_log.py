"""A job's log, followed over connections that may break."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from pia_batch.errors import message_of

log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""Seconds after which a connection that broke is made again."""

LAST_LINES_S = 5.0
"""Seconds that the log of a job that has ended gets to end too."""


class Client(Protocol):
    """What is needed of `ray.job_submission.JobSubmissionClient`."""

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """The log in pieces, from its beginning to the job's end."""

    def get_job_logs(self, job_id: str) -> str:
        """The log so far."""


class FollowedLog:
    """Shows a job's log as it grows, from a thread of its own, each piece once.

    Args:
        client: of the cluster.
        job_id: whose log.
        show: gets the pieces, in order.
    """

    def __init__(self, client: Client, job_id: str, show: Callable[[str], None]) -> None:
        self._client, self._job_id, self._show = client, job_id, show
        self._shown = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="log", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Show what is left of the log of a job that is over."""
        self._over.set()
        self._thread.join(LAST_LINES_S)
        try:
            whole = self._client.get_job_logs(self._job_id)
        except (RuntimeError, OSError) as err:
            log.warning("log_incomplete job=%s: %s", self._job_id, message_of(err))
        else:
            self._tell(whole, 0)

    def _follow(self) -> None:
        while not self._over.is_set():
            try:
                asyncio.run(self._tail())
            except Exception as err:  # noqa: BLE001 - whatever broke the connection: the waiting thread knows the job
                log.debug("log_again job=%s: %s", self._job_id, message_of(err))
                self._over.wait(AGAIN_S)
            else:
                return

    async def _tail(self) -> None:
        start = 0
        async for text in self._client.tail_job_logs(self._job_id):
            self._tell(text, start)
            start += len(text)

    def _tell(self, text: str, start: int) -> None:
        """Show what is new of the characters from `start` on."""
        with self._lock:
            new = text[max(0, self._shown - start) :]
            self._shown = max(self._shown, start + len(text))
            if new:
                self._show(new)
