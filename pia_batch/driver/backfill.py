"""Many dates of one config, one run after the other. Knows runs as a function; nothing of Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from pia_batch.config import RunConfig, templates
from pia_batch.config.templates import RunDate
from pia_batch.driver.budget import rest_of
from pia_batch.driver.run_record import RunSummary
from pia_batch.errors import AccountingError, LeaseHeldError, ManifestError, PiaBatchError

log = logging.getLogger(__name__)

WORST_FIRST = (1, 4, 75, 2, 3, 0)
"""The exit code of a backfill is the first of these that one of its dates has: a bug, then what a scheduler should
start again, then what a person has to look at."""

_OF_ONE_DATE = (ManifestError, LeaseHeldError, AccountingError)
"""What is no reason to leave out the dates that follow. Anything else would befall them too."""

_OF_ALL_DATES = frozenset({"limit", "max_gpu_hours", "deadline"})
"""Limits that hold for the whole backfill. A sample, and the failures that are tolerated, are counted for each date."""


def backfill(
    config: RunConfig,
    dates: Sequence[RunDate],
    run_one: Callable[[RunConfig], RunSummary],
    tell: Callable[[RunDate, RunSummary | PiaBatchError], None],
) -> int:
    """Run the dates in order, and return the exit code of all.

    A date without a manifest, or whose output another run works on, is told of, and the others go on. A config, a
    store or a device that does not work, an interruption, and a limit on what is spent leave out the rest.

    Args:
        config: has templates; `budget.limit`, `budget.max_gpu_hours` and `budget.deadline` hold for all dates together.
        dates: as `schedule.Templates.dates` gives them.
        run_one: `pipeline.run` of a config of one date.
        tell: called after each date, with what it came to.
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
            tell(date, err)
            codes.add(err.exit_code)
            if isinstance(err, _OF_ONE_DATE):
                continue
            return _left_out(codes, dates[number:], str(err))
        tell(date, summary)
        codes.add(summary.exit_code)
        rest = rest_of(budget, summary.computed, summary.gpu_hours)
        if summary.why in _OF_ALL_DATES or rest is None:
            codes |= {4} if dates[number:] else set()
            return _left_out(codes, dates[number:], summary.message or "the budget is spent")
        budget = rest
    return worst(codes)


def worst(codes: set[int]) -> int:
    """The exit code that stands for all of `codes`."""
    return min(codes, key=lambda code: WORST_FIRST.index(code) if code in WORST_FIRST else 0)


def _left_out(codes: set[int], dates: Sequence[RunDate], why: str) -> int:
    if dates:
        log.warning("backfill_stopped dates_not_begun=%d first=%s: %s", len(dates), dates[0], why)
    return worst(codes)
