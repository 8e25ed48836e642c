"""The VAE in slices and tiles, against the stock pipeline's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PIAPipeline
from pipelines import build, named, picture, shot, single_call

from pia_batch.engine import PiaEngine
from pia_batch.engine.decoding import FrameDecoder


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    return build()


def tiled(pipe: PIAPipeline) -> PIAPipeline:
    """The same pipeline with a VAE of its own that tiles above 32 pixels, its sample size."""
    own = copy.copy(pipe)
    own.vae = copy.deepcopy(pipe.vae)
    own.vae.enable_tiling()
    return own


def latents(count: int, height: int, width: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, 3, height, width, generator=random) for _ in range(count)]


def decoder_batches(vae: Any) -> list[int]:
    """Record the number of frames in each call of the decoder."""
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@torch.no_grad()
def test_slices_are_decoded_one_frame_at_a_time_and_are_the_same(pipe):
    sliced = copy.deepcopy(pipe.vae)
    sliced.enable_slicing()
    rows = latents(3, 10, 6)
    whole = FrameDecoder(pipe.vae).decode(rows)
    batches = decoder_batches(sliced)

    parts = FrameDecoder(sliced).decode(rows)

    assert batches == [1] * 9
    for part, expected in zip(parts, whole, strict=True):
        assert int(np.abs(part.astype(int) - expected).max()) <= 1
    exact, sliced = copy.deepcopy(pipe.vae).double(), sliced.double()  # where rounding hides nothing
    frames = torch.cat(rows).transpose(1, 2).flatten(0, 1).double()
    assert float((sliced.decode(frames).sample - exact.decode(frames).sample).abs().max()) <= 1e-12


@pytest.mark.parametrize("size", [{"width": 64}, {"height": 72, "width": 40}, {"image": picture(1, 80, 48)}], ids=named)
def test_tiles_draw_what_the_stock_pipeline_draws_with_tiles(pipe, size):
    own = tiled(pipe)
    row = shot(1, **({"width": 48, "height": 32} | size))
    truth, untiled = single_call(own, row), single_call(pipe, row)

    clip = PiaEngine.from_pipeline(own).animate([row], keep_latents=True)[0]

    assert float((clip.latents - truth.latents).abs().max()) <= 1e-5
    assert int(np.abs(clip.frames.astype(int) - truth.frames).max()) <= 1
    assert int(np.abs(untiled.frames.astype(int) - truth.frames).max()) > 1


def test_tiles_leave_frames_of_the_sample_size_alone(pipe):
    row = shot(1, image=picture(1, 32, 32))

    plain, own = (PiaEngine.from_pipeline(each).animate([row])[0] for each in (pipe, tiled(pipe)))

    assert np.array_equal(plain.frames, own.frames)


def test_tiles_and_slices_together_draw_what_tiles_alone_draw(pipe):
    both = tiled(pipe)
    both.vae.enable_slicing()
    rows = [shot(seed, width=56, height=40) for seed in range(2)]
    expected = PiaEngine.from_pipeline(tiled(pipe)).animate(rows)
    batches = decoder_batches(both.vae)

    clips = PiaEngine.from_pipeline(both).animate(rows)

    assert set(batches) == {1}
    for clip, truth in zip(clips, expected, strict=True):
        assert int(np.abs(clip.frames.astype(int) - truth.frames).max()) <= 1
