"""The view of a running run: the frame, the line, and the terminal around them."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pia_batch.cli import view
from pia_batch.cli.console import shown_progress
from pia_batch.config import RunConfig
from pia_batch.driver.progress import Progress
from pia_batch.errors import InterruptedRunError
from pia_batch.pipeline.attempts import EngineActivity, OutcomeCounts
from pia_batch.schema.run_record import Phase, ProgressSnapshot

HALF_DONE = ProgressSnapshot(
    run_id="nightly-2026-11-22",
    phase="generating",
    at=datetime(2026, 11, 22, 23, 12, tzinfo=UTC),
    seconds=12741.3,
    total=100_000,
    done=62_310,
    done_before=10_000,
    succeeded=51_874,
    failed=436,
    failures={"image_unavailable": 401, "non_finite": 30, "timeout": 5},
    clips_per_second=4.071,
    recent_clips_per_second=4.36,
    seconds_left=8643.0,
    engines=4,
    engines_starting=1,
    busy=0.911,
    recent_busy=0.964,
    unit="GPU hours",
    gpu_hours=14.16,
    cost=35.26,
    newest="s3://clips/out/animations/4f/4f3a9c0de1b25f60718293a4b5c6d7e8.mp4",
)
PICTURE = Path(__file__).parents[2] / "docs" / "live-view.svg"
WIDTHS = [40, 50, 60, 80, 96, 120, 200]


def terminal(width: int, **options: Any) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, width=width, height=40, force_terminal=True, legacy_windows=False, **options), written


def rendered(shown: Any, width: int, *, styled: bool = False) -> str:
    console, written = terminal(width, color_system="truecolor" if styled else None)
    console.print(shown)
    return written.getvalue()


def test_a_frame_has_every_figure_of_a_run() -> None:
    lines = [line.rstrip() for line in rendered(view.Frame(HALF_DONE), 80).splitlines()]
    assert (
        "\n".join(lines)
        == """\
nightly-2026-11-22                                           generating  3:32:21
━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━─────────────────────  62 %  62,310 of 100,000

succeeded            51,874              clips/s    4.36  4.07 overall
failed                  436              time left  2 h 24 min
  image_unavailable     401              engines    4 (1 starting)
  non_finite             30              GPU busy   96 %  91 % overall
  timeout                 5              GPU hours  14.2
before this run      10,000              cost       35.26
newest  s3://clips/out/animations/4f/4f3a9c0de1b25f60718293a4b5c6d7e8.mp4"""
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_frame_is_aligned_and_fits_at_every_width(width: int) -> None:
    lines = rendered(view.Frame(HALF_DONE), width).splitlines()

    assert all(cell_len(line.rstrip()) <= min(width, view.MAX_WIDTH) for line in lines)
    assert lines[0].rstrip().endswith("generating  3:32:21")
    text = " ".join("\n".join(lines).split())
    for figure in ("62 % 62,310 of 100,000", "51,874", "436", "image_unavailable 401", "non_finite 30", "10,000"):
        assert figure in text
    for figure in ("4.36 4.07 overall", "2 h 24 min", "4 (1 starting)", "96 % 91 % overall", "14.2", "35.26"):
        assert figure in text
    counts = [re.search(rf"{label} +[\d,]+", line) for label in ("succeeded", "failed", "timeout") for line in lines]
    assert len({found.end() for found in counts if found}) == 1  # numbers end below each other
    assert "".join("".join(lines).split()).endswith(HALF_DONE.newest or "")
    assert len(lines) <= 20


def test_a_run_that_is_over_shows_overall_figures() -> None:
    text = rendered(view.Frame(HALF_DONE.model_copy(update={"phase": "finished", "done": 100_000})), 120)

    assert "finished  3:32:21" in text
    assert "100 %  100,000 of 100,000" in text
    assert re.search("clips/s +4.07", text)
    assert re.search("GPU busy +91 %", text)
    for past in ("overall", "time left", "engines"):
        assert past not in text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("changes", "bar", "words"),
    [
        ({"total": 0, "done": 0}, "100 %  0 of 0", "succeeded  0"),
        ({"total": None, "done": 7, "succeeded": 7}, "7 requests done", "succeeded  7"),
        ({"total": 9, "done": 9, "failed": 9, "failures": {"timeout": 9}, "phase": "finished"}, "9 of 9", "timeout  9"),
        (
            {"total": 10**9, "done": 10**9 - 1, "succeeded": 10**9 - 1},
            "99 %  999,999,999 of 1,000,000,000",
            "not known",
        ),
    ],
)
def test_runs_at_the_edge_have_a_frame_too(changes: dict[str, Any], bar: str, words: str, width: int) -> None:
    text = rendered(view.Frame(ProgressSnapshot(at=HALF_DONE.at, run_id="r", **changes)), width)

    assert bar in text
    assert words in text
    assert all(cell_len(line.rstrip()) <= width for line in text.splitlines())


