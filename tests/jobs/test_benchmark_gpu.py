"""The program for machines with a GPU: its figures, its failures, and all parts once on a CPU."""

from __future__ import annotations

import datetime as dt
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs"))

import benchmark_gpu


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


def test_the_batches_that_compile_are_left_out():
    # Eight batches of two. The first two compile; from then on a batch takes 3 s, 2.8 s of it on the device.
    ends = [100, 100, 150, 150, *(150 + 3 * batch for batch in range(1, 7) for _ in range(2))]

    told = benchmark_gpu.steady(results(ends, [50.0] * 4 + [1.4] * 12), batch_size=2)

    assert told["left_out"] == 4
    assert told["busy"] == pytest.approx(2.8 / 3)
    assert told["clips_per_s_steady"] == pytest.approx(2 / 3)
    assert told["gpu_seconds_per_clip"] == pytest.approx(1.4)
    assert (told["requests"], told["succeeded"], told["mp4_bytes"]) == (16, 16, 160)


def test_of_a_single_batch_nothing_is_steady():
    told = benchmark_gpu.steady(results([1.0, 1.0], [0.4, 0.4]), batch_size=2)

    assert (told["busy"], told["clips_per_s_steady"], told["gpu_seconds_per_clip"]) == (None, None, None)


def test_a_benchmark_that_fails_does_not_end_the_program_and_says_why(tmp_path, capfd):
    arguments = SimpleNamespace(to=tmp_path, size="tiny", bench="--batches none")

    (failure,) = benchmark_gpu._bench(arguments)

    assert failure.startswith("benchmark: `python -m pia_batch.cli bench --size …` ended with 2")
    assert "--batches" in capfd.readouterr().err


@pytest.mark.long
def test_all_of_it_on_a_cpu_in_two_commands(tmp_path, monkeypatch):
    small = ["--side", "32", "--frames", "4", "--steps", "2"]
    bench = ["--parts", "bench", "--bench", " ".join(["--rounds 1 --batches 1 --only b,d --no-compile", *small])]
    runs = ["--parts", "runs", "--requests", "4", "--batch-size", "1", "--speeds", "exact,fast", *small]

    for part in (bench, runs):
        monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", "--size", "tiny", "--to", str(tmp_path / "cpu"), *part])
        assert benchmark_gpu.main() == 0

    told = json.loads((tmp_path / "cpu" / "benchmark.json").read_text())
    assert list(told["variants"]) == ["b: pipeline", "d: engine, 1 row"]
    told = json.loads((tmp_path / "cpu" / "runs.json").read_text())
    assert list(told) == ["exact", "fast"]
    for one in told.values():
        assert (one["requests"], one["succeeded"]) == (4, 4)
        assert one["clips_per_s_steady"] > 0
