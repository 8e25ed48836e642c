"""`run` and `retry` with dates, backfills, budgets, JSON and notifications. Only the slow tests generate."""

from __future__ import annotations

import json
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import png, requests_table

from pia_batch import cli
from pia_batch.config import RunConfig
from pia_batch.journal import layout
from pia_batch.journal.lease import Lease
from pia_batch.journal.log import Journal
from pia_batch.journal.results import read_success_marker
from pia_batch.planning.plan import make_plan
from pia_batch.schema.columns import results_table
from pia_batch.storage.object_store import Store

DAYS = ["2026-11-16", "2026-11-17", "2026-11-18"]


def pia_batch(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


@pytest.fixture
def week(tmp_path: Path) -> Path:
    """A config over three days of two requests each; each of them with an output of its own."""
    for number, day in enumerate(DAYS):
        folder = tmp_path / "in" / f"dt={day}"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(png(number))
        pq.write_table(requests_table(2, image=["0.png"] * 2), folder / "rows.parquet")
    (tmp_path / "week.yaml").write_text(
        f"manifest: {tmp_path}/in/dt={{date}}\noutput: {tmp_path}/out/{{date}}\nlimits: {{lease_ttl_s: 3}}\n"
    )
    return tmp_path / "week.yaml"


def commit_day(path: Path, day: str, **settings: Any) -> None:
    """Commit the results that engines would commit for one day."""
    config = RunConfig.load(path, {"run_date": day, **settings}).filled()
    plan = make_plan(config)
    store = Store(config.output)
    pending = plan.wanted if plan.selected is None else plan.selected
    keys = [f"{high:016x}{low:016x}" for high, low in zip(pending.high.tolist(), pending.low.tolist(), strict=True)]
    for key in keys:
        store.replace(layout.animation_name(key, "mp4"), b"x")
    rows: dict[str, Any] = {
        "request_id": pa.array(keys, pa.string()),
        "key": pa.array(keys, pa.string()),
        "status": pa.scalar("succeeded"),
        "animation_uri": pa.array([store.uri_of(layout.animation_name(key, "mp4")) for key in keys]),
        "num_bytes": pa.scalar(1),
        "format": pa.scalar("mp4"),
    }
    Journal(store).append(results_table(rows, pa.table({}), len(keys)))


def written(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_committed_date_is_published_under_its_name_and_then_is_a_no_op(
    week: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_day(week, DAYS[0])

    assert pia_batch("run", str(week), "--run-date", DAYS[0]) == 0
    assert "2 requests: 2 succeeded, 0 failed" in capsys.readouterr().out
    before = written(week.parent / "out")
    assert pia_batch("run", str(week), "--run-date", DAYS[0], "--json") == 0

    payload = json.loads(capsys.readouterr().out)
    assert (payload["run_id"], payload["run_date"], payload["state"], payload["exit_code"]) == (
        DAYS[0],
        DAYS[0],
        "finished",
        0,
    )
    assert (payload["summary"]["succeeded"], payload["summary"]["computed"], payload["computed"]) == (2, 0, 0)
    assert "config" not in payload
    assert written(week.parent / "out") == before


def test_dates_that_share_an_output_are_no_ops_each_and_late_rows_make_another_run(
    week: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--output", f"{week.parent}/shared"]
    for day in DAYS[:2]:
        commit_day(week, day, output=f"{week.parent}/shared")
        assert pia_batch("run", str(week), *shared, "--run-date", day) == 0
    before = written(week.parent / "shared")
    for day in DAYS[:2]:
        assert pia_batch("run", str(week), *shared, "--run-date", day) == 0
    assert written(week.parent / "shared") == before

    late = week.parent / "in" / f"dt={DAYS[0]}" / "late.parquet"
    pq.write_table(requests_table(1, request_id=["late"], image=["0.png"]), late)
    commit_day(week, DAYS[0], output=f"{week.parent}/shared")
    capsys.readouterr()
    assert pia_batch("run", str(week), *shared, "--run-date", DAYS[0]) == 0

    assert "3 requests: 3 succeeded" in capsys.readouterr().out
    payload = read_success_marker(Store(f"{week.parent}/shared"), f"{DAYS[0]}-2")
    assert payload is not None
    assert payload["requests"] == 3
    assert pia_batch("run", str(week), *shared, "--run-date", DAYS[0]) == 0
    assert read_success_marker(Store(f"{week.parent}/shared"), f"{DAYS[0]}-3") is None


def test_a_backfill_passes_over_a_hole_and_finished_dates_and_says_so(
    week: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in DAYS:
        commit_day(week, day)
    hole = week.parent / "in" / f"dt={DAYS[1]}"
    hole.rename(week.parent / "elsewhere")
    assert pia_batch("run", str(week), "--run-date", DAYS[0]) == 0
    capsys.readouterr()

    code = pia_batch("run", str(week), "--backfill", f"{DAYS[0]}..{DAYS[2]}")

    printed = capsys.readouterr()
    assert code == 2
    assert f"{DAYS[1]}: manifest" in printed.err
    assert "does not exist" in printed.err
    assert [line for line in printed.out.splitlines() if line in DAYS] == [DAYS[0], DAYS[2]]
    assert read_success_marker(Store(f"{week.parent}/out/{DAYS[2]}"), DAYS[2]) is not None

    (week.parent / "elsewhere").rename(hole)
    assert pia_batch("run", str(week), "--backfill", f"{DAYS[0]}..{DAYS[2]}", "--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert (payload["exit_code"], [run["run_date"] for run in payload["runs"]]) == (0, DAYS)


def test_a_backfill_goes_on_past_an_output_that_is_taken(week: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in DAYS:
        commit_day(week, day)

    with Lease(Store(f"{week.parent}/out/{DAYS[0]}"), "theirs", 3):
        assert pia_batch("run", str(week), "--backfill", f"{DAYS[0]}..{DAYS[1]}") == 75

    assert f"{DAYS[0]}: run theirs" in capsys.readouterr().err
    assert read_success_marker(Store(f"{week.parent}/out/{DAYS[1]}"), DAYS[1]) is not None


def test_a_run_that_waits_plans_again_when_its_turn_comes(
    week: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"{week.parent}/out/{DAYS[0]}")
    held = threading.Event()

    def other_run() -> None:
        with Lease(store, "theirs", 3):
            held.set()
            deadline = time.monotonic() + 60
            while "lease_waiting holder=theirs" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.05)
            commit_day(week, DAYS[0])

    other = threading.Thread(target=other_run)
    other.start()
    held.wait(20)
    code = pia_batch("run", str(week), "--run-date", DAYS[0], "--wait", "--json")
    other.join()

    payload = json.loads(capsys.readouterr().out)
    assert (code, payload["state"], payload["pending"], payload["summary"]["computed"]) == (0, "finished", 0, 0)
    assert payload["timings"]["waiting_s"] > 0.05
    assert "lease_waiting holder=theirs" in caplog.text


def test_a_wait_that_is_too_long_ends_with_75(week: Path) -> None:
    with Lease(Store(f"{week.parent}/out/{DAYS[0]}"), "theirs", 3):
        assert pia_batch("run", str(week), "--run-date", DAYS[0], "--wait-for", "1s") == 75


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--param", "country=de"], "--param: neither manifest nor output nor run_id has {country}; leave it out"),
        (["--param", "country"], "--param country: expected NAME=VALUE, such as country=de"),
        (["--manifest", "in/{shop}"], "manifest: nothing stands for {shop}"),
        (["--run-date", "2999-01-01"], "run_date 2999-01-01 is in the future"),
        (["--run-date", "2026-11-16T05"], "the templates have no {hour}"),
        (["--run-date", DAYS[0], "--backfill", f"{DAYS[0]}..{DAYS[1]}"], "give one of them"),
        (["--backfill", DAYS[0]], "expected FROM..TO"),
        (["--manifest", "m", "--output", "o", "--run-date", DAYS[0]], "neither manifest nor output"),
        (["--wait-for", "soon"], "--wait-for: must be a number with s, m, h or d, such as 12h or 7d (got 'soon')"),
        (["--sample", "200%"], "budget.sample"),
        (["--deadline", "tonight"], "budget.deadline"),
        (["--priority", "price", "--run-date", DAYS[0]], "budget.priority: the manifest has no numeric column"),
    ],
)
def test_an_error_in_dates_or_budgets_ends_with_2_and_writes_nothing(
    week: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert pia_batch("run", str(week), *arguments) == 2
    assert text in capsys.readouterr().err
    assert not (week.parent / "out").exists()


def test_a_parameter_fills_in_what_it_names(week: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = week.parent
    commit_day(week, DAYS[0], output=f"{root}/out/north")

    dated = [str(week), "--run-date", DAYS[0]]
    assert pia_batch("plan", *dated, "--output", f"{root}/{{place}}", "--param", "place=x") == 0
    assert "pending     2" in capsys.readouterr().out
    assert pia_batch("run", *dated, "--output", f"{root}/out/{{p}}", "--param", "p=north") == 0
    assert read_success_marker(Store(f"{root}/out/north"), f"{DAYS[0]}-north") is not None


def test_status_of_a_config_with_a_date_is_that_of_the_last_one(
    week: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yesterday = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    (tmp_path / "in" / f"dt={DAYS[0]}").rename(tmp_path / "in" / f"dt={yesterday}")
    commit_day(week, yesterday)

    assert pia_batch("status", str(week)) == 0
    assert "succeeded  2" in capsys.readouterr().out


def test_every_end_is_notified_and_secrets_stay_where_they_are(
    week: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        f"import json, sys; open({str(tmp_path / 'records')!r}, 'a').write(json.dumps(json.load(sys.stdin)) + chr(10))"
    )
    with week.open("a") as more:
        more.write(f"on_finish:\n  command: [{sys.executable}, -c, {json.dumps(program)}, hunter2]\n")
    commit_day(week, DAYS[0])

    assert pia_batch("run", str(week), "--run-date", DAYS[0]) == 0
    assert pia_batch("run", str(week), "--run-date", "2026-11-01") == 2
    assert pia_batch("run", str(week), "--run-date", DAYS[0], "--set", "on_finish.on=[failure]") == 0

    payload = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert [(one["run_date"], one["state"], one["exit_code"]) for one in payload] == [
        (DAYS[0], "finished", 0),
        ("2026-11-01", "stopped", 2),
    ]
    assert "does not exist" in payload[1]["message"]
    whole = (tmp_path / "out" / DAYS[0] / "_runs" / DAYS[0] / "run.json").read_text()
    assert "hunter2" not in whole + capsys.readouterr().err


def test_a_sample_that_is_processed_ends_with_4_and_publishes_nothing(
    week: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = week.parent / "in" / f"dt={DAYS[0]}"
    pq.write_table(requests_table(40, image=["0.png"] * 40), folder / "rows.parquet")
    commit_day(week, DAYS[0], **{"budget.sample": "30%"})

    assert pia_batch("run", str(week), "--run-date", DAYS[0], "--sample", "30%", "--json") == 4

    payload = json.loads(capsys.readouterr().out)
    assert (payload["state"], payload["reason"], payload["pending"], payload["selected"]) == (
        "stopped",
        "sample",
        payload["summary"]["left"],
        0,
    )
    assert "start again without it, or with a larger one" in payload["message"]
    assert payload["summary"]["results_uri"] is None
    assert not (week.parent / "out" / DAYS[0] / "results").exists()
    assert (
        json.loads((week.parent / "out" / DAYS[0] / "_runs" / DAYS[0] / "run.json").read_text())["reason"] == "sample"
    )


def test_more_failures_than_allowed_stop_a_run_before_it_generates(
    week: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = week.parent / "in" / f"dt={DAYS[0]}"
    table = requests_table(5, image=["0.png"] * 5, motion_scale=pa.array([9, 9, 0, 0, 0]))
    pq.write_table(table, folder / "rows.parquet")

    assert pia_batch("run", str(week), "--run-date", DAYS[0], "--max-failed", "1") == 3

    printed = capsys.readouterr().out
    assert "5 requests: 0 succeeded, 2 failed; 0 computed" in printed
    assert "stopped: 2 requests have failed, more than limits.max_failed allows (1); " in printed
    assert "3 of 5 requests are left" in printed


def test_a_deadline_that_has_passed_generates_nothing(week: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pia_batch("run", str(week), "--run-date", DAYS[0], "--deadline", "2026-11-17T06:00") == 4
    assert "the deadline 2026-11-17T06:00 UTC (budget.deadline) has passed" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "retry"])
def test_every_flag_of_the_group_is_a_flag_of_the_command(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert pia_batch(command, "--help") == 0

    printed = capsys.readouterr().out
    flags = ["--run-date", "--backfill", "--param", "--max-failed", "--max-gpu-hours", "--deadline", "--limit"]
    for flag in [*flags, "--sample", "--priority", "--price-per-hour", "--wait", "--wait-for", "--json", "--set"]:
        assert f"{flag} " in printed


def test_a_signal_between_two_dates_stops_the_rest(
    week: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for day in DAYS:
        commit_day(week, day)
    program = "import os, signal; os.kill(os.getppid(), signal.SIGTERM)"  # as the first date ends
    with week.open("a") as more:
        more.write(f"on_finish:\n  command: [{sys.executable}, -c, {json.dumps(program)}]\n")

    assert pia_batch("run", str(week), "--backfill", f"{DAYS[0]}..{DAYS[2]}") == 4

    assert "committing requests in flight" in capsys.readouterr().err
    assert "dates_skipped=1" in caplog.text
    assert read_success_marker(Store(f"{week.parent}/out/{DAYS[0]}"), DAYS[0]) is not None
    assert not (week.parent / "out" / DAYS[1] / "results").exists()
