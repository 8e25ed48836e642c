"""Compilation: the same clips by graphs of frequent shapes, and by direct calls without a compiler."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import adapted
from diffusers import PIAPipeline
from pipelines import assert_same, build, shot, single_call
from places import PYTHONPATH
from torch import nn

from pia_batch.engine import PiaEngine, compiling
from pia_batch.engine.compiling import Compiler, directly

ROWS = [
    shot(1, guidance_scale=3.0),
    shot(2, guidance_scale=1.0, motion_scale=2),
]


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    return build()


class Seen:
    """A compiler whose graphs call the function directly and record the arguments; or one that fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.graphs = 0
        self.error = error

    def __call__(self, graph: Any, _example: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.graphs += 1
        return graph.forward


def half(values: torch.Tensor) -> torch.Tensor:
    return values / 2


def linear(network: nn.Module, values: torch.Tensor, names: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = network(values) + names["bias"]
    return result


@pytest.mark.long
def test_a_mixed_batch_of_graphs_equals_single_calls(pipe):
    compiler = Compiler("eager", usual_calls=0)

    clips = PiaEngine.from_pipeline(pipe, compiler=compiler).animate(ROWS, keep_latents=True)

    for row, clip in zip(ROWS, clips, strict=True):
        assert_same(clip, single_call(pipe, row))
    assert compiler.num_graphs() == 2  # the UNet, and a chunk of the VAE


def test_a_shape_is_called_as_it_is_until_it_is_usual():
    seen = Seen()
    compiler = Compiler(seen, usual_calls=2)

    asked = [compiler(half, torch.ones(size)) for size in (3, 3, 4, 3, 3, 3)]

    assert [float(each.sum()) for each in asked] == [1.5, 1.5, 2.0, 1.5, 1.5, 1.5]
    assert (seen.graphs, compiler.num_graphs()) == (1, 1)


def test_shapes_beyond_the_limit_are_called_as_they_are_and_dynamo_never_stops_before():
    seen = Seen()
    compiler = Compiler(seen, usual_calls=0, max_graphs=12)

    for _ in range(2):
        for size in range(2, 20):
            assert float(compiler(half, torch.ones(size)).sum()) == size / 2

    assert (seen.graphs, compiler.num_graphs()) == (12, 12)


def test_weights_that_change_and_texts_are_no_part_of_a_graph():
    seen, network = Seen(), nn.Linear(2, 2).requires_grad_(requires_grad=False)
    compiler = Compiler(seen, usual_calls=0)
    for factor in (1.0, 2.0, 3.0):
        network.weight.mul_(factor)
        values, bias = torch.randn(1, 2), torch.randn(2)

        assert torch.equal(compiler(linear, network, values, {"bias": bias}), network(values) + bias)
    network.weight.data = torch.zeros(2, 2)  # as a merged LoRA puts other tensors in place of the old ones
    assert torch.equal(compiler(linear, network, values, {"bias": bias}), network.bias[None] + bias)
    assert seen.graphs == 1


@pytest.mark.long
@pytest.mark.slow
def test_image_prompts_of_any_weight_share_a_graph(tmp_path):
    own = adapted(tmp_path).pipe
    seen = Seen()
    engine = PiaEngine.from_pipeline(own, compiler=Compiler(seen, usual_calls=0))

    for scale in (0.0, 0.5, 1.0):
        row = shot(1, ip_adapter_scale=scale)
        assert_same(engine.animate([row], keep_latents=True)[0], single_call(own, row))

    assert seen.graphs == 2


@pytest.mark.long
def test_what_cannot_be_compiled_is_called_as_it_is_with_one_warning(pipe, caplog):
    compiler = Compiler(Seen(RuntimeError("no C++ compiler found")), usual_calls=0)

    clips = PiaEngine.from_pipeline(pipe, compiler=compiler).animate(ROWS, keep_latents=True)

    for row, clip in zip(ROWS, clips, strict=True):
        assert_same(clip, single_call(pipe, row))
    said = refusals(caplog)
    assert [line.split(" reason=")[0] for line in said] == [
        "compile_failed function=run",
        "compile_failed function=decode_chunk",
    ]
    assert "no C++ compiler found" in said[0]


def test_a_fault_of_the_function_is_no_fault_of_the_compiler(caplog):
    compiler = Compiler("eager", usual_calls=0)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compiler(linear, nn.Linear(2, 2), torch.ones(1, 3), {"bias": torch.ones(2)})

    assert refusals(caplog) == []


def test_a_compiler_out_of_memory_is_out_of_memory():
    compiler = Compiler(Seen(RuntimeError("CUDA out of memory")), usual_calls=0)

    with pytest.raises(RuntimeError, match="out of memory"):
        compiler(half, torch.ones(2))


class Broken:
    """A compiler whose graphs compute the right result, changed by `fault`."""

    def __init__(self, fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.fault = fault

    def __call__(self, graph: Any, _example: Any) -> Any:
        def compiled(*given: Any) -> Any:
            return tuple(self.fault(each) if isinstance(each, torch.Tensor) else each for each in graph.forward(*given))

        return compiled


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == compiling.__name__]


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "a tenth too large": lambda out: out * 1.1,
    "rows in another order": lambda out: out.flip(0),
    "NaN": lambda out: out * torch.nan,
    "another dtype": lambda out: out.double(),
    "another shape": lambda out: out[:1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_computes_something_else_is_not_used(fault, caplog):
    compiler = Compiler(Broken(FAULTS[fault]), usual_calls=0)
    values = torch.tensor([1.0, 2.0, 4.0])

    asked = [compiler(half, values) for _ in range(3)]

    assert all(torch.equal(each, values / 2) for each in asked)
    assert compiler.num_graphs() == 0
    (line,) = refusals(caplog)
    assert line.startswith("compile_failed function=half reason=the first result of its graph differs by ")
    assert compiler.failures == {"half": line.split("reason=")[1]}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-2), (torch.float16, 2e-2), (torch.bfloat16, 0.1)])
