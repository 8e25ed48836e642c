"""`pia-batch bench` at tiny size: every contestant runs, and what is told of it can be so."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pia_batch import cli
from pia_batch.engine import benchmark, calibration


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the documented use of the pipeline warns of much
def test_every_contestant_draws_the_same_clip_and_is_measured(tmp_path):
    path = tmp_path / "bench.json"

    result = CliRunner().invoke(
        cli.app,
        [
            "bench",
            "--size",
            "tiny",
            "--rounds",
            "1",
            "--batches",
            "1",
            "--no-compile",
            "--device",
            "cpu",
            "--to",
            str(path),
        ],
    )

    assert result.exit_code == 0, result.output
    told = json.loads(path.read_text())
    assert list(told["contestants"]) == [
        "a: documented",
        "a': documented, MP4",
        "b: pipeline",
        "d: engine, batches of 1",
        "e: balanced, batches of 1",
        "e: fast, batches of 1",
    ]
    for name, one in told["contestants"].items():
        least, most = one["clips_per_s_range"]
        assert 0 < least <= one["clips_per_s"] <= most
        assert one["psnr_db"] >= 40
        assert 0 < one["share_of_measured_matmul"] < (1 if name[0] in "abd" else 9)  # work left out counts as speed
        assert (one["peak_bytes"], one["share_of_datasheet"], one["compile_s"]) == (None, None, None)
    assert told["contestants"]["b: pipeline"]["psnr_db"] == benchmark.IDENTICAL_DB
    exact, fast = (told["contestants"][f"{name}, batches of 1"]["psnr_db"] for name in ("d: engine", "e: fast"))
    assert exact >= max(45, fast + 10)
    assert told["tflop_per_clip"] == pytest.approx(0.0427, rel=0.2)
    assert told["calibration"]["matmul_tflops"] > 0


@pytest.mark.parametrize("batches", ["", "0", "1,x"])
def test_batch_sizes_that_are_none_are_refused(batches):
    result = CliRunner().invoke(cli.app, ["bench", "--batches", batches])

    assert result.exit_code == 2
    assert "--batches" in result.output


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Tesla T4", 65.0),
        ("NVIDIA A10G", 70.0),
        ("Radeon", None),
    ],
)
def test_a_datasheet_is_found_by_the_devices_name(name, tflops):
    assert calibration.datasheet_tflops(name) == tflops


def test_a_cpu_is_named_by_its_threads():
    assert calibration.device_name(torch.device("cpu")) == f"CPU, {torch.get_num_threads()} threads"


def test_psnr_is_that_of_its_definition():
    dark = np.zeros((1, 2, 2, 3), np.uint8)

    assert benchmark.psnr_db(dark + np.uint8(1), dark) == pytest.approx(48.13, abs=0.01)
    assert benchmark.psnr_db(dark, dark) == benchmark.IDENTICAL_DB
