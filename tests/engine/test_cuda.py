"""The engine as on a GPU, in half precision: devices, dtypes, waits, kernel limits, on a fake device without data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ip_adapters
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PIAPipeline
from fake_cuda import CUDA, FakeCuda
from lora_files import stock_with, write_lora
from pipelines import build, named, picture, shot
from schedulers import SCHEDULERS, scheduled

from pia_batch.engine import PiaEngine, Shot, loading, sampling
from pia_batch.engine.benchmark import baselines
from pia_batch.engine.offloading import DeviceSlot, OnDemand

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NETWORKS = ("unet", "vae", "text_encoder", "image_encoder")

ROWS = [
    shot(1, guidance_scale=3.0, num_frames=2, num_inference_steps=2, clip_skip=1),
    shot(2, guidance_scale=1.0, num_frames=2, num_inference_steps=3, eta=0.7, strength=0.8),
    shot(3, guidance_scale=3.0, num_frames=2, num_inference_steps=1, free_init_iters=2),
]


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as mode, torch.inference_mode():
        yield mode


def moved(cuda: FakeCuda, pipe: PIAPipeline) -> PIAPipeline:
    for name in NETWORKS:
        if getattr(pipe, name, None) is not None:
            cuda.place(getattr(pipe, name))
    return pipe


def started(engine: PiaEngine, shot: Shot) -> sampling.Row:
    """The row of a shot with one prompt, before its first step."""
    prompt = engine._prompt(shot, shot.prompt_keys, shot.clip_skip)
    negative = engine._prompt(shot, shot.negative_keys) if shot.guided else None
    row = engine._start(shot, prompt, negative)
    assert isinstance(row, sampling.Row)
    return row


def draw(cuda: FakeCuda, engine: PiaEngine, shots: list[Shot]) -> None:
    """Generate as `animate` does, and record the calls that make the host wait."""
    parts = engine._parts
    rows = [started(engine, each) for each in shots]
    cuda.waits.clear()
    sampling.denoise(parts.unet, rows, parts.call)
    assert cuda.waits == []
    assert all(row.latents.device == CUDA and row.latents.dtype == torch.float16 for row in rows)

    frames = engine._decoder.decode([row.latents for row in rows])
    assert cuda.waits == ["a look at the device"] * 2, "for the flags of the frames, then for those of the latents"
    for row, clip in zip(shots, frames, strict=True):
        assert clip.shape == (row.num_frames, row.height, row.width, 3)
        assert clip.dtype == "uint8"


@pytest.mark.long
@pytest.mark.parametrize("speed", ["exact", "fast"])
def test_rows_of_every_kind_are_drawn_together(cuda, speed):
    rows = [*ROWS, shot(4, num_frames=2, num_inference_steps=9 if speed == "fast" else 1, guidance_scale=2.0)]

    draw(cuda, PiaEngine.from_pipeline(moved(cuda, build()), speed), rows)


def test_adapters_and_image_prompts_are_drawn(tmp_path: Path) -> None:
    pipe = stock_with((write_lora(tmp_path / "lora.safetensors", "peft"), 0.7))
    ip_adapters.load(pipe, ip_adapters.write(tmp_path, "plus"))
    pipe.unet.eval().enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    rows = [dataclasses.replace(ROWS[0], ip_adapter_image=picture(7), ip_adapter_scale=0.5), ROWS[1]]

    with FakeCuda() as cuda, torch.inference_mode():
        draw(cuda, PiaEngine.from_pipeline(moved(cuda, pipe)), rows)


class Silent:
    """A network that predicts zeros, for tests of schedulers."""

    def __init__(self, network: Any) -> None:
        self.config = network.config

    def __call__(self, sample: torch.Tensor, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(sample=torch.zeros_like(sample[:, :4]))


@pytest.fixture(scope="module")
def encoded() -> tuple[FakeCuda, PIAPipeline, tuple[Any, Any, Any]]:
    """A GPU, a pipeline on it, and its encodings of an image, a prompt and an empty prompt."""
    with FakeCuda() as cuda, torch.inference_mode():
        pipe = moved(cuda, build())
        engine = PiaEngine.from_pipeline(pipe)
        texts = engine._prompts.encode(ROWS[0].prompt), engine._prompts.encode("")
        return cuda, pipe, (engine._images.encode(ROWS[0].image), *texts)


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS, ids=str)
@torch.inference_mode()
def test_no_step_of_any_scheduler_mixes_devices_or_waits(encoded, name, settings):
    cuda, pipe, (image, prompt, nothing) = encoded
    with cuda:
        parts = loading.adopt(scheduled(pipe, name, **settings))
        silent = dataclasses.replace(parts, unet=Silent(parts.unet))
        shots = [dataclasses.replace(row, num_inference_steps=4, free_init_iters=0) for row in ROWS]
        rows = [
            sampling.start(row, silent, image, prompt, nothing if row.guided else None, image_prompt=None)
            for row in shots
        ]

        cuda.waits.clear()
        sampling.denoise(silent.unet, rows)

    assert cuda.waits == []
    assert all(row.latents.device == CUDA and row.latents.dtype == torch.float16 for row in rows)


def test_networks_that_wait_on_the_host_are_there_when_they_are_asked(cuda):
    parts = loading.adopt(moved(cuda, build()))
    slot = DeviceSlot(lambda network, device: cuda.place(network, device=device))
    ashore = {
        name: OnDemand(cuda.place(getattr(parts, name), device=torch.device("cpu")), CUDA, slot)
        for name in ("unet", "vae", "text_encoder")
    }

    clips = PiaEngine(dataclasses.replace(parts, **ashore), lambda: "").animate(ROWS, keep_latents=True)

    assert [clip.error for clip in clips] == [None] * 3
    assert [ashore[name].network.device for name in ashore] == [torch.device("cpu"), CUDA, torch.device("cpu")]


APART, MIXED = "cpu and cuda:0", "torch.float16 and torch.float32"


def query(pipe: PIAPipeline) -> Any:
    """A layer of attention over frames."""
    return pipe.unet.down_blocks[0].motion_modules[0].transformer_blocks[0].attn1.to_q


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda cuda, pipe: cuda.place(pipe.unet.conv_in, device=torch.device("cpu")), APART),
        (lambda cuda, pipe: cuda.place(pipe.unet.time_embedding, device=torch.device("cpu")), APART),
        (lambda cuda, pipe: cuda.place(query(pipe), dtype=torch.float32), MIXED),
        (
            lambda cuda, pipe: cuda.place(pipe.vae.post_quant_conv, dtype=torch.float32),
            MIXED,
        ),
    ],
    ids=["convolution", "linear", "attention", "decoder"],
)
def test_it_would_be_seen(cuda, spoil, complaint):
    pipe = moved(cuda, build())
    spoil(cuda, pipe)

    with pytest.raises(Exception, match=complaint):
        PiaEngine.from_pipeline(pipe).animate(ROWS[:1])


def full(cuda: FakeCuda) -> PIAPipeline:
    with torch.device("meta"):
        pipe = baselines.pipeline("full")
    pipe.scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    return moved(cuda, pipe)


@pytest.mark.long
def test_the_full_network_draws_what_a_gpu_can_count(cuda):
    """More pixels than heads of one kernel call; cuDNN is not used for them."""
    asked = {"num_frames": 16, "num_inference_steps": 1, "width": 768, "height": 768, "image": picture(1, 768, 768)}

    draw(cuda, PiaEngine.from_pipeline(full(cuda)), [shot(1, **asked), shot(2, guidance_scale=1.0, **asked)])

    over_frames = {(shape[1], cudnn) for shape, cudnn in cuda.attended if shape[2] == 16 and shape[0] == 3}
    assert (65_535, False) in over_frames
    assert (96 * 96 * 8 - 65_535, False) in over_frames
    assert not any(cudnn for _, cudnn in over_frames)
    assert {shape[3] for shape, _ in cuda.attended} >= {40, 80, 160, 512}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shots"), [("ddim", ROWS), ("euler_ancestral", ROWS[:2])], ids=named)
@torch.inference_mode()
def test_a_real_gpu_draws_what_a_cpu_draws_and_is_waited_for_by_nobody(name, shots):
    pipe = scheduled(build(), name)
    here = PiaEngine.from_pipeline(pipe).animate(shots, keep_latents=True)
    engine = PiaEngine.from_pipeline(copy.deepcopy(pipe).to("cuda", torch.float16))
    there = engine.animate(shots, keep_latents=True)

    rows = [started(engine, each) for each in shots]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampling.denoise(engine._parts.unet, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    for one, other, row in zip(here, there, rows, strict=True):
        assert torch.equal(other.latents, row.latents[0].cpu())
        assert float((other.latents.float() - one.latents).std() / one.latents.std()) <= 0.05
        assert float(np.abs(other.frames.astype(int) - one.frames.astype(int)).mean()) <= 4
