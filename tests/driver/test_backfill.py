"""Many dates, one run after the other: the dates that run, the dates that are skipped, and the exit code of all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.config import RunConfig
from pia_batch.config.templates import RunDate
from pia_batch.driver import backfill
from pia_batch.errors import (
    AccountingError,
    ConfigError,
    InterruptedRunError,
    LeaseHeldError,
    ManifestError,
    PiaBatchError,
    StorageError,
)
from pia_batch.schema.run_record import RunSummary

DATES = [RunDate.parse(f"2026-11-{day:02d}") for day in range(16, 23)]
CONFIG = RunConfig.load(None, {"manifest": "in/{date}", "output": "out/{date}"})


def summary(exit_code: int = 0, **changes: Any) -> RunSummary:
    """Return the summary of a run of three requests."""
    numbers: dict[str, Any] = dict.fromkeys(("requests", "succeeded", "computed"), 3)
    numbers |= dict.fromkeys(("failed", "rejected", "duplicates", "left", "seconds", "gpu_hours"), 0)
    texts = dict.fromkeys(("cost", "results_uri", "reason", "message"), None)
    return RunSummary(**{"run_id": "r", "failures": {}, "exit_code": exit_code} | numbers | texts | changes)


class Runs:
    """Fake of `run.run`: returns an end for each date, and keeps the configs that it was given."""

    def __init__(self, *ends: RunSummary | PiaBatchError) -> None:
        self.ends = [*ends, *itertools.repeat(summary(), len(DATES) - len(ends))]
        self.given: list[RunConfig] = []
        self.reported: list[tuple[str, Any]] = []

    def __call__(self, config: RunConfig) -> RunSummary:
        self.given.append(config)
        end = self.ends[len(self.given) - 1]
        if isinstance(end, PiaBatchError):
            raise end
        return end

    def all(self, config: RunConfig = CONFIG) -> int:
        return backfill.backfill(config, DATES, self, lambda date, end: self.reported.append((str(date), end)))


def test_every_date_is_run_in_order() -> None:
    runs = Runs()

    assert runs.all() == 0
    assert [config.filled().manifest for config in runs.given] == [f"in/{date}" for date in DATES]
    assert [date for date, _ in runs.reported] == [str(date) for date in DATES]


@pytest.mark.parametrize(
    ("error", "code"), [(ManifestError("hole"), 2), (LeaseHeldError("held"), 75), (AccountingError("lost"), 1)]
)
def test_a_date_that_fails_alone_is_reported_and_the_others_run(error: PiaBatchError, code: int) -> None:
    runs = Runs(summary(), error)

    assert runs.all() == code
    assert len(runs.given) == len(DATES)
    assert runs.reported[1] == ("2026-11-17", error)


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("typo"), 2), (StorageError("down"), 2), (InterruptedRunError("stopped"), 4)]
)
def test_an_error_that_every_date_would_have_skips_the_rest(
    caplog: pytest.LogCaptureFixture, error: PiaBatchError, code: int
) -> None:
    runs = Runs(summary(), error)

    assert runs.all() == code
    assert len(runs.given) == 2
    assert "dates_skipped=5 first=2026-11-18" in caplog.text


def test_a_bug_is_not_caught() -> None:
    def bug(_: RunConfig) -> RunSummary:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        backfill.backfill(CONFIG, DATES, bug, lambda *_: None)


def test_what_is_spent_counts_for_all_dates_together() -> None:
    runs = Runs(summary(gpu_hours=0.5), summary(gpu_hours=0.25))
    config = RunConfig.load(
        None,
        CONFIG.model_dump(exclude_unset=True)
        | {"budget.limit": 100, "budget.max_gpu_hours": 2.0, "budget.deadline": "5h"},
    )

    assert runs.all(config) == 0
    assert [one.budget.limit for one in runs.given] == [100, 97, 94, 91, 88, 85, 82]
    assert [one.budget.max_gpu_hours for one in runs.given[:3]] == [2.0, 1.5, 1.25]
    (deadline,) = {one.budget.deadline for one in runs.given}  # five hours from the first date's start
    assert deadline is not None
    assert deadline.startswith("20")


@pytest.mark.parametrize(("reason", "begun"), [("limit", 2), ("deadline", 2), ("max_gpu_hours", 2), ("sample", 7)])
def test_a_limit_that_is_reached_skips_the_rest_unless_each_date_has_its_own(reason: str, begun: int) -> None:
    runs = Runs(summary(), summary(4, reason=reason, message="reached", left=1))

    assert runs.all() == 4
    assert len(runs.given) == begun


def test_a_limit_that_one_date_uses_up_skips_the_rest_with_4() -> None:
    config = RunConfig.load(None, CONFIG.model_dump(exclude_unset=True) | {"budget.limit": 6})
    runs = Runs()

    assert runs.all(config) == 4
    assert len(runs.given) == 2


def test_failures_of_one_date_do_not_stop_the_next() -> None:
    runs = Runs(summary(3, reason="max_failed", message="too many", left=2), summary(3, failed=1))

    assert runs.all() == 3
    assert len(runs.given) == len(DATES)


@pytest.mark.parametrize(
    ("codes", "worst"),
    [({0}, 0), ({0, 3}, 3), ({3, 2}, 2), ({2, 75, 3}, 75), ({4, 75, 2}, 4), ({0, 1, 4}, 1)],
)
def test_the_worst_exit_code_stands_for_all(codes: set[int], worst: int) -> None:
    assert backfill.worst(codes) == worst


@given(st.sets(st.sampled_from(backfill.EXIT_CODE_PRIORITY), min_size=1), st.sampled_from(backfill.EXIT_CODE_PRIORITY))
def test_one_more_date_never_makes_it_better(codes: set[int], more: int) -> None:
    rank: Callable[[int], int] = backfill.EXIT_CODE_PRIORITY.index

    assert rank(backfill.worst(codes | {more})) <= rank(backfill.worst(codes))
