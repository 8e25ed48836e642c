"""Budget: the limits of `budget` and `limits.max_failed`, checked while a run generates.

An engine costs the same whether it generates or waits, so that a run is charged for the uptime of its engines. A thread
of each engine reports its uptime every HEARTBEAT_S seconds, and the attempt tracker adds them up. After its last
heartbeat an engine counts for as long as another heartbeat could have taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pia_batch.config import BudgetConfig, RunConfig, templates
from pia_batch.planning.plan import Plan


@dataclass(frozen=True)
class LimitReached:
    """Limit that ends a run although requests are pending.

    Attributes:
        reason: Key of the limit, such as `deadline`.
        message: Limit and value that was reached, and how to continue.
        exit_code: Exit code of the command.
    """

    reason: str
    message: str
    exit_code: int


class Budget:
    """Limits of one run.

    Args:
        config: Config of the run.
        now: Clock that returns the current time, UTC.
    """

    def __init__(self, config: RunConfig, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._config, self._now = config, now
        text = config.budget.deadline
        self._deadline = None if text is None else templates.deadline(text, now())

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; infinite without one, never negative."""
        return float("inf") if self._deadline is None else max(0.0, (self._deadline - self._now()).total_seconds())

    def reached(self, num_failed: int, engine_seconds: float = 0.0) -> LimitReached | None:
        """Return the limit that ends the run now, or None.

        Args:
            num_failed: Number of requests of the manifest that have failed, including rejected ones and those of
                earlier runs.
            engine_seconds: Total uptime of all engines of this run, in seconds.
        """
        limits, budget = self._config.limits, self._config.budget
        if limits.max_failed is not None and num_failed > limits.max_failed:
            message = (
                f"{num_failed} requests have failed, more than limits.max_failed allows ({limits.max_failed}); "
                "`pia-batch status` counts them by error kind, and `pia-batch retry` tries them again once the cause "
                "is fixed"
            )
            return LimitReached("max_failed", message, 3)
        if self._deadline is not None and self._now() >= self._deadline:
            message = f"the deadline {self._deadline:%Y-%m-%dT%H:%M} UTC (budget.deadline) has passed"
            return LimitReached("deadline", f"{message}; start again to continue", 4)
        if budget.max_gpu_hours is None:
            return None
        hours = gpu_hours(self._config, engine_seconds)
        if hours >= budget.max_gpu_hours:
            message = f"{hours:.3g} {unit(self._config)} are spent, of {budget.max_gpu_hours:g} (budget.max_gpu_hours)"
            return LimitReached("max_gpu_hours", f"{message}; start again to spend the same amount once more", 4)
        return None


def selection_limit(plan: Plan) -> LimitReached | None:
    """Return the limit that kept pending requests out of the plan's choice, or None if it chose all of them."""
    budget = plan.config.budget
    if plan.num_selected == plan.num_pending:
        return None
    if budget.limit is not None and plan.num_selected == budget.limit:
        message = f"{budget.limit} requests are processed (budget.limit); start again to continue"
        return LimitReached("limit", message, 4)
    message = f"the sample of {(budget.sample or 1.0):.6g} (budget.sample) is processed"
    return LimitReached("sample", f"{message}; start again without it, or with a larger one, to continue", 4)


def remaining(budget: BudgetConfig, computed: int, hours: float) -> BudgetConfig | None:
    """Return the budget left for further runs of one command, or None if nothing is left.

    Args:
        budget: Budget before the run.
        computed: Number of requests that the run processed.
        hours: GPU-hours that the run took.
    """
    limit = None if budget.limit is None else budget.limit - computed
    hours_left = None if budget.max_gpu_hours is None else budget.max_gpu_hours - hours
    if (limit is not None and limit <= 0) or (hours_left is not None and hours_left <= 0):
        return None
    return budget.model_copy(update={"limit": limit, "max_gpu_hours": hours_left})


def gpu_hours(config: RunConfig, engine_seconds: float) -> float:
    """Return the uptime of engines in hours, times the GPUs of one engine; on the CPU, the engine-hours."""
    return engine_seconds / 3600 * (config.placement.num_gpus or 1.0)


def unit(config: RunConfig) -> str:
    """Return the unit of `gpu_hours` for people."""
    return "GPU hours" if config.placement.num_gpus else "engine hours"
