"""How far a run is, for people: a frame on a terminal, a line of `key=value` elsewhere. `run` and `status` share them.

What a store says of a run is the text of strangers: no character of it is markup, or a command to the terminal.
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
"""Columns that a frame takes at most: a wider bar tells no more."""

_THREE_GROUPS, _TWO_GROUPS = 96, 60
"""So many columns are needed to have as many groups of figures beside each other."""

_SHORTEST_BAR = 8

_SHOWN_KINDS = 6
"""Error kinds that a frame has room for."""

_KIND_LENGTH = 24
"""Characters of an error kind that are shown; ours are shorter."""

_LINKED = re.compile(r"(?:file|https?)://[!-~]+")
"""What a terminal can open, in characters that end no escape sequence."""

_PHASE_STYLES = {"finished": "bold green", "stopped": "bold yellow", "silent": "bold red"}

Facts = list[tuple[str, Text]]
"""Labels and values, a line each."""


class Frame:
    """A run at one moment, as wide as the terminal is when it is drawn.

    Args:
        seen: the run.
        phase: what to call its phase instead, where somebody knows better than the run did.
    """

    def __init__(self, seen: ProgressSnapshot, phase: str | None = None) -> None:
        self._seen, self._phase = seen, phase or seen.phase
        self._goes_on = self._phase in ("starting", "generating")

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
        if self._seen.newest is not None:
            yield _newest(self._seen.newest)

    def _head(self, width: int, *, ascii_only: bool) -> Iterator[RenderableType]:
        """Which run, what it does, and how much of it is done."""
        seen = self._seen
        title = Table.grid(expand=True, padding=(0, 2))
        title.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        title.add_column(justify="right", no_wrap=True)
        style = _PHASE_STYLES.get(self._phase, "bold cyan")
        title.add_row(
            Text(printable(seen.run_id), "bold"), Text.assemble((self._phase, style), f"  {clock(seen.seconds)}")
        )
        title.width = width
        yield title
        if seen.total is None:
            yield Text(f"{seen.done:,} requests done")
            return
        told = f"{_percent(_share(seen.done, seen.total))}  {seen.done:,} of {seen.total:,}"
        room = width - len(told) - 2
        bar = _bar(seen.done, seen.failed, seen.total, room, ascii_only=ascii_only)
        yield Text.assemble(bar, "  ", told) if room >= _SHORTEST_BAR else Text(told)

    def _requests(self) -> Iterator[tuple[str, Text]]:
        seen = self._seen
        numbers = [seen.succeeded, seen.failed, seen.done_before, *seen.failures.values()]
        width = max(len(f"{number:,}") for number in numbers)

        def right(number: int, style: str = "") -> Text:
            return Text(f"{number:>{width},}", style)

        yield "succeeded", right(seen.succeeded, "green" if seen.succeeded else "")
        yield "failed", right(seen.failed, "bold red" if seen.failed else "")
        kinds = list(seen.failures.items())
        shown = kinds if len(kinds) <= _SHOWN_KINDS else kinds[: _SHOWN_KINDS - 1]
        for kind, count in shown:
            yield f"  {_clipped(printable(kind))}", right(count, "red")
        if len(kinds) > len(shown):
            rest = kinds[len(shown) :]
            yield f"  {len(rest)} more kinds", right(sum(count for _, count in rest), "red")
        if seen.done_before:
            yield "before this run", right(seen.done_before)

    def _pace(self) -> Iterator[tuple[str, Text]]:
        seen = self._seen
        recent = seen.recent_clips_per_second if self._goes_on else None
        yield "clips/s", _now_and_overall(recent, seen.clips_per_second, pace)
        if self._goes_on:
            yield (
                "time left",
                Text(
                    "not known yet"
                    if seen.seconds_left is None
                    else duration(seen.seconds_left).replace("\N{NO-BREAK SPACE}", " ")
                ),
            )

    def _engines(self) -> Iterator[tuple[str, Text]]:
        seen = self._seen
        if self._goes_on and seen.engines is not None:
            starting = f" ({seen.engines_starting} starting)" if seen.engines_starting else ""
            yield "engines", Text(f"{seen.engines}{starting}")
        if seen.busy is not None:
            label = "GPU busy" if seen.unit.startswith("GPU") else "busy"
            yield label, _now_and_overall(seen.recent_busy if self._goes_on else None, seen.busy, _percent)
        if seen.gpu_hours is not None:
            yield printable(seen.unit), Text(_hours(seen.gpu_hours))
        if seen.cost is not None:
            yield "cost", Text(f"{seen.cost:,.2f}")


def overview(told: dict[str, Any], pace_now: float | None) -> Group:
    """What `status` tells, on a terminal: the last run as `run` itself shows it, then the whole output.

    Args:
        told: as from `read_status`.
        pace_now: requests a second since the last look; None: there was none.
    """
    seen = snapshot_of(told["run"])
    if seen is None:
        return Group(status_text(told, pace_now))
    gone_on = told["run"]["state"] == "running" and told["lease"]["state"] != "held"
    heading = Text(f"all of {printable(told['output'])}", "bold", overflow="fold")
    return Group(Frame(seen, "silent" if gone_on else None), Text(), heading, status_text(told, pace_now))


def snapshot_of(run: dict[str, Any] | None) -> ProgressSnapshot | None:
    """How far a run was when it last told; None: it did not tell, or another version of this package did."""
    try:
        return ProgressSnapshot.model_validate((run or {}).get("progress"))
    except ValidationError:
        return None


def status_text(told: dict[str, Any], pace_now: float | None) -> Text:
    """What `status` tells of a whole output, a fact a line; arguments as of `overview`."""
    facts = [("succeeded", str(told["succeeded"])), ("failed", str(told["failed"]))]
    facts += [("", f"{kind}  {count}") for kind, count in told["failures"].items()]
    if told["needs_regeneration"]:
        note = "(removed by `verify --repair`; the next run generates them again)"
        facts.append(("regenerate", f"{told['needs_regeneration']}  {note}"))
    if pace_now is not None:
        facts.append(("pace", f"{pace_now:.2f} requests/s since the last look"))
    facts += [("last run", _last_run(told["run"])), ("published", told["published"] or "nothing yet")]
    facts.append(("lease", _lease(told["lease"])))
    lines = [
        Text.assemble((f"{name:9}" if name else "", "dim"), f"  {printable(value)}", overflow="fold")
        for name, value in facts
    ]
    return Text("\n", overflow="fold").join(lines)


def _last_run(begun: dict[str, Any] | None) -> str:
    if begun is None:
        return "none"
    words = "" if begun["finished"] else f", {begun['pending']} to draw then, not finished"
    return f"{begun['run_id']}  started {begun['started_at']}{words}"


def _lease(told: dict[str, Any]) -> str:
    if told["state"] == "free":
        return "free"
    since = f" since {told['since']}" if told["since"] else ""
    words = "renewed" if told["state"] == "held" else "SILENT: the next run takes over; last renewed"
    return f"{told['run_id']} on {told['host']}{since}, {words} {told['silent_s']:.0f} s ago"


def line(seen: ProgressSnapshot) -> str:
    """The same for a log: `key=value` in a fixed order, without what is not known."""
    busy = seen.busy if seen.recent_busy is None else seen.recent_busy
    told = {
        "run_id": seen.run_id or None,
        "phase": seen.phase,
        "done": seen.done,
        "failed": seen.failed,
        "total": seen.total,
        "clips_per_second": pace(seen.clips_per_second),
        "seconds_left": None if seen.seconds_left is None else f"{seen.seconds_left:.0f}",
        "engines": seen.engines,
        "busy": None if busy is None else f"{busy:.2f}",
        "gpu_hours": None if seen.gpu_hours is None else f"{seen.gpu_hours:.4f}",
        "cost": None if seen.cost is None else f"{seen.cost:.2f}",
        "newest": seen.newest,
    }
    return " ".join(f"{name}={printable(str(value))}" for name, value in told.items() if value is not None)


def pace(clips_per_second: float) -> str:
    """Animations a second in three digits."""
    return f"{clips_per_second:.0f}" if clips_per_second >= 1000 else f"{clips_per_second:.3g}"  # noqa: PLR2004 - else 1e+03


def clock(seconds: float) -> str:
    """Seconds as a clock shows them: `0:07`, `12:41`, `3:05:12`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(done: int, failed: int, total: int, width: int, *, ascii_only: bool) -> Text:
    """What is done of all, what of it failed in red, and what is left in a thinner line: it is read without colours."""
    cells = math.floor(width * _share(done, total))
    red = min(cells, math.ceil(width * failed / total)) if failed and total else 0
    thick, thin = (
        ("=", "-") if ascii_only else ("\N{BOX DRAWINGS HEAVY HORIZONTAL}", "\N{BOX DRAWINGS LIGHT HORIZONTAL}")
    )
    return Text.assemble((thick * (cells - red), "green"), (thick * red, "red"), (thin * (width - cells), "dim"))


