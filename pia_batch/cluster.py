"""What a run needs of Ray besides Ray Data: a connection, the ledger's process, and what the cluster has."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pia_batch.config import PlacementConfig
from pia_batch.errors import ConfigError
from pia_batch.ledger import Ledger, Turn
from pia_batch.records import Row


@contextmanager
def connect(place: PlacementConfig) -> Iterator[None]:
    """A connection to Ray: the one that exists, else the cluster's, else a Ray of our own that ends with the run."""
    if ray.is_initialized():
        yield
        return
    address = place.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of what it will do one day
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or it prints a warning of every engine's restarts
        # What its workers print is in Ray's session folder; what a request failed of is in its result.
        options |= {"include_dashboard": False, "log_to_driver": False, "num_cpus": max(2, os.cpu_count() or 2)}
        if place.object_store_mb is not None:
            options["object_store_memory"] = place.object_store_mb * 2**20
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as err:
        msg = f"cannot reach Ray at {address}: {err}; see placement.ray_address and RAY_ADDRESS"
        raise ConfigError(msg) from None
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray's own would end the process with nothing committed
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if address == "local" and gpus < place.num_gpus:
            msg = f"placement.num_gpus is {place.num_gpus:g} and this machine has {gpus:g}; 0 runs on the CPU"
            raise ConfigError(msg)
        yield
    finally:
        ray.shutdown()


class RemoteControl:
    """`animate.Control` over the ledger's process; for the driver, what else it asks of it."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger

    def begin(self, keys: list[str]) -> list[int] | None:
        """As `Ledger.begin`."""
        attempts: list[int] | None = ray.get(self._ledger.begin.remote(keys))
        return attempts

    def begin_alone(self, key: str) -> Turn | None:
        """As `Ledger.begin_alone`."""
        turn: Turn | None = ray.get(self._ledger.begin_alone.remote(key))
        return turn

    def hang(self, keys: list[str]) -> None:
        """As `Ledger.hang`."""
        ray.get(self._ledger.hang.remote(keys), timeout=5)

    def end(self, outcomes: list[Row]) -> None:
        """As `Ledger.end`."""
        ray.get(self._ledger.end.remote(outcomes))

    def stop(self) -> None:
        """As `Ledger.stop`."""
        ray.get(self._ledger.stop.remote())

    def in_flight(self) -> int:
        """As `Ledger.in_flight`."""
        number: int = ray.get(self._ledger.in_flight.remote())
        return number


def start_ledger(max_attempts: int) -> RemoteControl:
    """The run's ledger in a process beside the driver's, as long as that machine can hold it: it ends with the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Ledger)
    return RemoteControl(actor.remote(max_attempts))
