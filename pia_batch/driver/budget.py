"""What a run may spend, and what it has spent: the limits of `budget` and `limits.max_failed`, while it draws.

Engines cost whether they draw or wait, so that the hours of a run are those during which its engines are alive. Each of
them says so every HEARTBEAT_S seconds by a thread of its own, and the attempt tracker adds them up; after its last word
an engine counts for as long as another word could take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pia_batch.config import BudgetConfig, RunConfig, templates
from pia_batch.planning.plan import Plan


@dataclass(frozen=True)
class Stopped:
    """Why a run ends although there is more to draw."""

    why: str
    """The key of the limit, such as `deadline`."""
    message: str
    """What was reached, and how to go on."""
    exit_code: int


class Budget:
    """The limits of one run. It knows the time, and is told the rest."""

    def __init__(self, config: RunConfig, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._config, self._now = config, now
        text = config.budget.deadline
        self._deadline = None if text is None else templates.deadline(text, now())

    @property
    def seconds_left(self) -> float:
        """Until the deadline; infinite without one, never negative."""
        return float("inf") if self._deadline is None else max(0.0, (self._deadline - self._now()).total_seconds())

    def reached(self, num_failed: int, engine_seconds: float = 0.0) -> Stopped | None:
        """The limit that ends the run now, if one does.

        Args:
            num_failed: requests of the manifest that have failed by now, rejected ones and earlier runs' included.
            engine_seconds: of all engines of this run, by now.
        """
        limits, budget = self._config.limits, self._config.budget
        if limits.max_failed is not None and num_failed > limits.max_failed:
            said = f"{num_failed} requests have failed, and limits.max_failed tolerates {limits.max_failed}"
            again = "`pia-batch status` tells their kinds, and `pia-batch retry` draws them again once mended"
            return Stopped("max_failed", f"{said}; {again}", 3)
        if self._deadline is not None and self._now() >= self._deadline:
            said = f"the deadline {self._deadline:%Y-%m-%dT%H:%M} UTC (budget.deadline) has come"
            return Stopped("deadline", f"{said}; start again to go on", 4)
        if budget.max_gpu_hours is None:
            return None
        hours = gpu_hours(self._config, engine_seconds)
        if hours >= budget.max_gpu_hours:
            said = f"{hours:.3g} {unit(self._config)} are spent, of {budget.max_gpu_hours:g} (budget.max_gpu_hours)"
            return Stopped("max_gpu_hours", f"{said}; start again to spend as much once more", 4)
        return None


def not_chosen(plan: Plan) -> Stopped | None:
    """Why requests are left although all that the plan chose are drawn; None: it chose all."""
    budget = plan.config.budget
    if plan.num_chosen == plan.num_pending:
        return None
    if budget.limit is not None and plan.num_chosen == budget.limit:
        return Stopped("limit", f"{budget.limit} requests are drawn (budget.limit); start again to go on", 4)
    said = f"the sample of {(budget.sample or 1.0):.6g} (budget.sample) is drawn"
    return Stopped("sample", f"{said}; start again without it, or with a larger one, to go on", 4)


def rest_of(budget: BudgetConfig, computed: int, hours: float) -> BudgetConfig | None:
    """What further runs of one command may spend after one has drawn `computed` requests; None: nothing."""
    limit = None if budget.limit is None else budget.limit - computed
    left = None if budget.max_gpu_hours is None else budget.max_gpu_hours - hours
    if (limit is not None and limit <= 0) or (left is not None and left <= 0):
        return None
    return budget.model_copy(update={"limit": limit, "max_gpu_hours": left})


def gpu_hours(config: RunConfig, engine_seconds: float) -> float:
    """The hours that engines were alive, times the GPUs of one; on the CPU, the hours of engines."""
    return engine_seconds / 3600 * (config.placement.num_gpus or 1.0)


def unit(config: RunConfig) -> str:
    """What `gpu_hours` counts."""
    return "GPU hours" if config.placement.num_gpus else "engine hours"
