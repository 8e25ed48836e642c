"""What a command shows: text and JSON on standard output, progress on standard error."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status

if TYPE_CHECKING:
    from pia_batch.summary import Progress

LOG_EVERY_S = 10.0
"""Seconds between progress lines where standard error is no terminal."""

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def print_json(told: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    out.print(json.dumps(told, indent=2, ensure_ascii=False), soft_wrap=True, markup=False)


@contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A callback for each of many things: a live count on a terminal, a line now and then elsewhere."""
    done, last = 0, time.monotonic()
    log = logging.getLogger("pia_batch.progress")
    with Status("", console=err) if err.is_terminal else nullcontext() as shown:

        def one_more() -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last < (0.2 if shown else LOG_EVERY_S):
                return
            last = time.monotonic()
            words = f"{done}{f' of {total}' if total is not None else ''} {what}"
            if shown:
                shown.update(words)
            else:
                log.info("progress %s", words)

        yield one_more


@contextmanager
def shown_progress() -> Iterator[Any]:
    """A callback for `pipeline.run`: a live bar on a terminal, a line now and then elsewhere."""
    if not err.is_terminal:
        yield _log_progress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=err) as bar:
        task = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            left = progress.seconds_left
            words = f"{progress.failed} failed  {progress.clips_per_second:.2f} clips/s"
            words += "" if left is None else f"  {left:.0f} s left"
            bar.update(task, total=progress.total, completed=progress.done, description=words)

        yield show


def _log_progress() -> Any:  # a callback
    last = -LOG_EVERY_S
    log = logging.getLogger("pia_batch.progress")

    def show(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_EVERY_S or progress.done == progress.total:
            last = time.monotonic()
            left = "unknown" if progress.seconds_left is None else f"{progress.seconds_left:.0f}"
            log.info(
                "progress done=%d failed=%d total=%d clips_per_second=%.2f seconds_left=%s",
                *(progress.done, progress.failed, progress.total, progress.clips_per_second, left),
            )

    return show
