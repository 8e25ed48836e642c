"""Lease on an output: one run at a time, so that two schedulers do not pay for the same GPUs.

The run that creates `_lease/<generation>.json` holds the lease; creating it needs only a conditional PUT. The holder
renews by creating the next generation. Another run takes over in the same way, once the newest generation has not
changed for as long as the lease lasts. Clocks of two machines are never compared: each run waits by its own clock.
Correctness does not depend on the lease; the journal is exact with any number of runs.
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

from pia_batch.errors import InterruptedRunError, LeaseHeldError, ObjectExistsError, StorageError, UnwritableStoreError
from pia_batch.journal import layout
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

_POLL_S = 2.0
"""Seconds between two reads of the lease by a run that waits for the end of another run."""

_LOG_EVERY_S = 60.0
"""Minimum seconds between two log lines about waiting."""


class Lease:
    """Context manager that holds the lease of an output and renews it in a thread.

    Entering raises LeaseHeldError if another run is alive, unless it may wait for the end of that run. It raises
    InterruptedRunError if it is stopped while it waits. A run that died is waited for at most `ttl_s` seconds, and not
    at all if it died on this machine. Waiting runs have no order: the first to ask after the release is next.

    Args:
        store: Output.
        run_id: Id of the run that asks for the lease.
        ttl_s: Seconds without a renewal after which the lease is free.
        clock: Monotonic clock in seconds, by which the silence of another run is measured.
        sleep: Function that waits the given number of seconds; None: waits until `stop` is set, at most that long.
        wait_s: Seconds to wait for the end of another run; may be infinite.
        stop: Event that ends the wait.
        make_room: Function that frees space where a local disk is too full for a lease, called while no run is alive.
            With it, a store that takes no writes, such as for its quota, is used without a lease, as no run can begin:
            `check` then looks for other runs.
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
        make_room: Callable[[], None] | None = None,
    ) -> None:
        self._store, self._run_id, self._ttl_s, self._wait_s, self._clock = store, run_id, ttl_s, wait_s, clock
        self._stop_waiting = stop or threading.Event()
        self._sleep = sleep or self._stop_waiting.wait
        self._make_room = make_room
        self._generation = 0
        self._unwritten_after: int | None = None  # newest generation of a store that takes no other
        self._since = ""
        self._next_log_s = -math.inf
        self._stop_renewing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self.lost = threading.Event()
        """Event that is set when another run has taken over."""
        self.has_waited = False
        """True if another run held the lease at first: what was read of the output before may be outdated."""

    def __enter__(self) -> Self:
        give_up_s = self._clock() + self._wait_s
        while True:
            try:
                self._acquire()
            except LeaseHeldError as held:
                self.has_waited = True
                self._wait_for_release(held, give_up_s)
            else:
                if self._unwritten_after is None:
                    self._thread.start()
                return self

    def _acquire(self) -> None:
        generation, holder = read_newest_lease(self._store)
        if holder is not None and not holder["released"]:
            self.has_waited = True
            generation = self._wait_for_silence(generation, holder)
        if self._make_room is not None and self._store.is_full(layout.CREATE_ONLY_PROBE):
            self._make_room()
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._write(generation + 1, released=False)
        except ObjectExistsError:
            msg = f"another run has just taken the lease of {self._store.uri}; start again later"
            raise LeaseHeldError(msg) from None
        except UnwritableStoreError as err:
            if self._make_room is None:
                raise
            log.warning("lease_skipped run_id=%s: the store takes no writes: %s", self._run_id, err)
            self._unwritten_after = generation

    def _wait_for_release(self, held: LeaseHeldError, give_up_s: float) -> None:
        """Sleep for a moment; raise `held` if the time to wait is over."""
        left_s = give_up_s - self._clock()
        if left_s <= 0:
            if not self._wait_s:
                raise held
            msg = f"{held}; it did not end within {self._wait_s:g} s (limits.lease_wait_s, or up to budget.deadline)"
            raise LeaseHeldError(msg) from None
        self._log_waiting("lease_queued seconds_left=%.0f: %s", left_s, held)
        self._sleep(min(left_s, _POLL_S))
        self._check_stop()

    def _log_waiting(self, line: str, *values: object) -> None:
        if self._clock() >= self._next_log_s:
            self._next_log_s = self._clock() + _LOG_EVERY_S
            log.info(line, *values)

    def _check_stop(self) -> None:
        if self._stop_waiting.is_set():
            msg = f"stopped while waiting for {self._store.uri}; the run had not begun. Start it again to wait again"
            raise InterruptedRunError(msg)

    def __exit__(self, *_: object) -> None:
        if self._unwritten_after is not None:
            return
        self._stop_renewing.set()
        self._thread.join()
        if not self.lost.is_set():
            try:
                self._write(self._generation + 1, released=True)
            except StorageError as err:
                log.warning("lease_release_failed error=%s", err)

    def check(self) -> None:
        """Make sure that the lease is still held, as far as this process knows.

        Raises:
            LeaseHeldError: another run has taken over, or has begun where there was no room for this lease.
        """
        if self._unwritten_after is not None and self._has_another_begun():
            self.lost.set()
        if self.lost.is_set():
            msg = f"another run has taken over {self._store.uri}; start again later"
            raise LeaseHeldError(msg)

    def _has_another_begun(self) -> bool:
        generation, holder = read_newest_lease(self._store)
        is_own = holder is not None and holder["run_id"] == self._run_id  # written although the store reported an error
        return generation != self._unwritten_after and not is_own

    def _wait_for_silence(self, generation: int, holder: dict[str, Any]) -> int:
        """Return the generation to follow: once the holder released it, was silent for too long, or died here."""
        deadline_s = self._clock() + float(holder["ttl_s"])
        while self._clock() < deadline_s and not _died_here(holder):
            self._log_waiting("lease_waiting holder=%s seconds=%.0f", holder["run_id"], deadline_s - self._clock())
            self._sleep(min(2.0, self._ttl_s / 6))
            self._check_stop()
            now, holder_now = read_newest_lease(self._store)
            if holder_now is not None and now != generation:
                if holder_now["released"]:
                    return now
                msg = f"run {holder_now['run_id']} on {holder_now['host']} works on {self._store.uri}"
                raise LeaseHeldError(msg)
        log.warning("lease_taken_over from=%s generation=%d", holder["run_id"], generation)
        return generation

    def renew(self) -> None:
        """Show other runs that this one is alive, or find out that one of them has taken over. Its thread does this."""
        try:
            self._write(self._generation + 1, released=False)
        except ObjectExistsError:
            self.lost.set()
            log.error("lease_lost run_id=%s: another run has taken over", self._run_id)  # noqa: TRY400
        except StorageError as err:
            log.warning("lease_renewal_failed error=%s", err)

    def _keep(self) -> None:
        while not self.lost.is_set() and not self._stop_renewing.wait(self._ttl_s / 3):
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
            if self._store.read(name) != data:  # equal: it is our own earlier attempt, whose reply was lost
                raise
        self._generation = generation


def read_newest_lease(store: Store) -> tuple[int, dict[str, Any] | None]:
    """Return the highest generation and the state that its writer stored; (0, None) before the first."""
    listed = (layout.lease_generation(item.name) for item in store.list(layout.LEASES))
    generation = max((number for number in listed if number is not None), default=0)
    if not generation:
        return 0, None
    return generation, store.read_json(layout.lease_name(generation))


def _died_here(holder: dict[str, Any]) -> bool:
    """Return whether the holder ran on this machine and has died; on another machine this cannot be known."""
    if holder["host"] != socket.gethostname() or abs(holder["boot"] - psutil.boot_time()) > 1:
        return False
    try:
        process = psutil.Process(holder["pid"])
        another = abs(process.create_time() - holder["process_started"]) > 1
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
