"""One run at a time: a lease on an output, so that two schedulers do not pay for the same GPUs.

Whoever creates `_lease/<generation>.json` holds the lease; creating needs nothing but a conditional PUT. The holder
renews by creating the next generation, and another run takes over by doing the same once the newest generation has not
changed for as long as the lease lasts. Clocks of two machines are never compared: each waits by its own. Correctness
does not depend on any of this; the journal is exact with any number of runs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Self

import psutil

from pia_batch.errors import InterruptedRunError, LeaseHeldError, ObjectExistsError, StorageError
from pia_batch.journal import layout
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

_POLL_S = 2.0
"""Seconds between two looks of a run that waits for another one's end."""

_TELL_S = 60.0
"""Seconds between two lines of the log about it."""


class Lease:
    """A context manager that holds the lease of an output and renews it from a thread.

    Entering raises LeaseHeldError if another run is alive, unless it is given time to wait for that one's end; and
    InterruptedRunError if it is stopped meanwhile. A run that died is waited for at most `ttl_s` seconds, and not at
    all if it died on this machine. Those that wait have no order: whoever asks first after the release is next.

    Args:
        store: the output.
        run_id: who asks.
        ttl_s: seconds without a renewal after which the lease is free.
        clock: seconds that only ever grow, by which another run's silence is measured.
        sleep: waits so many of those seconds; None: until `stop` is set, at most.
        wait_s: seconds to wait for another run's end; it may be infinite.
        stop: set it to wait no longer.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        wait_s: float = 0.0,
        stop: threading.Event | None = None,
    ) -> None:
        self._store, self._run_id, self._ttl_s, self._wait_s, self._clock = store, run_id, ttl_s, wait_s, clock
        self._asked_to_stop = stop or threading.Event()
        self._sleep = sleep or self._asked_to_stop.wait
        self._generation = 0
        self._since = ""
        self._next_word = -math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self.lost = threading.Event()
        """Set when another run has taken over."""
        self.has_waited = False
        """Whether another run held it at first: what was known of the output before is old."""

    def __enter__(self) -> Self:
        patience = self._clock() + self._wait_s
        while True:
            try:
                self._take()
            except LeaseHeldError as held:
                self.has_waited = True
                self._queue(held, patience)
            else:
                self._thread.start()
                return self

    def _take(self) -> None:
        generation, holder = newest(self._store)
        if holder is not None and not holder["released"]:
            self.has_waited = True
            generation = self._wait_for_silence(generation, holder)
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._write(generation + 1, released=False)
        except ObjectExistsError:
            msg = f"another run took the lease of {self._store.uri} at this moment; start again later"
            raise LeaseHeldError(msg) from None

    def _queue(self, held: LeaseHeldError, patience: float) -> None:
        """Wait a little for the run that holds it."""
        left = patience - self._clock()
        if left <= 0:
            raise held
        self._tell("lease_queued seconds_left=%.0f: %s", left, held)
        self._sleep(min(left, _POLL_S))
        self._check_stop()

    def _tell(self, line: str, *values: object) -> None:
        if self._clock() >= self._next_word:
            self._next_word = self._clock() + _TELL_S
            log.info(line, *values)

    def _check_stop(self) -> None:
        if self._asked_to_stop.is_set():
            msg = f"stopped while it waited for {self._store.uri}; nothing was begun. Start again to wait again"
            raise InterruptedRunError(msg)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.lost.is_set():
            try:
                self._write(self._generation + 1, released=True)
            except StorageError as err:
                log.warning("lease_not_released error=%s", err)

    def check(self) -> None:
        """Make sure that it is still held, as far as this process knows.

        Raises:
            LeaseHeldError: another run has taken over.
        """
        if self.lost.is_set():
            msg = f"another run has taken over {self._store.uri}; start again later"
            raise LeaseHeldError(msg)

    def _wait_for_silence(self, generation: int, holder: dict[str, Any]) -> int:
        deadline = self._clock() + float(holder["ttl_s"])
        while self._clock() < deadline and not _died_here(holder):
            self._tell("lease_waiting holder=%s seconds=%.0f", holder["run_id"], deadline - self._clock())
            self._sleep(min(2.0, self._ttl_s / 6))
            self._check_stop()
            now, holder_now = newest(self._store)
            if holder_now is not None and now != generation:
                if holder_now["released"]:
                    return now
                msg = f"run {holder_now['run_id']} on {holder_now['host']} works on {self._store.uri}"
                raise LeaseHeldError(msg)
        log.warning("lease_taken_over from=%s generation=%d", holder["run_id"], generation)
        return generation

    def renew(self) -> None:
        """Tell the others that this run is alive, or find out that one of them has taken over. Its thread does this."""
        try:
            self._write(self._generation + 1, released=False)
        except ObjectExistsError:
            self.lost.set()
            log.error("lease_lost run_id=%s: another run has taken over", self._run_id)  # noqa: TRY400
        except StorageError as err:
            log.warning("lease_not_renewed error=%s", err)

    def _keep(self) -> None:
        while not self.lost.is_set() and not self._stop.wait(self._ttl_s / 3):
            self.renew()

    def _write(self, generation: int, *, released: bool) -> None:
        state = {
            "run_id": self._run_id,
            "released": released,
            "ttl_s": self._ttl_s,
            "since": self._since,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "boot": psutil.boot_time(),
        }
        name, data = layout.lease_name(generation), json.dumps(state).encode()
        try:
            self._store.create(name, data)
        except ObjectExistsError:
            if self._store.read(name) != data:  # else it is our own attempt, whose reply was lost
                raise
        self._generation = generation


def newest(store: Store) -> tuple[int, dict[str, Any] | None]:
    """The highest generation and who wrote it; (0, None) before the first."""
    listed = (layout.lease_generation(item.name) for item in store.list(layout.LEASES))
    generation = max((number for number in listed if number is not None), default=0)
    if not generation:
        return 0, None
    return generation, dict(json.loads(store.read(layout.lease_name(generation))))


def _died_here(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine and is no more; on another machine nobody can tell."""
    if holder["host"] != socket.gethostname() or abs(holder["boot"] - psutil.boot_time()) > 1:
        return False
    try:
        process = psutil.Process(holder["pid"])
        another = abs(process.create_time() - holder["process_started"]) > 1
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
