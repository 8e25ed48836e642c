"""The self-test, on devices whose kernels compute wrong results."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PIAPipeline
from pipelines import build
from torch.overrides import TorchFunctionMode

from pia_batch.config import FreeUConfig, ModelConfig, SchedulerConfig
from pia_batch.engine import PiaEngine, loading, self_test
from pia_batch.errors import BrokenDeviceError, ConfigError


@pytest.fixture(scope="module")
def embedded() -> PiaEngine:
    return PiaEngine.load(ModelConfig(), device="cpu")


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    return build()


@pytest.fixture
def other(pipe) -> PiaEngine:
    """An engine without a stored clip."""
    return PiaEngine.from_pipeline(pipe)


Kernel = Callable[..., torch.Tensor]
Fault = Callable[[torch.Tensor], torch.Tensor]


class BrokenKernel(TorchFunctionMode):
    """A device on which one function of torch computes a wrong result."""

    def __init__(self, broken: Kernel, fault: Fault) -> None:
        super().__init__()
        self._broken, self._fault = broken, fault

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._fault(result) if func is self._broken else result


CONV, LINEAR = torch.nn.functional.conv2d, torch.nn.functional.linear
NORM, ATTENTION = torch.nn.functional.group_norm, torch.nn.functional.scaled_dot_product_attention

FAULTS: dict[str, tuple[Kernel, Fault]] = {
    "convolutions of zeros": (CONV, torch.zeros_like),
    "convolutions a tenth too large": (CONV, lambda out: out * 1.1),
    "convolutions without their last channel": (CONV, lambda out: torch.cat([out[:, :-1], out[:, :1] * 0], 1)),
    "convolutions that shift the picture": (CONV, lambda out: out.roll(1, -1)),
    "linear layers a tenth too small": (LINEAR, lambda out: out * 0.9),
    "norms without their sign": (NORM, torch.abs),
    "attention that looks at all alike": (ATTENTION, lambda out: out.mean(-2, keepdim=True).expand_as(out)),
    "attention of zeros": (ATTENTION, torch.zeros_like),
}

LEAKS: dict[str, tuple[Kernel, Fault]] = {
    "the first row for all": (CONV, lambda out: out[:1].expand_as(out).clone() if len(out) > 6 else out),
    "zeros after the sixth image": (NORM, lambda out: torch.cat([out[:6], out[6:] * 0])),
    "rows in another order": (ATTENTION, lambda out: out.flip(0) if len(out) > 6 else out),
    "a row plus a tenth of another": (CONV, lambda out: out + 0.1 * out.roll(3, 0) if len(out) > 6 else out),
}
"""Faults in a batch only: alone, the self-test has at most six images, three frames with guidance."""


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(dtype="bfloat16"),
        ModelConfig(dtype="float16"),
        ModelConfig(scheduler=SchedulerConfig(name="pndm")),  # has no schedule of less than four steps
        ModelConfig(memory="low"),
        ModelConfig(freeu=FreeUConfig()),  # generates another clip than the stored one, as expected
    ],
    ids=["default", "bfloat16", "float16", "pndm", "low memory", "freeu"],
)
def test_a_sound_device_passes_with_the_embedded_model(model):
    PiaEngine.load(model, device="cpu").check()


def test_a_sound_device_passes_with_any_model(other):
    other.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_sound_gpu_passes_with_the_answer_of_a_cpu(pipe, dtype):
    PiaEngine.load(ModelConfig(dtype=dtype), device="cuda").check()
    PiaEngine.from_pipeline(copy.deepcopy(pipe).to("cuda", getattr(torch, dtype))).check()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_found_by_the_stored_answer(embedded, fault):
    with BrokenKernel(*FAULTS[fault]), pytest.raises(BrokenDeviceError, match=r"differs from the stored one|is flat"):
        embedded.check()


@pytest.mark.parametrize("leak", LEAKS)
def test_rows_that_touch_each_other_are_found_with_any_model(other, leak):
    with BrokenKernel(*LEAKS[leak]), pytest.raises(BrokenDeviceError, match="when other rows share the batch"):
        other.check()


def test_nan_is_found_with_any_model(other):
    with BrokenKernel(CONV, lambda out: out * torch.nan), pytest.raises(BrokenDeviceError, match="NaN") as caught:
        other.check()

    assert "model.dtype float32" in str(caught.value)  # it may be the model after all


def test_a_flat_clip_is_found_with_any_model(pipe):
    class GreyVae:
        def __getattr__(self, name: str) -> Any:
            return getattr(pipe.vae, name)

        def decode(self, latents: torch.Tensor) -> Any:
            return SimpleNamespace(sample=torch.zeros_like(pipe.vae.decode(latents).sample))

    engine = PiaEngine(dataclasses.replace(loading.adopt(pipe), vae=GreyVae()), lambda: "grey")

    with pytest.raises(BrokenDeviceError, match="flat"):
        engine.check()


def test_a_device_that_fails_is_named_with_what_it_said(other):
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    with BrokenKernel(CONV, fail), pytest.raises(BrokenDeviceError, match=r"^cpu of .*float32: CUDA error: no kernel"):
        other.check()


@pytest.mark.parametrize(("is_embedded", "calls"), [(False, 2), (True, 4)])
def test_it_costs_few_small_calls_of_the_unet(embedded, other, is_embedded, calls):
    parts = (embedded if is_embedded else other)._parts
    images = []

    class CountingUnet:
        def __getattr__(self, name: str) -> Any:
            return getattr(parts.unet, name)

        def __call__(self, samples: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            images.append(len(samples) * samples.shape[2])
            return parts.unet(samples, *args, **kwargs)

    counted = dataclasses.replace(parts, unet=CountingUnet())
    PiaEngine(counted, lambda: "counted", embedded=is_embedded).check()

    assert len(images) == calls
    assert max(images) <= 12


@pytest.mark.parametrize("stride", [1, 4, 8, 48, 128])
@pytest.mark.parametrize("max_frames", [1, 32])
def test_its_request_suits_every_model(other, stride, max_frames):
    limits = dataclasses.replace(other.limits, latent_stride=stride, max_frames=max_frames)

    limits.check(self_test.request(limits, embedded=False))


def test_the_answer_is_stored_and_read_again(embedded, tmp_path):
    path = tmp_path / "self_test.json"
    engine = embedded.with_scheduler(self_test.scheduler(None, embedded=True))

    self_test.write_expected(engine, path)

    self_test.check(engine, embedded=True, expected=path)
    stored, fresh = json.loads(self_test.EXPECTED.read_text()), json.loads(path.read_text())
    assert stored["engine_id"] == fresh["engine_id"]
    assert len(path.read_bytes()) < 1500


def test_thumbnails_are_means_of_squares():
    frames = np.arange(2 * 16 * 24 * 3, dtype=np.float32).reshape(2, 16, 24, 3) % 251

    pooled = self_test.thumbnails(frames)

    assert pooled.shape == (2, 8, 8, 3)
    assert pooled[1, 3, 5, 2] == round(float(frames[1, 6:8, 15:18, 2].mean()))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_text('{"engine_id": "x", "thumbnails": "AAAA"}'),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace('"engine_id": "', '"engine_id": "0')),
    ],
    ids=["missing", "cut", "short", "list", "another model"],
)
def test_an_answer_that_is_no_answer_is_an_error_that_names_the_command(embedded, tmp_path, spoil):
    path = tmp_path / "self_test.json"
    path.write_text(self_test.EXPECTED.read_text())
    spoil(path)

    with pytest.raises(ConfigError, match=r"python jobs/tiny/self_test\.py"):
        self_test.check(embedded, embedded=True, expected=path)
