"""Backfill: runs many dates of one config, one after the other. Knows a run as a function, and nothing of Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from pia_batch.config import RunConfig, templates
from pia_batch.config.templates import RunDate
from pia_batch.driver.budget import remaining
from pia_batch.errors import AccountingError, LeaseHeldError, ManifestError, PiaBatchError
from pia_batch.schema.run_record import RunSummary

log = logging.getLogger(__name__)

EXIT_CODE_PRIORITY = (1, 4, 75, 2, 3, 0)
"""The exit code of a backfill is the first of these that one of its dates has: a bug, then what a scheduler should
start again, then what a person has to look at."""

_ERRORS_OF_ONE_DATE = (ManifestError, LeaseHeldError, AccountingError)
"""Errors after which the remaining dates run all the same. Any other error would stop them too."""

_LIMITS_OF_ALL_DATES = frozenset({"limit", "max_gpu_hours", "deadline"})
"""Limits that hold for the whole backfill. `sample` and `max_failed` count for each date."""


def backfill(
    config: RunConfig,
    dates: Sequence[RunDate],
    run_one: Callable[[RunConfig], RunSummary],
    report: Callable[[RunDate, RunSummary | PiaBatchError], None],
) -> int:
    """Run the dates in order, and return the exit code of all.

    A date without a manifest, or whose output another run works on, is reported, and the next date runs. The remaining
    dates are skipped after an error of the config, the store or a device, after an interruption, and once a limit on
    what all dates may spend is reached.

    Args:
        config: Config with templates; `budget.limit`, `budget.max_gpu_hours` and `budget.deadline` hold for all dates
            together.
        dates: Dates as `templates.Templates.dates` returns them.
        run_one: `run.run` for the config of one date.
        report: Called after each date with its summary or its error.
    """
    budget = config.budget
    if budget.deadline is not None:
        moment = templates.deadline(budget.deadline, datetime.now(UTC)).isoformat()
        budget = budget.model_copy(update={"deadline": moment})
    codes = {0}
    for number, date in enumerate(dates, start=1):
        try:
            summary = run_one(config.model_copy(update={"run_date": str(date), "budget": budget}))
        except PiaBatchError as err:
            report(date, err)
            codes.add(err.exit_code)
            if isinstance(err, _ERRORS_OF_ONE_DATE):
                continue
            return _skip(codes, dates[number:], str(err))
        report(date, summary)
        codes.add(summary.exit_code)
        budget_left = remaining(budget, summary.computed, summary.gpu_hours)
        if summary.reason in _LIMITS_OF_ALL_DATES or budget_left is None:
            codes |= {4} if dates[number:] else set()
            return _skip(codes, dates[number:], summary.message or "the budget is spent")
        budget = budget_left
    return worst(codes)


def worst(codes: set[int]) -> int:
    """Return the exit code that stands for all of `codes`."""
    return min(codes, key=lambda code: EXIT_CODE_PRIORITY.index(code) if code in EXIT_CODE_PRIORITY else 0)


def _skip(codes: set[int], dates: Sequence[RunDate], reason: str) -> int:
    if dates:
        log.warning("backfill_stopped dates_skipped=%d first=%s: %s", len(dates), dates[0], reason)
    return worst(codes)
