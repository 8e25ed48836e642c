"""The program for machines with a GPU: its plan, its failures, and all parts once on a CPU."""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import psutil
import pyarrow as pa
import pytest

from pia_batch.config.models import SchedulerName

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs"))

import benchmark_gpu
import gpu_chain
import gpu_parts

NAMES = [part.name for part in benchmark_gpu.PARTS]


def results(seconds: list[float], device_s: list[float]) -> pa.Table:
    began = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)
    return pa.table(
        {
            "finished_at": [began + dt.timedelta(seconds=each) for each in seconds],
            "gpu_seconds": device_s,
            "status": ["succeeded"] * len(seconds),
            "device": ["NVIDIA H100 80GB HBM3"] * len(seconds),
            "num_bytes": [10] * len(seconds),
        }
    )


def options(folder: Path, *more: str) -> Any:
    return benchmark_gpu._parse(["--to", str(folder), "--size", "tiny", "--work", str(folder / "work"), *more])


def saved(folder: Path) -> Any:
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


def test_the_page_has_every_part_in_order_with_its_minutes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu-day.md").read_text(encoding="utf-8")
    parts = [(number, part.name, f"{part.minutes:g}") for number, part in enumerate(benchmark_gpu.PARTS, 1)]

    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE)
    assert rows == [(str(number), name, minutes) for number, name, minutes in parts]


def test_the_batches_that_compile_are_left_out():
    # Eight batches of two. The first two compile; from then on a batch takes 3 s, 2.8 s of it on the device.
    ends = [100, 100, 150, 150, *(150 + 3 * batch for batch in range(1, 7) for _ in range(2))]

    measured = gpu_chain.steady(results(ends, [50.0] * 4 + [1.4] * 12), batch_size=2)

    assert measured["left_out"] == 4
    assert measured["busy"] == pytest.approx(2.8 / 3)
    assert measured["clips_per_s_steady"] == pytest.approx(2 / 3)
    assert measured["gpu_seconds_per_clip"] == pytest.approx(1.4)
    assert (measured["requests"], measured["succeeded"], measured["mp4_bytes"]) == (16, 16, 160)


def test_of_a_single_batch_nothing_is_steady():
    measured = gpu_chain.steady(results([1.0, 1.0], [0.4, 0.4]), batch_size=2)

    assert (measured["busy"], measured["clips_per_s_steady"], measured["gpu_seconds_per_clip"]) == (None, None, None)


def test_the_parts_fit_into_the_time_and_each_has_a_function():
    assert sum(part.minutes for part in benchmark_gpu.PARTS) <= 28
    assert ["about", *NAMES] == list(gpu_parts.RUN)


def test_a_part_without_its_packages_says_what_to_install(tmp_path):
    chain = benchmark_gpu.PARTS[6]

    found = benchmark_gpu._attempt(chain, options(tmp_path), 600.0, [], {"ray", "pytest"})

    assert found == ("missing", "install ray")


def test_a_part_that_would_begin_too_late_is_skipped(tmp_path):
    features = benchmark_gpu.PARTS[1]

    found = benchmark_gpu._attempt(features, options(tmp_path), 90.0, [], set())

    assert found == ("skipped", "1.5 minutes are left, it needs 5")


def test_a_part_is_ended_at_its_limit_and_keeps_what_it_wrote(tmp_path):
    (tmp_path / "features.json").write_text('{"guided": {"psnr_db": 60.0}}')
    short = benchmark_gpu.Part("features", 0.01, (), "the real part, which needs longer to import torch")

    results = {"parts": {}}

    found = benchmark_gpu._attempt(short, options(tmp_path), 10.6, [], set())
    benchmark_gpu._save(results, short, options(tmp_path), 0.0, *found)

    assert found == ("stopped", "at its limit of 0.0 minutes")
    assert saved(tmp_path) == results
    assert results["parts"]["features"]["measured"] == {"guided": {"psnr_db": 60.0}}


