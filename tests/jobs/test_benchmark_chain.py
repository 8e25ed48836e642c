"""The benchmarks around the engine: their arithmetic, and that they measure real runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import local_ray
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import png

JOBS = Path(__file__).parents[2] / "jobs"
sys.path.insert(0, str(JOBS))

import benchmark_chain  # noqa: E402 - a program beside the package
import benchmark_driver  # noqa: E402
import benchmark_startup  # noqa: E402
from benchmark_chain import Case  # noqa: E402


def test_an_engine_is_busy_for_the_seconds_asked_for_and_no_longer() -> None:
    case = Case(actors=2, batch_seconds=1.0, batch_size=4, rows=20)
    steady = np.array([[10.0, 11.0, 4], [11.25, 12.25, 4], [12.5, 13.5, 4]])  # idle between
    late = np.array([[11.0, 12.5, 4], [12.5, 13.5, 4]])  # woke half a second too late once

    told = benchmark_chain.engine_figures(case, [steady, late], began=8.0)

    assert told["busy"] == pytest.approx((3 / 3.5 + 2 / 2.5) / 2, abs=1e-4)
    assert told["busy_least"] == pytest.approx(2 / 2.5, abs=1e-4)
    assert told["busy_steady"] == pytest.approx((2.0 + 2.0) / 5.0, abs=1e-4)  # from 11.0 on, where both have work
    assert (told["gap_ms_median"], told["start_s"], told["start_all_s"]) == (250.0, 2.0, 3.0)
    assert told["rows_per_s"] == pytest.approx((2 + 2) * 4 / 2.5)


def test_engines_that_never_had_work_at_the_same_time_have_no_steady_state() -> None:
    one, other = np.array([[1.0, 2.0, 1]]), np.array([[3.0, 4.0, 1]])

    told = benchmark_chain.engine_figures(Case(2, 1.0, 1, 2), [one, other], began=0.0)

    assert (told["busy"], told["busy_steady"], told["gap_ms_median"], told["rows_per_s"]) == (1.0, None, None, None)


def test_the_parts_of_a_start_add_up_to_the_time_until_the_first_batch() -> None:
    record = {
        "started_at": "2026-11-29T10:00:02+00:00",
        "timings": {"planning_s": 0.25, "waiting_s": 0.05},
        "engines": {"startup_seconds": {"max": 1.5}},
    }
    finished_at = datetime(2026, 11, 29, 10, 0, 9, tzinfo=UTC)
    result = {"finished_at": finished_at, "gpu_seconds": 0.75, "encode_seconds": 0.25}
    started_at = datetime(2026, 11, 29, 10, 0, tzinfo=UTC).timestamp()

    parts = benchmark_startup.parts(started_at, record, result)

    assert parts == pytest.approx(
        {"process_s": 2.0, "plan_s": 0.3, "ray_s": 8.0 - 2.0 - 0.3 - 1.5, "engine_s": 1.5, "first_batch_s": 8.0}
    )


def program(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program of jobs/ on a Ray of its own: without an address, Ray looks for the last one of `ray start`."""
    environment = os.environ | {"RAY_ADDRESS": "local"} | variables
    done = subprocess.run(
        [sys.executable, str(JOBS / name), *arguments], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.long
def test_a_start_is_measured_by_part(tmp_path: Path) -> None:
    program("benchmark_startup.py", "--rounds", "1", "--json", str(tmp_path / "startup.json"))

    figures = json.loads((tmp_path / "startup.json").read_text())["median"]
    assert min(figures.values()) > 0
    assert sum(figures[part] for part in benchmark_startup.PARTS) == pytest.approx(figures["first_batch_s"], abs=0.1)


@pytest.mark.long
def test_the_chain_is_measured_around_two_engines(tmp_path: Path) -> None:
    report = tmp_path / "chain.json"

    done = program("benchmark_chain.py", "--batch-seconds", "0.3", "--batches", "4", "--json", str(report))

    (told,) = json.loads(report.read_text())["runs"]
    assert (told["rows"], told["engines"]) == (32, 2)  # that every row succeeded is what the program makes sure of
    assert 0 < told["busy_least"] <= told["busy"] <= 1  # little, where the first batch finds a cold disk
    assert 0 < told["driver_ms_per_row"] < 1000
    assert set(told["cpu_ms_per_row"]) >= {"driver", "engines"}
    assert done.stdout.splitlines()[-1].split()[:3] == ["2", "0.3", "32"]


@pytest.mark.long
def test_the_driver_does_not_grow_with_the_tasks_of_a_run_and_each_engine_is_loaded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a limit, Ray Data's statistics alone take 1.8 kB a task, and the driver grew by 5 kB."""
    monkeypatch.setenv("RAY_ADDRESS", "local")

    figures = benchmark_driver.measure(16_000, batches=1)

    memory = [mb for rows, mb in figures["mb_by_rows"] if rows >= 8000]
    assert figures["engines_loaded"] == 2
    assert memory[-1] - memory[0] < 5  # 2,000 tasks
    assert 0 < figures["driver_ms_per_row"] < 10


@pytest.mark.long
def test_the_plain_script_draws_with_the_embedded_model(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png())
    requests = {"request_id": ["a", "b"], "image": [str(tmp_path / "red.png")] * 2, "prompt": ["a red circle"] * 2}
    pq.write_table(pa.table(requests), tmp_path / "requests.parquet")
    files = [str(tmp_path / "requests.parquet"), str(tmp_path / "out")]
    base = str(JOBS.parent / "pia_batch" / "tiny" / "checkpoint")

    with local_ray.elsewhere() as ray:  # quicker than one that Ray Data starts
        program("plain_ray_data.py", *files, "--base", base, "--device", "cpu", "--size", "64", "--steps", "2", **ray)

    results = pq.read_table(tmp_path / "out" / "results")
    assert results["request_id"].to_pylist() == ["a", "b"]
    assert all(Path(path).read_bytes().startswith(b"GIF8") for path in results["animation"].to_pylist())


@pytest.mark.long
def test_the_plain_script_loses_what_a_run_keeps(tmp_path: Path) -> None:
    program("benchmark_plain.py", "--only", "events", "--json", str(tmp_path / "plain.json"))

    events = json.loads((tmp_path / "plain.json").read_text())["events"]
    told = {(event["what"], event["side"]): event for event in events}
    bad, killed, again = (name for name, side in told if side == "run")
    assert told[bad, "plain"]["exit_code"] != 0
    assert told[bad, "run"]["results"] == 24
    assert told[killed, "plain"]["generated"] == 24
    assert told[killed, "run"]["results"] == 24
    assert told[killed, "run"]["generated"] < 24
    assert told[again, "plain"]["results"] == 48
    assert (told[again, "run"]["results"], told[again, "run"]["generated"]) == (24, 0)
