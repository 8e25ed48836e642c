"""The end of a worker whose requests take too long, or too much of its machine's memory: nothing else stops a call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from pia_batch.pipeline.attempts import ExitCause

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""Seconds between two looks at the memory: a limit may be passed by what is allocated in that time."""


def own_bytes() -> int:
    """Memory that this process alone has, without what it shares with others, such as Ray's object store."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


@dataclass(frozen=True)
class Watchdog:
    """Ends this process when what it works on is past its deadline, or has made it too large.

    Attributes:
        tell: is told which keys were worked on, and the cause, before the end; it may fail.
        die: ends this process.
        max_bytes: of `own_bytes`; None: no limit.
    """

    tell: Callable[[list[str], ExitCause], None]
    die: Callable[[], None]
    max_bytes: int | None = None

    @contextmanager
    def over(self, keys: list[str], deadline_s: float) -> Iterator[None]:
        """Watch over the work on `keys` that is done inside."""
        done = threading.Event()
        threading.Thread(target=self._look, args=(keys, deadline_s, done), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def give_up(self, keys: list[str], cause: ExitCause) -> None:
        """End this process now."""
        log.error("giving_up cause=%s own_bytes=%d keys=%s", cause, own_bytes(), ",".join(keys))
        try:
            self.tell(keys, cause)
        finally:
            self.die()

    def _look(self, keys: list[str], deadline_s: float, done: threading.Event) -> None:
        deadline = time.monotonic() + deadline_s
        while (left := deadline - time.monotonic()) > 0:
            if done.wait(left if self.max_bytes is None else min(left, LOOK_S)):
                return
            if self.max_bytes is not None and own_bytes() > self.max_bytes:
                self.give_up(keys, "out_of_memory")
                return
        if not done.is_set():
            self.give_up(keys, "timeout")