def test_the_bar_distinguishes_failures_from_successes() -> None:
    half = ProgressSnapshot(at=HALF_DONE.at, total=100, done=50, succeeded=40, failed=10, failures={"timeout": 10})
    bar = rendered(view.Frame(half), 80, styled=True).splitlines()[1]

    green, red = re.findall(r"\x1b\[3([21])m(━+)", bar)
    assert (green[0], red[0]) == ("2", "1")
    assert len(green[1]) == pytest.approx(4 * len(red[1]), abs=4)
    one = half.model_copy(update={"succeeded": 49, "failed": 1, "total": 100_000, "done": 60_000})
    assert "\x1b[31m━\x1b" in rendered(view.Frame(one), 80, styled=True)  # the smallest share is seen


def test_many_error_kinds_are_summed_up() -> None:
    kinds = {f"kind_{k}": 20 - k for k in range(19)}
    text = rendered(view.Frame(HALF_DONE.model_copy(update={"failures": kinds, "failed": sum(kinds.values())})), 80)

    assert "kind_4" in text
    assert "kind_5" not in text
    assert re.search(r"14 more kinds +119", text)


def test_a_terminal_without_unicode_gets_a_bar_too() -> None:
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=written, width=80, force_terminal=True, legacy_windows=False).print(view.Frame(HALF_DONE))
    written.flush()

    assert b"==========" in written.buffer.getvalue()


# --- untrusted text ------------------------------------------------------------------------------------------------

ESCAPES = "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\ \x1b[2J \x07 \x9b31m \u202e \r\n\t [red]no[/red] [link=http://x]y[/]"
HOSTILE = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from([ESCAPES, "[/]", "[bold", "\\[red]"])
SAFE = re.compile(r"\x1b\[[\d;]*m|\x1b\]8;[^\x1b\x07]*\x1b\\")
"""Escape sequences of rich itself: colours and links."""


def is_harmless(written: str) -> bool:
    """Return True if the output is only text, colours and line ends."""
    return all(character.isprintable() or character == "\n" for character in SAFE.sub("", written))


@given(HOSTILE, HOSTILE, HOSTILE, st.sampled_from(WIDTHS))
@example(ESCAPES, ESCAPES, ESCAPES, 80)
@example("night", "timeout", "file:///out/\x1b]0;pwned\x07.mp4", 80)
def test_no_text_of_a_run_is_a_command_to_the_terminal(run_id: str, kind: str, newest: str, width: int) -> None:
    seen = HALF_DONE.model_copy(update={"run_id": run_id, "failures": {kind: 3}, "newest": newest})

    written = rendered(view.Frame(seen), width, styled=True)

    assert is_harmless(written)
    links = re.findall(r"\x1b\]8;[^;]*;([^\x1b]+)\x1b", written)
    assert set(links) <= {newest}
    assert "\n" not in view.line(seen)
    assert is_harmless(view.line(seen))


def test_markup_is_shown_as_it_is_written() -> None:
    seen = HALF_DONE.model_copy(
        update={"run_id": "[red]x[/]", "failures": {"[bold]k": 3}, "newest": "s3://b/[link=u]z"}
    )
    text = rendered(view.Frame(seen), 120)

    for word in ("[red]x[/]", "[bold]k", "s3://b/[link=u]z"):
        assert word in text


@pytest.mark.parametrize(
    ("uri", "linked"),
    [
        ("file:///data/out/animations/4f/4f3a.mp4", True),
        ("https://store.example/4f3a.mp4", True),
        ("s3://clips/4f3a.mp4", False),
        ("file:///data/\x1b\\\x1b]8;;http://evil/4f3a.mp4", False),
        ("javascript:alert(1)", False),
    ],
)
def test_the_newest_animation_is_a_link_where_a_terminal_can_open_it(uri: str, linked: bool) -> None:
    written = rendered(view.Frame(HALF_DONE.model_copy(update={"newest": uri})), 120, styled=True)
    assert (re.search(rf"\x1b\]8;[^;]*;{re.escape(uri)}\x1b\\", written) is not None) == linked


STATUS = {
    "output": "s3://clips/out",
    "succeeded": 61_874,
    "failed": 436,
    "failures": {"image_unavailable": 436},
    "needs_regeneration": 0,
    "published": None,
    "run": {
        "run_id": "night", "started_at": "2026-11-22T20:00:00+00:00", "pending": 90_000, "rejected": 0,
        "state": "running", "finished": False, "progress": HALF_DONE.model_dump(mode="json"),
    },
    "lease": {"state": "held", "run_id": "night", "host": "gpu-7", "since": "2026-11-22T20:00:00", "silent_s": 3.0},
}  # fmt: skip


