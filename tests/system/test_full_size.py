"""The full network of Stable Diffusion 1.5 and PIA, with random weights, for real: on the CPU, in float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pipelines import picture, shot, single_call

from pia_batch.engine import PiaEngine
from pia_batch.engine.benchmark import baselines

log = logging.getLogger(__name__)

SIDE, FRAMES, STEPS = 64, 4, 2


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several wait for each other in loops that count as work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("one_thread")
def test_the_full_network_generates_what_single_calls_generate() -> None:
    """Needs 7 GB of memory, and logs how far the latents are apart."""
    pipe = baselines.pipeline("full")
    size = {"width": SIDE, "height": SIDE, "num_frames": FRAMES, "num_inference_steps": STEPS}
    rows = [
        shot(seed, image=picture(seed, SIDE, SIDE), motion_scale=seed, guidance_scale=guidance, **size)
        for seed, guidance in ((1, 7.5), (2, 1.0))
    ]

    truths = [single_call(pipe, row) for row in rows]
    clips = PiaEngine.from_pipeline(pipe).animate(rows, keep_latents=True)

    for clip, truth in zip(clips, truths, strict=True):
        assert clip.latents is not None
        largest = float(truth.latents.abs().max())
        distance = float((clip.latents - truth.latents).abs().max())
        log.info("latents largest=%.1f distance=%.1e", largest, distance)
        assert distance <= 1e-5 * largest
        assert int(np.abs(clip.frames.astype(int) - truth.frames.astype(int)).max()) <= 1