def _share(part: int, whole: int) -> float:
    return min(1.0, part / whole) if whole else 1.0


def _aligned(facts: Facts) -> Table:
    """Labels and values below each other."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for label, value in facts:
        table.add_row(Text(label, "red" if label.startswith(" ") else "dim"), value)
    return table


def _newest(uri: str) -> Text:
    """The newest animation; terminals that can open it do so by a click."""
    shown = Text(printable(uri), overflow="fold")
    if _LINKED.fullmatch(uri):
        shown.stylize(Style(link=uri))
    return Text.assemble(("newest  ", "dim"), shown, overflow="fold")


def _now_and_overall(now: float | None, whole: float, shown: Callable[[float], str]) -> Text:
    """A figure of the recent time with that of all of it, or that alone."""
    if now is None:
        return Text(shown(whole))
    return Text.assemble(shown(now), (f"  {shown(whole)} overall", "dim"))


def _clipped(kind: str) -> str:
    return kind if len(kind) <= _KIND_LENGTH else f"{kind[: _KIND_LENGTH - 3]}..."


def _percent(share: float) -> str:
    """A share in whole percent; 100 % only for all of it."""
    return f"{min(round(share * 100), 99 if share < 1 else 100)} %"


def _hours(hours: float) -> str:
    return f"{hours:,.3g}" if hours < 1000 else f"{hours:,.0f}"  # noqa: PLR2004 - else 1e+03
