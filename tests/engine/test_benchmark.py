"""`pia-batch bench` on small clips: every variant runs, results are plausible, and failures affect nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, FakeCuda
from pipelines import build
from torch._dynamo.utils import counters
from typer.testing import CliRunner, Result

from pia_batch import cli
from pia_batch.engine.benchmark import baselines, calibration, runner
from pia_batch.engine.benchmark.runner import BenchmarkOptions
from pia_batch.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # the documented use of the pipeline warns of much

SMALL: dict[str, Any] = {
    "size": "tiny",
    "rounds": 1,
    "batches": (1,),
    "device": "cpu",
    "side_px": 32,
    "frames": 2,
    "steps": 2,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine threads wait for each other, which makes small calls ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(encode: Callable[[Any], bytes] = lambda _: b"", **options: Any) -> dict[str, Any]:
    """The variants of the smallest network there is."""
    told = runner.run(BenchmarkOptions(**SMALL | options), encode, make=lambda _size: build())
    return dict(told["variants"])


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", "--size", "tiny", "--device", "cpu", "--rounds", "1", *arguments])


def small(*arguments: str) -> Result:
    return bench("--batches", "1", "--no-compile", "--side", "32", "--frames", "2", "--steps", "2", *arguments)


@pytest.mark.long
@pytest.mark.slow
def test_every_contestant_draws_the_same_clip_and_is_measured(tmp_path):
    path = tmp_path / "numbers" / "bench.json"

    result = bench("--batches", "1", "--no-compile", "--frames", "4", "--profile", "--to", str(path))

    assert result.exit_code == 0, result.output
    told = json.loads(path.read_text())
    assert list(told["variants"]) == [
        "a: documented",
        "a': documented, MP4",
        "b: pipeline",
        "d: engine, 1 row",
        "e: balanced, 1 row",
        "e: fast, 1 row",
    ]
    for name, one in told["variants"].items():
        least, most = one["clips_per_s_range"]
        assert 0 < least <= one["clips_per_s"] <= most
        assert one["clips_per_s"] <= one["clips_per_s_generated"]
        assert one["psnr_db"] >= 40
        assert 0 < one["share_of_measured_matmul"] < (1 if name[0] in "abd" else 9)  # work left out counts as speed
        assert (one["peak_bytes"], one["share_of_datasheet"], one["compile_s"]) == (None, None, None)
        assert "error" not in one
    assert told["variants"]["b: pipeline"]["psnr_db"] == runner.IDENTICAL_DB
    exact, fast = (told["variants"][f"{name}, 1 row"]["psnr_db"] for name in ("d: engine", "e: fast"))
    assert exact >= max(45, fast + 10)
    assert told["tflop_per_clip"] == pytest.approx(0.0212, rel=0.02)
    assert all(told["calibration"][name] > 0 for name in ("matmul_tflops", "attention_tflops", "convolution_tflops"))
    kinds = told["profile"]["kinds"]
    assert {"convolution", "matmul", "attention", "norm", "elementwise", "copies"} == set(kinds)
    assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(
        1 - told["profile"]["gaps_ms"] / told["profile"]["window_ms"]
    )
    assert all(kinds[kind]["floor_ms"] > 0 for kind in ("convolution", "matmul", "attention"))
    assert "above the floor" in result.output
    assert "e: balanced, 1 row" in result.output


@pytest.mark.long
def test_what_compiles_is_compiled_once_and_told_apart():
    counters.clear()

    told = measured(only="cd", backend="eager")

    for one in told.values():
        assert one["psnr_db"] >= 45
        assert one["compile_s"] > 0
        assert not {"error", "not_compiled"} & set(one)
    # The UNet and the VAE of both, and no graph anew for the calls that are timed alone.
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.long
@pytest.mark.slow
def test_a_compiler_that_fails_does_not_end_the_engine():
    def broken(_graph: Any, _example: Any) -> Any:
        raise RuntimeError("no such instruction")

    (engine,) = measured(only="d", backend=broken).values()

    assert engine["clips_per_s"] > 0
    assert set(engine["not_compiled"]) == {"run", "decode_chunk"}
    assert "no such instruction" in engine["not_compiled"]["run"]


@pytest.mark.long
def test_memory_that_runs_out_spoils_neither_what_was_measured_nor_the_others():
    left = iter(range(5))  # each of a' and b: one clip to warm up, one a turn; a has an encoder of its own

    def encode(_frames: Any) -> bytes:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return b""

    told = measured(encode, rounds=2, only="ab")

    assert [one["turns"] for one in told.values()] == [2, 2, 1]
    assert [name for name, one in told.items() if "error" in one] == ["b: pipeline"]
    assert told["b: pipeline"]["error"] == "OutOfMemoryError: tried to allocate 9 GiB"
    assert told["b: pipeline"]["clips_per_s"] > 0


def test_no_turn_begins_after_the_minutes_that_there_are():
    result = small("--only", "d,b", "--minutes", "0", "--json")

    assert result.exit_code == 1
    told = json.loads(result.stdout)["variants"]
    assert [name[0] for name in told] == ["d", "b"]
    assert all(one["error"] == "not measured: the limit of 0 minutes was reached" for one in told.values())


def test_numbers_are_written_as_they_come_and_stay_beside_later_ones(tmp_path):
    path = tmp_path / "bench.json"
    earlier = {"turns": 3, "clips_per_s": 0.5}
    known = {"conditions": runner.conditions(BenchmarkOptions(**SMALL)), "variants": {"b: pipeline": earlier}}
    path.write_text(json.dumps(known))

    result = small("--only", "d", "--to", str(path), "--json")

    assert result.exit_code == 0, result.output
    both = json.loads(path.read_text())
    assert list(both["variants"]) == ["b: pipeline", "d: engine, 1 row"]
    assert both["variants"]["b: pipeline"] == earlier
    assert json.loads(result.stdout) == both
    assert list(tmp_path.iterdir()) == [path]


def words(box):
    """Return the text of an error in its box, without the line breaks that the box makes."""
    return " ".join(box.replace("│", " ").split())


def test_numbers_of_other_conditions_are_not_mixed(tmp_path):
    path = tmp_path / "bench.json"
    known = runner.conditions(BenchmarkOptions(**SMALL))
    path.write_text(json.dumps({"conditions": known | {"device": "NVIDIA H100 80GB HBM3"}, "variants": {}}))
    before = path.read_text()

    result = small("--to", str(path))

    assert result.exit_code == 2
    assert "NVIDIA H100 80GB HBM3" in words(result.output)
    assert path.read_text() == before


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "notes").write_text("")

    result = small("--to", str(tmp_path / "notes" / "bench.json"))

    assert isinstance(result.exception, ConfigError)
    assert "--to: cannot write to" in str(result.exception)
    assert "a file has the name of a folder there" in str(result.exception)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"conditions": 3}', '{"conditions": {}}'])
def test_a_file_of_something_else_is_not_written_over(content, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text(content)

    result = small("--to", str(path))

    assert result.exit_code == 2
    assert "name another file" in words(result.output)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("option", "value"), [*(("--batches", value) for value in ("", "0", "1,x")), ("--only", "a,f"), ("--side", "100")]
)
def test_options_that_make_no_sense_are_refused(option, value):
    result = CliRunner().invoke(cli.app, ["bench", option, value])

    assert result.exit_code == 2
    assert option in result.output


def test_a_shape_is_that_of_the_size_but_for_what_is_asked():
    assert BenchmarkOptions().shape == {"side_px": 512, "frames": 16, "steps": 25}
    assert BenchmarkOptions(size="tiny", steps=4).shape == {"side_px": 64, "frames": 8, "steps": 4}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121.0),
        ("Tesla T4", 65.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Radeon", None),
    ],
)
def test_a_datasheet_is_found_by_the_devices_name(name, tflops):
    assert calibration.datasheet_tflops(name) == tflops


def test_a_cpu_is_named_by_its_threads_and_has_no_clocks_to_tell():
    assert calibration.device_name(torch.device("cpu")) == f"CPU, {torch.get_num_threads()} threads"
    assert calibration.state(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            "echo '580.159.03, 1980, 512.31, 700.00, 64'",
            {
                "driver": "580.159.03",
                "sm_clock_mhz": "1980",
                "power_w": "512.31",
                "power_limit_w": "700.00",
                "temperature_c": "64",
            },
        ),
        ("echo 'No devices were found'", None),
        ("exit 9", None),
    ],
)
def test_a_gpus_state_is_what_its_program_prints(program: str, told: dict[str, str] | None, tmp_path: Path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\n{program}\n")
    fake.chmod(0o755)

    assert calibration.query_nvidia_smi([str(fake)]) == told
    assert calibration.query_nvidia_smi([str(tmp_path / "missing")]) is None


@pytest.mark.parametrize(("speed", "shares"), [("exact", [1 / 2]), ("fast", [5 / 18, 4 / 18])])
def test_the_network_is_called_on_a_gpu_as_often_as_a_step_of_one_row_takes(speed, shares):
    shots = runner._shots(BenchmarkOptions(**SMALL | {"batches": (2,), "steps": 9}))
    pipe = build()
    with FakeCuda() as cuda:
        for _, network in baselines.networks(pipe):
            cuda.place(network)
        calls = baselines.engine_unet_calls(pipe, shots, speed, None)
        made = [call.call() for call in calls]
        stock = baselines.stock_unet_call(pipe, shots[0])()

    assert [call.share for call in calls] == pytest.approx(shares)
    assert (stock.device, stock.dtype, stock.shape) == (CUDA, torch.float16, (2, 4, 2, 8, 8))
    noise = [each if isinstance(each, torch.Tensor) else each[0] for each in made]
    assert all((each.device, each.dtype, each.shape) == (CUDA, torch.float16, (4, 4, 2, 8, 8)) for each in noise)


def test_psnr_is_that_of_its_definition():
    dark = np.zeros((1, 2, 2, 3), np.uint8)

    assert runner.psnr_db(dark + np.uint8(1), dark) == pytest.approx(48.13, abs=0.01)
    assert runner.psnr_db(dark, dark) == runner.IDENTICAL_DB


@pytest.mark.gpu
def test_a_gpu_is_measured_with_its_memory_and_its_own_clock():
    told = runner.run(BenchmarkOptions(**SMALL | {"device": "cuda"}, compiles=False, profiles=True), lambda _: b"")

    assert told["conditions"]["dtype"] == "float16"
    assert told["calibration"]["matmul_tflops"] > 1
    for one in told["variants"].values():
        assert "error" not in one
        assert one["peak_bytes"] > 0
        assert one["psnr_db"] >= 30
    assert {"matmul", "convolution"} <= set(told["profile"]["kinds"])
