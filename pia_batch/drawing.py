"""A chain that runs: its outcomes are counted as they come, and it is ended where it must be.

Knows the chain as an iterator of outcomes, and the ledger of its engines; nothing of Ray Data.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch import starting
from pia_batch.budget import Budget, Stopped
from pia_batch.config import RunConfig
from pia_batch.errors import (
    DeviceMemoryError,
    EngineError,
    InterruptedRunError,
    LeaseHeldError,
    PiaBatchError,
    RequestTimeoutError,
    StorageError,
    WorkerCrashError,
)
from pia_batch.lease import Lease
from pia_batch.progress import Progress
from pia_batch.records import FAILED, SUCCEEDED
from pia_batch.worker import OUTCOME

log = logging.getLogger(__name__)

_WORKERS_FAULTS = frozenset(
    error.kind for error in (WorkerCrashError, RequestTimeoutError, EngineError, DeviceMemoryError)
)
"""Of requests that failed for their worker's sake: where all do, it is not the requests."""

_TELL_S = 30.0
"""Seconds without an outcome after which a run looks whether it has engines at all."""

_SETTLE_S = 2.0
"""Seconds that a stopped run waits for outcomes that are committed and have not arrived, for the sake of its count."""


class Control(Protocol):
    """What the driver asks of the ledger: methods of `cluster.RemoteControl`."""

    def stop(self) -> None:
        """Let nothing begin any more."""

    def in_flight(self) -> int:
        """How many requests were begun and have not ended."""

    def engine_seconds(self) -> float:
        """How long all engines have lived."""


@dataclass(frozen=True)
class Watch:
    """Who is told of a running chain, and who may end it."""

    config: RunConfig
    progress: Progress
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    lease: Lease
    budget: Budget
    failed_before: int
    """Requests that have failed already and are not drawn again."""

    @property
    def must_stop(self) -> bool:
        """Whether somebody outside wants the run to end."""
        return self.stop.is_set() or self.lease.lost.is_set()

    def also(self, see: Callable[[Progress], None]) -> Watch:
        """The same, and `see` is told how far the run is, too."""

        def on_progress(progress: Progress) -> None:
            see(progress)
            self.on_progress(progress)

        return replace(self, on_progress=on_progress)

    def spent(self, engine_seconds: Callable[[], float]) -> Stopped | None:
        """The limit that ends the run now, if one does."""
        return self.budget.reached(self.failed_before + self.progress.failed, engine_seconds)


def draw(
    outcomes: Iterable[pa.Table], control: Control, resources: Callable[[], Mapping[str, float]], watch: Watch
) -> Stopped | None:
    """Pull a chain to its end, or until `watch` says stop. Every outcome counted is committed.

    Args:
        outcomes: the chain: OUTCOME tables as they come.
        control: its ledger.
        resources: what the cluster has by now.
        watch: counts, and decides.

    Returns:
        The limit that ended it; None: everything is drawn.

    Raises:
        InterruptedRunError: stopped from outside, by a store that went away, or by workers that all fail.
        LeaseHeldError: another run has taken over.
    """
    watchman = _Watchman(watch.config, control.in_flight, resources)
    blocks: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
    enough = threading.Event()
    threading.Thread(target=_consume, args=(outcomes, blocks, enough), name="outcomes", daemon=True).start()
    watch.on_progress(watch.progress)
    stopped = None
    try:
        while not watch.must_stop and stopped is None:
            block = _next(blocks, 0.5)
            if block is None:
                return None
            _count(watch.progress, block)
            watch.on_progress(watch.progress)
            watchman.see(block)
            stopped = watch.spent(control.engine_seconds)
        if stopped is not None:
            log.info("stopping why=%s", stopped.why)
        _drain(control, watch.config.limits.stop_grace_s)
        if stopped is not None:
            _settle(watch.progress, blocks)
            return stopped
    finally:
        enough.set()
    if watch.lease.lost.is_set():
        msg = f"another run has taken over {watch.config.output}"
        raise LeaseHeldError(msg)
    msg = "stopped; what was finished is committed. Start again to resume"
    raise InterruptedRunError(msg)


