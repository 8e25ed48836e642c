"""What a command shows: text and JSON on standard output, progress on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.status import Status
from rich.text import Text

from pia_batch.errors import printable

if TYPE_CHECKING:
    from pia_batch.driver.progress import Progress
from pia_batch.schema.run_record import ProgressSnapshot

LOG_EVERY_S = 10.0
"""Seconds between progress lines where standard error is no terminal."""

_REFRESHES_PER_SECOND = 4

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def print_json(told: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    out.print(json.dumps(told, indent=2, ensure_ascii=False), soft_wrap=True, markup=False)


@contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A callback for each of many things: a live count on a terminal, a line now and then elsewhere."""
    done, last = 0, time.monotonic()
    log = logging.getLogger("pia_batch.driver.progress")
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
def shown_progress(*, as_json: bool = False, console: Console = err) -> Iterator[Callable[[Progress], None]]:
    """A callback for `pipeline.run`: a live view on a terminal, a line now and then elsewhere.

    Args:
        as_json: where there is no terminal, each line is a JSON object: `event` and the keys of
            `ProgressSnapshot`.
        console: where to.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        with _live(console) as show:
            yield show
    elif as_json:
        yield _now_and_then(lambda seen: _print_json_line(seen, console))
    else:
        from pia_batch.cli import view

        log = logging.getLogger("pia_batch.driver.progress")
        yield _now_and_then(lambda seen: log.info("progress %s", view.line(seen)))


@contextmanager
def _live(console: Console) -> Iterator[Callable[[Progress], None]]:
    """The view is drawn a few times a second below the log; its last state stays."""
    from pia_batch.cli import view

    seen: ProgressSnapshot | None = None
    drawn = 0.0

    def show(progress: Progress) -> None:
        nonlocal seen, drawn
        known = seen is not None and seen.phase == progress.phase
        if known and (progress.phase == "starting" or time.monotonic() - drawn < 1 / _REFRESHES_PER_SECOND):
            return
        seen, drawn = progress.snapshot(), time.monotonic()
        if progress.phase == "starting":
            # Ray writes to the terminal itself as it starts, and a frame that stood there could not be drawn over.
            live.update(Text(), refresh=True)
            console.print(Text("starting Ray", "dim"))
        else:
            live.update(view.Frame(seen))

    stderr = sys.stderr
    planning = Spinner("dots", Text("planning", "dim"))
    with Live(planning, console=console, refresh_per_second=_REFRESHES_PER_SECOND) as live, _log_above(console, stderr):
        try:
            yield show
        except BaseException:
            if seen is not None:
                live.update(view.Frame(seen, "stopped"))
            raise
        finally:
            live.transient = seen is None  # nothing was to be done: the spinner goes


@contextmanager
def _log_above(console: Console, stream: Any) -> Iterator[None]:
    """What is logged to `stream` appears above what is live there. Written past it, it would be drawn over."""
    found = [handler for name in ("", "ray") for handler in logging.getLogger(name).handlers]
    handlers = [one for one in found if isinstance(one, logging.StreamHandler) and one.stream is stream]
    for handler in handlers:
        handler.setStream(_Above(console))
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(stream)


class _Above:
    """A text stream whose lines a console prints above what is live. A terminal takes none of them for a command."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> None:
        """Print lines."""
        for line in text.splitlines():
            self._console.print(Text(printable(line)), soft_wrap=True)

    def flush(self) -> None:
        """Nothing is held back."""


def _print_json_line(seen: ProgressSnapshot, console: Console) -> None:
    told = {"event": "progress", **seen.model_dump(mode="json")}
    console.print(json.dumps(told), soft_wrap=True, markup=False)


def _now_and_then(tell: Callable[[ProgressSnapshot], None]) -> Callable[[Progress], None]:
    """Tell of each phase as it begins, and every LOG_EVERY_S seconds."""
    phase, last = "", 0.0

    def show(progress: Progress) -> None:
        nonlocal phase, last
        if progress.phase != phase or time.monotonic() - last >= LOG_EVERY_S:
            phase, last = progress.phase, time.monotonic()
            tell(progress.snapshot())

    return show
