"""Console: prints text and JSON on standard output, and progress on standard error."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.status import Status
from rich.text import Text

from pia_batch.errors import ConfigError, message_of, printable

if TYPE_CHECKING:
    from pia_batch.driver.progress import Progress
    from pia_batch.schema.run_record import ProgressSnapshot

LOG_EVERY_S = 10.0
"""Seconds between progress lines if standard error is not a terminal."""

_REFRESHES_PER_SECOND = 4

_PIPE_WIDTH = 124
"""Width of tables, in characters, if the output is not a terminal and so has no width."""


class Stream(Console):
    """Standard output or standard error, which may be closed, full, or a pipe whose reader leaves early.

    Attributes:
        is_abandoned: True once the reader has left, such as `head`. What is printed from then on is discarded, and the
            command ends with the exit code that it would have had.
    """

    is_abandoned = False

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `Console.print` does. Lines that standard error cannot take are lost, and change nothing else.

        Raises:
            ConfigError: Standard output cannot be written, such as a file on a full disk.
        """
        try:
            super().print(*objects, **options)
        except OSError as problem:
            self._discard()
            if not self.stderr:
                msg = (
                    f"standard output cannot be written: {message_of(problem)}; redirect it to a place that can be "
                    "written and has room. What the command has done besides is kept"
                )
                raise ConfigError(msg) from None

    def on_broken_pipe(self) -> None:
        """Discard what follows."""
        self.is_abandoned = True
        self._discard()

    def _discard(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # no file: a test's buffer, or closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # Python writes its buffer when it ends


def _console(*, stderr: bool = False) -> Stream:
    """Return a console that breaks lines on a terminal only: programs read what comes from a pipe line by line."""
    console = Stream(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console.soft_wrap = True
        console.width = _PIPE_WIDTH
    return console


out = _console()
err = _console(stderr=True)


def print_any_text() -> None:
    """Escape characters that the encoding of standard output lacks, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(payload: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    text = json.dumps(payload, indent=2, ensure_ascii=not out.encoding.startswith("utf"))
    out.print(text, soft_wrap=True, markup=False)


@contextmanager
def counting(noun: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Yield a callback that counts items: live on a terminal, elsewhere by a log line every LOG_EVERY_S seconds.

    Args:
        noun: Plural name of the items.
        total: Number of all items, or None if it is not known.
    """
    count, last = 0, time.monotonic()
    log = logging.getLogger("pia_batch.driver.progress")
    with Status("", console=err) if err.is_terminal else nullcontext() as status:

        def one_more() -> None:
            nonlocal count, last
            count += 1
            if time.monotonic() - last < (0.2 if status else LOG_EVERY_S):
                return
            last = time.monotonic()
            text = f"{count}{f' of {total}' if total is not None else ''} {noun}"
            if status:
                status.update(text)
            else:
                log.info("progress %s", text)

        yield one_more


@contextmanager
def shown_progress(*, as_json: bool = False, console: Console = err) -> Iterator[Callable[[Progress], None]]:
    """Yield a progress callback for `run`: a live view on a terminal, elsewhere a line every LOG_EVERY_S seconds.

    Args:
        as_json: True to write each line as a JSON object, `event` and the fields of `ProgressSnapshot`, if there is no
            terminal.
        console: Console that shows the progress.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        with _live(console) as show:
            yield show
    elif as_json:
        yield _every_phase(lambda snapshot: _print_json_line(snapshot, console))
    else:
        from pia_batch.cli import view

        log = logging.getLogger("pia_batch.driver.progress")
        yield _every_phase(lambda snapshot: log.info("progress %s", view.line(snapshot)))


@contextmanager
def _live(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Show the view below the log, refreshed a few times a second; its last state stays."""
    from pia_batch.cli import view

    snapshot: ProgressSnapshot | None = None
    shown_s = 0.0

    def show(progress: Progress) -> None:
        nonlocal snapshot, shown_s
        is_known = snapshot is not None and snapshot.phase == progress.phase
        if is_known and (progress.phase == "starting" or time.monotonic() - shown_s < 1 / _REFRESHES_PER_SECOND):
            return
        snapshot, shown_s = progress.snapshot(), time.monotonic()
        if progress.phase == "starting":
            # Ray itself writes to the terminal when it starts; a frame above that could not be replaced.
            live.update(Text(), refresh=True)
            console.print(Text("starting Ray", "dim"))
        else:
            live.update(view.Frame(snapshot))

    stderr = sys.stderr
    planning = Spinner("dots", Text("planning", "dim"))
    with Live(planning, console=console, refresh_per_second=_REFRESHES_PER_SECOND) as live, _log_above(console, stderr):
        try:
            yield show
        except BaseException:
            if snapshot is not None:
                live.update(view.Frame(snapshot, "stopped"))
            raise
        finally:
            live.transient = snapshot is None  # nothing was pending: remove the spinner


@contextmanager
def _log_above(console: Console, stream: Any) -> Iterator[None]:
    """Print log lines above the live view: the view would overwrite lines that go to `stream` directly."""
    all_handlers = [handler for name in ("", "ray") for handler in logging.getLogger(name).handlers]
    handlers = [each for each in all_handlers if isinstance(each, logging.StreamHandler) and each.stream is stream]
    for handler in handlers:
        handler.setStream(_Above(console))
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(stream)


class _Above:
    """Text stream whose lines a console prints above the live view, with control characters escaped."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> None:
        """Print the lines of `text`."""
        for line in text.splitlines():
            self._console.print(Text(printable(line)), soft_wrap=True)

    def flush(self) -> None:
        """Do nothing: no text is buffered."""


def _print_json_line(snapshot: ProgressSnapshot, console: Console) -> None:
    payload = {"event": "progress", **snapshot.model_dump(mode="json")}
    console.print(json.dumps(payload), soft_wrap=True, markup=False)


def _every_phase(write: Callable[[ProgressSnapshot], None]) -> Callable[[Progress], None]:
    """Return a callback that shows a snapshot when a phase begins, and every LOG_EVERY_S seconds."""
    phase, last = "", 0.0

    def show(progress: Progress) -> None:
        nonlocal phase, last
        if progress.phase != phase or time.monotonic() - last >= LOG_EVERY_S:
            phase, last = progress.phase, time.monotonic()
            write(progress.snapshot())

    return show