class _Watchman:
    """Ends a run whose workers fail request after request, or that is given no worker at all."""

    def __init__(
        self, config: RunConfig, in_flight: Callable[[], int], resources: Callable[[], Mapping[str, float]]
    ) -> None:
        self._place, self._max_crashes = config.placement, config.limits.max_crashes
        self._in_flight, self._resources = in_flight, resources
        self._crashes = 0
        self._moved_at = self._told_at = time.monotonic()

    def see(self, outcomes: pa.Table) -> None:
        """Look at the outcomes since the last call, none of them included.

        Raises:
            InterruptedRunError: enough requests in a row failed for their worker's sake, or the run waited enough.
        """
        for row in outcomes.select(["error_kind", "error"]).to_pylist():
            self._crashes = self._crashes + 1 if row["error_kind"] in _WORKERS_FAULTS else 0
            if self._crashes >= self._max_crashes:
                msg = (
                    f"{self._crashes} requests in a row failed for their worker's sake (limits.max_crashes), the last "
                    f"one because {row['error']}; look at the workers' logs and devices. What was finished is "
                    "committed. Start again to go on, with --retry-failed to try these again"
                )
                raise InterruptedRunError(msg)
        now = time.monotonic()
        if len(outcomes):
            self._moved_at = self._told_at = now
        if now - self._told_at < min(_TELL_S, self._place.wait_s):
            return
        self._told_at = now
        if self._in_flight():
            self._moved_at = now
            return
        waited = now - self._moved_at
        have = self._resources()
        state = (
            f"one engine needs {self._place.num_gpus:g} GPUs and {self._place.num_cpus:g} CPUs, and the cluster has "
            f"{have.get('GPU', 0):g} and {have.get('CPU', 0):g}"
        )
        if self._place.memory_mb is not None:
            there = have.get("memory", 0) / 2**20
            state += f"; and {self._place.memory_mb} MiB of memory (placement.memory_mb), where there are {there:.0f}"
        log.warning("waiting_for_engines seconds=%.0f: %s", waited, state)
        if waited > self._place.wait_s:
            msg = f"no engine could work for {waited:.0f} s (placement.wait_s): {state}. Start again to go on"
            raise InterruptedRunError(msg)


def _consume(
    outcomes: Iterable[pa.Table], blocks: queue.Queue[pa.Table | BaseException | None], enough: threading.Event
) -> None:
    """Pull outcomes until there are none, or until they are `enough`: leaving earlier would end the engines at once."""
    try:
        for block in outcomes:
            blocks.put(block)
            if enough.is_set():
                return
        blocks.put(None)
    except BaseException as err:  # noqa: BLE001 - handed to the thread that runs the run
        blocks.put(err)


def _next(blocks: queue.Queue[pa.Table | BaseException | None], timeout_s: float) -> pa.Table | None:
    """The next outcomes, none if none came in time; None at the end of the chain."""
    try:
        block = blocks.get(timeout=timeout_s)
    except queue.Empty:
        return OUTCOME.empty_table()
    if isinstance(block, BaseException):
        raise _for_the_operator(block)
    return block


def _count(progress: Progress, outcomes: pa.Table) -> None:
    succeeded = outcomes.filter(pc.equal(outcomes["status"], SUCCEEDED))
    kinds = outcomes.filter(pc.equal(outcomes["status"], FAILED))["error_kind"].value_counts().to_pylist()
    newest = succeeded["animation_uri"][-1].as_py() if len(succeeded) else None
    progress.add(len(succeeded), {str(kind["values"]): kind["counts"] for kind in kinds}, newest)


def _drain(control: Control, grace_s: float) -> None:
    """Let no batch begin, and wait for those in flight to be committed."""
    control.stop()
    deadline = time.monotonic() + grace_s
    while (left := control.in_flight()) and time.monotonic() < deadline:
        log.info("stopping requests_in_flight=%d", left)
        time.sleep(0.3)


def _settle(progress: Progress, blocks: queue.Queue[pa.Table | BaseException | None]) -> None:
    """Count what was committed while the run was about to stop."""
    deadline = time.monotonic() + _SETTLE_S
    while (left := deadline - time.monotonic()) > 0:
        block = _next(blocks, left)
        if block is None:
            return
        _count(progress, block)


def _for_the_operator(err: BaseException) -> BaseException:
    """What a worker raised, out of the wrappers that Ray puts around it."""
    inner: BaseException | None = err
    while inner is not None:
        if isinstance(inner, StorageError):
            return InterruptedRunError(f"{inner}; what was finished is committed. Start again to resume")
        if isinstance(inner, PiaBatchError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return starting.explain_loss(err)