SLOW_PARTS = """
import json, os, subprocess, sys, time
if sys.argv[1] == "about":
    open(sys.argv[2], "w").write(json.dumps({"device": "cpu", "size": "tiny", "versions": {}}))
else:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("unfinished.json", "w").write(json.dumps({"child": child.pid}))
    os.replace("unfinished.json", sys.argv[2])
    time.sleep(600)
"""
"""Parts that measure something at once, and then go on for minutes, with a process of their own."""


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_running_part_and_the_file_has_what_it_measured(tmp_path, number, exit_code):
    program = shutil.copy(benchmark_gpu.__file__, tmp_path)
    (tmp_path / "gpu_parts.py").write_text(SLOW_PARTS)
    command = [sys.executable, program, "--to", str(tmp_path / "gpu"), "--work", str(tmp_path / "work")]
    before = signal.signal(number, signal.SIG_DFL)  # under nohup the program would ignore SIGHUP
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    signal.signal(number, before)
    while not (tmp_path / "gpu" / "tests.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    measured = json.loads((tmp_path / "gpu" / "tests.json").read_text())

    process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert process.returncode == exit_code
    assert err == f"stopped by {number.name}; the same command again runs what is not done\n"
    assert out.splitlines()[-1] == f"tests: stopped by {number.name}"
    part = saved(tmp_path / "gpu")["parts"].pop("tests")
    assert (part["status"], part["reason"], part["measured"]) == ("stopped", f"by {number.name}", measured)
    assert list(saved(tmp_path / "gpu")["parts"]) == ["tests"]
    with suppress(psutil.NoSuchProcess):
        child, deadline = psutil.Process(measured["child"]), time.monotonic() + 10
        while child.status() != psutil.STATUS_ZOMBIE:  # nothing may be left that reaps it
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.long
def test_a_part_that_fails_says_why(tmp_path):
    (tmp_path / "windows.json").write_text("no JSON")

    status, reason = benchmark_gpu._run("windows", tmp_path / "windows.json", options(tmp_path), 60.0)

    assert status == "failed"
    assert "JSONDecodeError" in str(reason)


@pytest.mark.long
def test_results_of_another_device_are_refused_and_what_is_done_is_not_run_again(tmp_path, capsys):
    found = benchmark_gpu._opened(options(tmp_path))
    found["parts"] = {name: {"status": "done", "seconds": 1.0} for name in NAMES}
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    arguments = ["--to", str(tmp_path), "--size", "tiny", "--work", str(tmp_path / "work")]

    assert benchmark_gpu.main(arguments) == 0
    assert f"{tmp_path / 'gpu.json'}: 9 of 9 parts done\n" in capsys.readouterr().out
    del found["parts"]["windows"]
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    assert benchmark_gpu.main([*arguments, "--minutes", "0.01"]) == 1
    assert "8 of 9 parts done; the same command again runs the rest\n" in capsys.readouterr().out
    (tmp_path / "gpu.json").write_text(json.dumps(found | {"device": "NVIDIA L4"}))
    assert benchmark_gpu.main(arguments) == 1

    assert "has results of another device; give another folder to --to" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "names"), [("3,1", ["tests", "engine"]), ("memory", ["memory"])])
def test_parts_are_chosen_by_number_or_name_and_keep_their_order(tmp_path, text, names):
    assert [part.name for part in options(tmp_path, "--parts", text).parts] == names


def test_a_part_that_does_not_exist_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options(tmp_path, "--parts", "1,10")
    assert "expected numbers from 1 to 9 or names" in capsys.readouterr().err


@pytest.mark.long
def test_all_of_it_on_a_cpu_in_two_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    arguments = ["--size", "tiny", "--to", str(tmp_path / "cpu"), "--work", str(tmp_path / "work")]
    # Measured by an earlier process that was stopped; tests/engine/test_features.py measures every scheduler.
    known = {f"scheduler {name}": {"psnr_db": 120.0} for name in get_args(SchedulerName) if name != "lcm"}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "features.json").write_text(json.dumps(known))

    assert benchmark_gpu.main([*arguments, "--parts", "1,2,3"]) == 0
    assert list(saved(tmp_path / "cpu")["parts"]) == NAMES[:3]
    assert benchmark_gpu.main(arguments) == 0

    parts = {name: part["measured"] for name, part in saved(tmp_path / "cpu")["parts"].items()}
    assert list(parts) == NAMES
    assert parts["tests"]["passed"] > 0
    assert {"context windows", "prompt travel", "motion LoRA", "IP-Adapter", "scheduler lcm"} < set(parts["features"])
    assert {one["psnr_db"] for one in parts["features"].values()} == {120.0}
    assert list(parts["engine"]["variants"]) == ["d: engine, 1 row", "b: pipeline"]
    assert parts["profile"]["profile"]["kinds"]
    assert [parts["chain"][speed]["succeeded"] for speed in ("exact", "fast")] == [4, 4]
    assert [parts["memory"][side]["largest_batch"] for side in ("32", "64")] == [4, 4]
    assert all("error" not in one for one in parts["windows"].values())
