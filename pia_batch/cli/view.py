"""View of a run's progress: a frame on a terminal, a line of `key=value` elsewhere; used by `run` and `status`.

Texts from a store are untrusted: no character of them is used as markup, or as a command to the terminal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pia_batch.errors import printable
from pia_batch.report.head import duration
from pia_batch.schema.run_record import ProgressSnapshot

MAX_WIDTH = 110
"""Maximum width of a frame, in columns: a wider bar is not more precise."""

_THREE_GROUPS, _TWO_GROUPS = 96, 60
"""Minimum widths, in columns, for three and for two groups of figures next to each other."""

_SHORTEST_BAR = 8

_SHOWN_KINDS = 6
"""Maximum number of error kinds that a frame shows."""

_KIND_LENGTH = 24
"""Maximum number of characters of an error kind; ours are shorter."""

_LINKED = re.compile(r"(?:file|https?)://[!-~]+")
"""URIs that a terminal can open, without characters that end an escape sequence."""

_FEWEST_HOURS = 0.01
"""Hours below which a frame shows no number: a minute of one engine is 0.02."""

_RUNNING = ("starting", "generating")
"""Phases in which the figures of the last minute are of use; later ones show those of the whole run."""

_PHASE_STYLES = {"finished": "bold green", "stopped": "bold yellow", "silent": "bold red"}

Facts = list[tuple[str, Text]]
"""Pairs of label and value, one per line."""


class Frame:
    """Progress of a run at one moment, as wide as the terminal is when the frame is rendered.

    Args:
        snapshot: Progress of the run.
        phase: Name of the phase to show instead of the snapshot's, or None.
    """

    def __init__(self, snapshot: ProgressSnapshot, phase: str | None = None) -> None:
        self._snapshot, self._phase = snapshot, phase or snapshot.phase
        self._is_running = self._phase in _RUNNING

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, MAX_WIDTH)
        yield from self._head(width, ascii_only=options.ascii_only)
        yield Text()
        groups = [list(self._requests()), list(self._pace()), list(self._engines())]
        if width < _THREE_GROUPS:
            groups = [groups[0], groups[1] + groups[2]]
        if width < _TWO_GROUPS:
            groups = [groups[0] + groups[1]]
        columns = Table.grid(padding=(0, 2))
        for _ in groups:
            columns.add_column(width=(width - 2 * (len(groups) - 1)) // len(groups))
        columns.add_row(*map(_aligned, groups))
        yield columns
        if self._snapshot.newest is not None:
            yield _newest(self._snapshot.newest)

    def _head(self, width: int, *, ascii_only: bool) -> Iterator[RenderableType]:
        """Yield the name of the run, its phase, its duration and its bar."""
        snapshot = self._snapshot
        title = Table.grid(expand=True, padding=(0, 2))
        title.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        title.add_column(justify="right", no_wrap=True)
        style = _PHASE_STYLES.get(self._phase, "bold cyan")
        title.add_row(
            Text(printable(snapshot.run_id), "bold"),
            Text.assemble((self._phase, style), f"  {clock(snapshot.seconds)}"),
        )
        title.width = width
        yield title
        if snapshot.total is None:
            yield Text(f"{snapshot.done:,} requests done")
            return
        counts = f"{_percent(_share(snapshot.done, snapshot.total))}  {snapshot.done:,} of {snapshot.total:,}"
        bar_width = width - len(counts) - 2
        bar = _bar(snapshot.done, snapshot.failed, snapshot.total, bar_width, ascii_only=ascii_only)
        yield Text.assemble(bar, "  ", counts) if bar_width >= _SHORTEST_BAR else Text(counts)

    def _requests(self) -> Iterator[tuple[str, Text]]:
        snapshot = self._snapshot
        numbers = [snapshot.succeeded, snapshot.failed, snapshot.done_before, *snapshot.failures.values()]
        width = max(len(f"{number:,}") for number in numbers)

        def right(number: int, style: str = "") -> Text:
            return Text(f"{number:>{width},}", style)

        yield "succeeded", right(snapshot.succeeded, "green" if snapshot.succeeded else "")
        yield "failed", right(snapshot.failed, "bold red" if snapshot.failed else "")
        kinds = list(snapshot.failures.items())
        shown = kinds if len(kinds) <= _SHOWN_KINDS else kinds[: _SHOWN_KINDS - 1]
        for kind, count in shown:
            yield f"  {_clipped(printable(kind))}", right(count, "red")
        if len(kinds) > len(shown):
            rest = kinds[len(shown) :]
            yield f"  {len(rest)} more kinds", right(sum(count for _, count in rest), "red")
        if snapshot.done_before:
            yield "before this run", right(snapshot.done_before)

    def _pace(self) -> Iterator[tuple[str, Text]]:
        snapshot = self._snapshot
        recent = snapshot.recent_clips_per_second if self._is_running else None
        yield "clips/s", _now_and_overall(recent, snapshot.clips_per_second, pace)
        if self._is_running:
            yield (
                "time left",
                Text(
                    "not known yet"
                    if snapshot.seconds_left is None
                    else duration(snapshot.seconds_left).replace("\N{NO-BREAK SPACE}", " ")
                ),
            )

    def _engines(self) -> Iterator[tuple[str, Text]]:
        snapshot = self._snapshot
        if self._is_running and snapshot.engines is not None:
            starting = f" ({snapshot.engines_starting} starting)" if snapshot.engines_starting else ""
            yield "engines", Text(f"{snapshot.engines}{starting}")
        if snapshot.busy is not None:
            label = "GPU busy" if snapshot.unit.startswith("GPU") else "busy"
            yield label, _now_and_overall(snapshot.recent_busy if self._is_running else None, snapshot.busy, _percent)
        if snapshot.gpu_hours is not None:
            yield printable(snapshot.unit), Text(_hours(snapshot.gpu_hours))
        if snapshot.cost is not None:
            yield "cost", Text(f"{snapshot.cost:,.2f}")


def overview(status: dict[str, Any], pace_now: float | None) -> Group:
    """Return the view of `status` on a terminal: the last run as `run` itself shows it, then the whole output.

    Args:
        status: Status as `read_status` returns it.
        pace_now: Requests per second since the last reading, or None for the first one.
    """
    snapshot = snapshot_of(status["run"])
    if snapshot is None:
        return Group(status_text(status, pace_now))
    is_silent = status["run"]["state"] == "running" and status["lease"]["state"] != "held"
    heading = Text(f"all of {printable(status['output'])}", "bold", overflow="fold")
    return Group(Frame(snapshot, "silent" if is_silent else None), Text(), heading, status_text(status, pace_now))


def snapshot_of(run: dict[str, Any] | None) -> ProgressSnapshot | None:
    """Return the last progress that a run has written, or None if it has none in the form of this version."""
    try:
        return ProgressSnapshot.model_validate((run or {}).get("progress"))
    except ValidationError:
        return None


def status_text(status: dict[str, Any], pace_now: float | None) -> Text:
    """Return the status of a whole output, one fact per line; the arguments are those of `overview`."""
    facts = [("succeeded", str(status["succeeded"])), ("failed", str(status["failed"]))]
    facts += [("", f"{kind}  {count}") for kind, count in status["failures"].items()]
    if status["needs_regeneration"]:
        note = "(removed by `verify --repair`; the next run generates them again)"
        facts.append(("regenerate", f"{status['needs_regeneration']}  {note}"))
    if pace_now is not None:
        facts.append(("pace", f"{pace_now:.2f} requests/s since the last reading"))
    facts += [("last run", _last_run(status["run"])), ("published", status["published"] or "nothing yet")]
    facts.append(("lease", _lease(status["lease"])))
    lines = [
        Text.assemble((f"{name:9}" if name else "", "dim"), f"  {printable(value)}", overflow="fold")
        for name, value in facts
    ]
    return Text("\n", overflow="fold").join(lines)


def _last_run(run: dict[str, Any] | None) -> str:
    if run is None:
        return "none"
    words = "" if run["finished"] else f", {run['pending']} pending then, not finished"
    return f"{run['run_id']}  started {run['started_at']}{words}"


def _lease(lease: dict[str, Any]) -> str:
    if lease["state"] == "free":
        return "free"
    since = f" since {lease['since']}" if lease["since"] else ""
    words = "renewed" if lease["state"] == "held" else "SILENT: the next run takes over; last renewed"
    return f"{lease['run_id']} on {lease['host']}{since}, {words} {lease['silent_s']:.0f} s ago"


def line(snapshot: ProgressSnapshot) -> str:
    """Return the progress as `key=value` for a log, in a fixed order, without unknown values."""
    recent = snapshot.recent_busy if snapshot.phase in _RUNNING else None
    busy = snapshot.busy if recent is None else recent
    fields = {
        "run_id": snapshot.run_id or None,
        "phase": snapshot.phase,
        "done": snapshot.done,
        "failed": snapshot.failed,
        "total": snapshot.total,
        "clips_per_second": pace(snapshot.clips_per_second),
        "seconds_left": None if snapshot.seconds_left is None else f"{snapshot.seconds_left:.0f}",
        "engines": snapshot.engines,
        "busy": None if busy is None else f"{busy:.2f}",
        "gpu_hours": None if snapshot.gpu_hours is None else f"{snapshot.gpu_hours:.4f}",
        "cost": None if snapshot.cost is None else f"{snapshot.cost:.2f}",
        "newest": snapshot.newest,
    }
    return " ".join(f"{name}={printable(str(value))}" for name, value in fields.items() if value is not None)


def pace(clips_per_second: float) -> str:
    """Return animations per second with three digits."""
    return f"{clips_per_second:.0f}" if clips_per_second >= 1000 else f"{clips_per_second:.3g}"  # noqa: PLR2004 - else 1e+03


def clock(seconds: float) -> str:
    """Return seconds as a clock shows them: `0:07`, `12:41`, `3:05:12`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(done: int, failed: int, total: int, width: int, *, ascii_only: bool) -> Text:
    """Return the bar: done requests, failed ones in red, and the rest as a thinner line, readable without colours."""
    cells = math.floor(width * _share(done, total))
    red = min(cells, math.ceil(width * failed / total)) if failed and total else 0
    thick, thin = ("=", "-") if ascii_only else ("\u2501", "\u2500")
    return Text.assemble((thick * (cells - red), "green"), (thick * red, "red"), (thin * (width - cells), "dim"))


