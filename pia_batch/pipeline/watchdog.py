"""Watchdog of a worker: ends its process when requests take too long or too much memory. Nothing else stops a call."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from pia_batch.config.contexts import computed_frames
from pia_batch.errors import ConfigError
from pia_batch.pipeline.attempts import ExitCause
from pia_batch.schema.columns import Row

log = logging.getLogger(__name__)

MEMORY_CHECK_S = 0.25
"""Seconds between two checks of the memory. A limit may be exceeded by what is allocated in that time."""

REFERENCE_WORK = 25 * 16 * 512 * 512
"""Steps x frames x pixels of the request that `limits.timeout_s` is meant for."""


def own_bytes() -> int:
    """Return the memory of this process alone, without memory it shares with others, such as Ray's object store."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def memory_limit_bytes(memory_mb: int | None) -> int | None:
    """Return `placement.memory_mb` in bytes, or None for no limit. The first engine has to be loaded already.

    Raises:
        ConfigError: The process with its engine takes that much memory already.
    """
    if memory_mb is None:
        return None
    taken = own_bytes()
    if taken >= memory_mb * 2**20:
        msg = (
            f"placement.memory_mb: too small for an engine (got {memory_mb}; an engine on {socket.gethostname()} takes "
            f"{taken // 2**20} MiB before its first request); set it several GiB higher, or null for no limit"
        )
        raise ConfigError(msg)
    return memory_mb * 2**20


def deadline_s(rows: Iterable[Row], timeout_s: float) -> float:
    """Return the seconds that these requests may take together.

    Args:
        rows: Requests; those without a size have no image and take no time.
        timeout_s: Seconds for one request of REFERENCE_WORK, and at least for all of them (`limits.timeout_s`).
    """
    shares = (_work(row) / REFERENCE_WORK for row in rows if row["width"] is not None)
    return timeout_s * max(1.0, sum(shares))


def _work(row: Row) -> float:
    """Return the cost of a request, in the unit of REFERENCE_WORK."""
    passes = max(1, row["free_init_iters"])
    work: float = row["num_inference_steps"] * passes * computed_frames(row) * row["width"] * row["height"]
    return work


@dataclass(frozen=True)
class Watchdog:
    """Ends this process when its current work exceeds its deadline or the memory limit.

    Attributes:
        report: Function that receives the keys that were worked on, and the cause, before the end; it may fail.
        exit_process: Function that ends this process.
        max_bytes: Maximum of `own_bytes`, or None for no limit.
    """

    report: Callable[[list[str], ExitCause], None]
    exit_process: Callable[[], None]
    max_bytes: int | None = None

    @contextmanager
    def watch(self, keys: list[str], deadline_s: float) -> Iterator[None]:
        """Watch the enclosed work on `keys`, which may take `deadline_s` seconds."""
        done = threading.Event()
        threading.Thread(target=self._watch, args=(keys, deadline_s, done), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def give_up(self, keys: list[str], cause: ExitCause) -> None:
        """End this process now."""
        log.error("worker_given_up cause=%s own_bytes=%d keys=%s", cause, own_bytes(), ",".join(keys))
        try:
            self.report(keys, cause)
        finally:
            self.exit_process()

    def _watch(self, keys: list[str], deadline_s: float, done: threading.Event) -> None:
        deadline = time.monotonic() + deadline_s
        while (left := deadline - time.monotonic()) > 0:
            if done.wait(left if self.max_bytes is None else min(left, MEMORY_CHECK_S)):
                return
            if self.max_bytes is not None and own_bytes() > self.max_bytes:
                self.give_up(keys, "out_of_memory")
                return
        if not done.is_set():
            self.give_up(keys, "timeout")
