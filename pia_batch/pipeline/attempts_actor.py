"""The ledger in a process of its own, and how workers and the driver reach it."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pia_batch.pipeline.attempts import Cause, Ledger, Turn, Work
from pia_batch.schema.columns import Row


class RemoteControl:
    """`ledger.Control` over the ledger's process; for the driver, what else it asks of it."""

    def __init__(self, ledger: Any) -> None:
        self.ledger = ledger

    def start(self, worker: str) -> int:
        """As `Ledger.start`."""
        number: int = ray.get(self.ledger.start.remote(worker))
        return number

    def ready(self, worker: str, seconds: float) -> None:
        """As `Ledger.ready`."""
        ray.get(self.ledger.ready.remote(worker, seconds))

    def engines(self) -> dict[str, Any]:
        """As `Ledger.engines`."""
        told: dict[str, Any] = ray.get(self.ledger.engines.remote())
        return told

    def alive(self, engine: str, seconds: float, drawn_seconds: float | None = None) -> None:
        """As `Ledger.alive`; nobody waits for it."""
        self.ledger.alive.remote(engine, seconds, drawn_seconds)

    def work(self) -> Work:
        """As `Ledger.work`."""
        work: Work = ray.get(self.ledger.work.remote())
        return work

    def begin(self, keys: list[str]) -> list[int] | None:
        """As `Ledger.begin`."""
        attempts: list[int] | None = ray.get(self.ledger.begin.remote(keys))
        return attempts

    def begin_alone(self, key: str) -> Turn | None:
        """As `Ledger.begin_alone`."""
        turn: Turn | None = ray.get(self.ledger.begin_alone.remote(key))
        return turn

    def give_up(self, keys: list[str], cause: Cause) -> None:
        """As `Ledger.give_up`."""
        ray.get(self.ledger.give_up.remote(keys, cause), timeout=5)

    def end(self, outcomes: list[Row]) -> None:
        """As `Ledger.end`."""
        ray.get(self.ledger.end.remote(outcomes))

    def stop(self) -> None:
        """As `Ledger.stop`."""
        ray.get(self.ledger.stop.remote())


def start_ledger(max_attempts: int) -> RemoteControl:
    """The run's ledger in a process beside the driver's, as long as that machine can hold it.

    It ends with the run: once nobody has what is returned, or a copy of it, any more.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Ledger)
    return RemoteControl(actor.remote(max_attempts))