def test_a_graph_may_be_off_by_what_its_precision_takes(dtype, most):
    values = torch.linspace(-4, 4, 1000).to(dtype)
    for factor, refused in ((1 + most / 2, False), (1 + 2 * most, True)):
        compiler = Compiler(Broken(lambda out, factor=factor: out * factor), usual_calls=0)

        compiler(half, values)

        assert bool(compiler.failures) == refused


def test_only_the_first_call_of_each_shape_is_compared():
    called: list[int] = []

    def counted(values: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            called.append(len(values))
        return values / 2

    compiler = Compiler(Seen(), usual_calls=0)
    for size in (3, 3, 4, 4, 3):
        compiler(counted, torch.ones(size))

    assert called == [3, 4]


def test_numbers_that_overflow_prove_and_disprove_nothing(caplog):
    compiler = Compiler(Broken(torch.zeros_like), usual_calls=0)

    assert torch.isnan(compiler(half, torch.full((3,), torch.nan))).all()
    assert (compiler.num_graphs(), refusals(caplog)) == (1, [])

    assert torch.equal(compiler(half, torch.ones(3)), torch.full((3,), 0.5))
    assert (compiler.num_graphs(), len(refusals(caplog))) == (0, 1)


def test_a_graph_keeps_no_network_alive():
    compiler, network = Compiler("eager", usual_calls=0), nn.Linear(2, 2)
    compiler(linear, network, torch.ones(1, 2), {"bias": torch.ones(2)})
    gone = weakref.ref(network)

    del network, compiler
    gc.collect()

    assert gone() is None


def test_kernels_are_kept_where_nobody_else_writes_unless_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "FOLDER", tmp_path / "kept")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    Compiler()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    Compiler()

    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0


PROGRAM = """
import json, torch
from torch._dynamo.utils import counters
from small_networks import small
from pia_batch.engine.compiling import Compiler, directly
from pia_batch.engine.unet import run
compiler = Compiler(usual_calls=0)
given = small()
with torch.inference_mode():
    exact = directly(run, *given)
    compiler(run, *given)  # the first call is compared, and its own
    distance = float((compiler(run, *given) - exact).abs().max())
found = counters["inductor"]
print(json.dumps([distance, compiler.num_graphs(), found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]]))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_graphs_of_a_gpu_pass_the_comparison(pipe, dtype):
    compiler = Compiler(usual_calls=0)

    clips = PiaEngine.from_pipeline(copy.deepcopy(pipe).to("cuda", dtype), compiler=compiler).animate(ROWS)

    assert all(clip.error is None for clip in clips)
    assert (compiler.failures, compiler.num_graphs()) == ({}, 2)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which torch.compile needs on a CPU")
def test_kernels_of_inductor_equal_eager_and_serve_the_next_process(tmp_path):
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            check=True,
            capture_output=True,
            env=os.environ
            | {"PYTHONPATH": PYTHONPATH, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        )
        told.append(json.loads(done.stdout.splitlines()[-1]))

    for distance, graphs, *_ in told:
        assert distance <= 1e-5
        assert graphs == 1
    assert [found[2:] for found in told] == [[0, 1], [1, 0]]


def test_without_a_compiler_a_function_is_just_called():
    assert float(directly(half, torch.ones(2)).sum()) == 1.0