def test_status_shows_the_frame_that_the_run_shows() -> None:
    text = rendered(view.overview(STATUS, 4.2), 120)

    assert text.startswith(rendered(view.Frame(HALF_DONE), 120))
    assert (
        "all of s3://clips/out\nsucceeded  61874\nfailed     436\n  image_unavailable  436\npace       4.20 requests/s"
        in text
    )
    assert "lease      night on gpu-7 since 2026-11-22T20:00:00, renewed 3 s ago" in text


def test_status_shows_a_run_that_fell_silent() -> None:
    gone = STATUS | {"lease": STATUS["lease"] | {"state": "silent", "silent_s": 900.0}}
    text = rendered(view.overview(gone, None), 120)

    assert "silent  3:32:21" in text
    assert "time left" not in text


@pytest.mark.parametrize("progress", [None, {}, {"done": "many"}, "half", [1], {"at": "now", "total": -1.5}])
def test_status_does_without_what_another_version_wrote(progress: Any) -> None:
    status = STATUS | {"run": STATUS["run"] | {"progress": progress}}

    assert rendered(view.overview(status, None), 80).startswith("succeeded  61874")


@given(HOSTILE, HOSTILE)
@example(ESCAPES, ESCAPES)
def test_no_text_of_an_output_is_a_command_to_the_terminal(run_id: str, host: str) -> None:
    run = STATUS["run"] | {"run_id": run_id, "progress": HALF_DONE.model_dump(mode="json") | {"run_id": run_id}}
    status = STATUS | {"run": run, "lease": STATUS["lease"] | {"host": host}, "failures": {host: 1}}

    assert is_harmless(rendered(view.overview(status, None), 80, styled=True))


# --- the line -------------------------------------------------------------------------------------------------------


def test_a_line_has_key_and_value_and_leaves_out_what_is_not_known() -> None:
    assert view.line(HALF_DONE) == (
        "run_id=nightly-2026-11-22 phase=generating done=62310 failed=436 total=100000 clips_per_second=4.07 "
        "seconds_left=8643 engines=4 busy=0.96 gpu_hours=14.1600 cost=35.26 "
        "newest=s3://clips/out/animations/4f/4f3a9c0de1b25f60718293a4b5c6d7e8.mp4"
    )
    assert view.line(ProgressSnapshot(at=HALF_DONE.at)) == "phase=starting done=0 failed=0 clips_per_second=0"


@pytest.mark.parametrize(
    ("hours", "shown"), [(0.0, "0"), (6.9e-05, "under 0.01"), (0.0123, "0.0123"), (14.16, "14.2"), (12345.6, "12,346")]
)
def test_hours_are_never_in_scientific_notation(hours: float, shown: str) -> None:
    frame = rendered(view.Frame(HALF_DONE.model_copy(update={"gpu_hours": hours})), 80)

    assert re.search(f"GPU hours +{shown}\\s", frame)


@pytest.mark.parametrize(("phase", "busy"), [("generating", "0.96"), ("publishing", "0.91"), ("finished", "0.91")])
def test_a_line_shows_the_last_minute_while_engines_work_and_the_whole_run_later(phase: Phase, busy: str) -> None:
    assert f" busy={busy} " in view.line(HALF_DONE.model_copy(update={"phase": phase}))


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (view.pace(0.01234), "0.0123"), (view.pace(4.0), "4"), (view.pace(123.4), "123"), (view.pace(12345.6), "12346"),
        (view.clock(7.9), "0:07"), (view.clock(761), "12:41"), (view.clock(11_112), "3:05:12"),
    ],
)  # fmt: skip
def test_figures_are_short(shown: str, text: str) -> None:
    assert shown == text


# --- what stands around it ------------------------------------------------------------------------------------------


@pytest.fixture
def progress() -> Progress:
    config = RunConfig.load(None, {"manifest": "m", "output": "o", "budget.price_per_hour": 2.5})
    return Progress(config, "night", total=12, done_before=2)


@pytest.fixture
def log() -> Iterator[logging.Handler]:
    """The log of a command line, on standard error."""
    handler, root = logging.StreamHandler(sys.stderr), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)


