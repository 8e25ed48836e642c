"""Nothing in the denoising loop waits for the device: shown on a fake device that reports waits, with CPU results."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from devices import PLACE, Machine
from diffusers import PIAPipeline
from pipelines import build, shot
from schedulers import SCHEDULERS, scheduled

from pia_batch.engine import PiaEngine, Shot, loading, sampling
from pia_batch.engine.decoding import FrameDecoder
from pia_batch.errors import NonFiniteError

# diffusers' sigma schedulers hand numpy a tensor in a way that numpy 2 wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROWS = [
    shot(1, guidance_scale=3.0, num_frames=2, num_inference_steps=4),
    shot(2, guidance_scale=1.0, num_frames=2, num_inference_steps=3, eta=0.7, strength=0.8),
]


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    return build()


def started(pipe: PIAPipeline, row: Shot, **elsewhere: Any) -> sampling.Row:
    parts = dataclasses.replace(loading.adopt(pipe), **elsewhere)
    engine = PiaEngine(parts, lambda: "")
    posterior, prompt = engine._images.encode(row.image), engine._prompts.encode(row.prompt)
    negative = engine._prompts.encode(row.negative_prompt) if row.guided else None
    return sampling.start(row, parts, posterior, prompt, negative, None)


@pytest.mark.long
@pytest.mark.parametrize(("name", "settings"), SCHEDULERS, ids=str)
@torch.inference_mode()
def test_no_step_of_any_scheduler_waits_for_the_device_and_the_numbers_are_those_of_a_cpu(pipe, name, settings):
    own = scheduled(pipe, name, **settings)
    here = [started(own, row) for row in ROWS]
    sampling.denoise(own.unet, here)

    with Machine() as machine:
        there = [started(own, row, device=PLACE) for row in ROWS]
        machine.waits.clear()
        sampling.denoise(own.unet, there)

    assert machine.waits == []
    for one, other in zip(here, there, strict=True):
        assert other.latents.device == PLACE
        # Not to the last bit: elsewhere the UNet takes other kernels.
        assert float((other.latents.here - one.latents).abs().max()) <= 1e-5


@torch.inference_mode()
def test_without_it_a_scheduler_makes_the_host_wait(pipe, monkeypatch):
    monkeypatch.setattr(sampling, "AsyncTransfers", contextlib.nullcontext)
    own = scheduled(pipe, "euler_ancestral")

    with Machine() as machine:
        rows = [started(own, row, device=PLACE) for row in ROWS]
        machine.waits.clear()
        sampling.denoise(own.unet, rows)

    assert machine.waits == ["a copy to the device"] * 6  # the noise of four steps, and of two


@torch.inference_mode()
def test_decoding_waits_once_for_all_frames_and_flags(pipe):
    latents = [torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    latents[1][0, 0, 0, 0, 0] = torch.nan
    expected = FrameDecoder(pipe.vae).decode(latents)
    machine = Machine()

    with machine:
        frames = FrameDecoder(pipe.vae).decode([machine.remote(row) for row in latents])

    assert len(machine.waits) == 2, "for the flags of the frames, and then, which takes no time, for those of latents"
    assert isinstance(frames[1], NonFiniteError)
    for index in (0, 2):
        assert int(np.abs(frames[index].astype(int) - expected[index]).max()) <= 1