def _share(part: int, whole: int) -> float:
    return min(1.0, part / whole) if whole else 1.0


def _aligned(facts: Facts) -> Table:
    """Return a table of labels and values, one pair per line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for label, value in facts:
        table.add_row(Text(label, "red" if label.startswith(" ") else "dim"), value)
    return table


def _newest(uri: str) -> Text:
    """Return the URI of the newest animation, as a link where a terminal can open it."""
    shown = Text(printable(uri), overflow="fold")
    if _LINKED.fullmatch(uri):
        shown.stylize(Style(link=uri))
    return Text.assemble(("newest  ", "dim"), shown, overflow="fold")


def _now_and_overall(now: float | None, whole: float, shown: Callable[[float], str]) -> Text:
    """Return the recent figure followed by the overall one, or only the overall one."""
    if now is None:
        return Text(shown(whole))
    return Text.assemble(shown(now), (f"  {shown(whole)} overall", "dim"))


def _clipped(kind: str) -> str:
    return kind if len(kind) <= _KIND_LENGTH else f"{kind[: _KIND_LENGTH - 3]}..."


def _percent(share: float) -> str:
    """Return a share in whole percent; 100 % only for the whole."""
    return f"{min(round(share * 100), 99 if share < 1 else 100)} %"


def _hours(hours: float) -> str:
    """Return hours with three digits."""
    if 0 < hours < _FEWEST_HOURS:
        return f"under {_FEWEST_HOURS}"
    return f"{hours:,.3g}" if hours < 1000 else f"{hours:,.0f}"  # noqa: PLR2004 - else 1e+03