def screen(written: str) -> list[str]:
    """Return the lines on a terminal after `written`, as far as rich's live display moves its cursor."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\x1b\]8;[^\x1b]*\x1b\\|\r|\n|[^\x1b\r\n]+", written):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece == "\r" or piece.startswith("\x1b"):
            pass  # every line is erased before it is written again
        else:
            lines[row] += piece
    return [line.rstrip() for line in lines]


def test_the_last_frame_stays_and_log_lines_stand_above_it(progress: Progress, log: logging.Handler) -> None:
    console, written = terminal(80)
    stream = log.stream

    with shown_progress(console=console) as show:
        show(progress)
        written.write("RAY WAS HERE\n")  # from below Python, past everything
        progress.enter("generating")
        logging.getLogger("pia_batch").warning("something happened key=1 \x1b[2Jgone")
        show(progress)
        tally = OutcomeCounts(9, Counter({"timeout": 1}), "file:///out/x.mp4")
        progress.update(
            EngineActivity(
                engines=1, engine_seconds=3600.0, reported_seconds=3600.0, generating_seconds=1800.0, outcomes=tally
            )
        )
        progress.enter("finished")
        show(progress)

    shown = screen(written.getvalue())
    assert shown[:3] == ["starting Ray", "RAY WAS HERE", "WARNING something happened key=1 \\x1b[2Jgone"]
    assert log.stream is stream
    assert shown[3].startswith("night  ")
    assert shown[3].endswith("finished  0:00")
    text = "\n".join(shown)
    for word in ("100 %  12 of 12", "timeout", "cost", "2.50", "file:///out/x.mp4"):
        assert text.count(word) == 1
    assert "planning" not in text


def test_a_run_that_is_stopped_leaves_a_frame_that_says_so(progress: Progress) -> None:
    console, written = terminal(80)

    def run() -> None:
        with shown_progress(console=console) as show:
            progress.enter("generating")
            show(progress)
            raise InterruptedRunError("somebody asked")

    with pytest.raises(InterruptedRunError):
        run()
    assert screen(written.getvalue())[0].endswith("stopped  0:00")


def test_where_nothing_is_to_be_done_nothing_stays() -> None:
    console, written = terminal(80)

    with shown_progress(console=console):
        pass

    assert "".join(screen(written.getvalue())) == ""


def test_elsewhere_each_phase_and_the_time_between_has_a_line(
    progress: Progress, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pia_batch.driver.progress")

    with shown_progress(console=Console(file=io.StringIO())) as show:
        for _ in range(5):
            show(progress)
        progress.update(EngineActivity(outcomes=OutcomeCounts(10, newest="s3://clips/x.mp4")))
        progress.enter("publishing")
        for _ in range(5):
            show(progress)

    first, second = [record.getMessage() for record in caplog.records]
    assert first == "progress run_id=night phase=starting done=2 failed=0 total=12 clips_per_second=0"
    assert second.startswith("progress run_id=night phase=publishing done=12 failed=0 total=12 clips_per_second=")
    assert second.endswith("newest=s3://clips/x.mp4")


def test_programs_get_one_object_a_line(progress: Progress) -> None:
    written = io.StringIO()
    failures = Counter({"[red]\x1b[2J\nkind": 1})
    progress.update(EngineActivity(outcomes=OutcomeCounts(3, failures, f"s3://clips/{'x' * 200}.mp4")))

    with shown_progress(as_json=True, console=Console(file=written, width=40)) as show:
        show(progress)
        show(progress)
        progress.enter("finished")
        show(progress)

    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [(line.pop("event"), line["phase"]) for line in lines] == [
        ("progress", "starting"),
        ("progress", "finished"),
    ]
    assert ProgressSnapshot.model_validate(lines[1]) == progress.snapshot()


# --- the picture in the documentation -------------------------------------------------------------------------------


def picture() -> str:
    """Return the frame of a run that is half done, as SVG that loads no font."""
    console = Console(record=True, width=90, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(
        "$ pia-batch run nightly.yaml --run-date 2026-11-22 --price-per-hour 2.49", markup=False, highlight=False
    )
    console.print("2026-11-22 19:40:02,113 INFO run_planned run_id=nightly-2026-11-22 requests=100000", highlight=False)
    console.print(view.Frame(HALF_DONE))
    svg = console.export_svg(title="pia-batch run", unique_id="view")
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def test_the_picture_in_the_documentation_is_the_frame() -> None:
    shown = PICTURE.read_text(encoding="utf-8")

    assert words_of(shown) == words_of(picture()), f"render it again: python tests/cli/test_view.py {PICTURE}"
    assert "url(" not in re.sub(r"url\(#", "", shown)


def words_of(svg: str) -> list[str]:
    return [unescape(text).replace("\N{NO-BREAK SPACE}", " ") for text in re.findall(r"<text [^>]*>(.*?)</text>", svg)]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
