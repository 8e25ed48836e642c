"""Long clips by brute force: every window by the UNet's own call, in plain loops over frames, windows and steps."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import PIAPipeline
from diffusers.models.attention import FreeNoiseTransformerBlock
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from PIL import Image
from pipelines import Truth, coefficients, single_call

from pia_batch.engine import Shot


def starts(shot: Shot) -> list[int]:
    """First frames of the windows, as the documentation has them."""
    num_frames, length, overlap = shot.num_frames, shot.context_length, shot.context_overlap
    if shot.loop and shot.motion_curve is None:
        return list(range(0, num_frames, length - overlap))
    count = math.ceil((num_frames - length) / (length - overlap)) + 1
    return [math.floor(index * (num_frames - length) / (count - 1) + 0.5) for index in range(count)]


class _Noise(AnimateDiffFreeNoiseMixin):
    """The noise of diffusers' FreeNoise."""

    vae_scale_factor = 1
    _free_noise_noise_type = "shuffle_context"

    def __init__(self, length: int, stride: int) -> None:
        self._free_noise_context_length, self._free_noise_context_stride = length, stride


def shuffled_noise(shape: tuple[int, ...], length: int, stride: int, generator: torch.Generator, dtype: Any) -> Any:
    """Return noise as diffusers samples and shuffles it."""
    own = _Noise(length, stride)
    return own._prepare_latents_free_noise(1, *shape[1:], dtype, torch.device("cpu"), generator)


class FreeNoisePipeline(PIAPipeline, AnimateDiffFreeNoiseMixin):
    """The stock pipeline with the stock mixin, as the research on it describes how to put them together."""

    def prepare_latents(self, *shape: Any, latents: Any = None) -> torch.Tensor:
        latents = self._prepare_latents_free_noise(*shape, latents=latents)
        noise: torch.Tensor = super().prepare_latents(*shape, latents=latents)
        return noise


def by_stock_free_noise(pipe: PIAPipeline, shot: Shot) -> Truth:
    """Call the stock pipeline with its FreeNoise; its last window is right where (F - L) % S is 0."""
    own = FreeNoisePipeline(**copy.deepcopy(pipe.components))
    own.set_progress_bar_config(disable=True)
    own.enable_free_noise(shot.context_length, shot.context_stride)
    return single_call(own, shot)


def by_whole_free_noise(pipe: PIAPipeline, shot: Shot) -> Truth:
    """Call the stock pipeline with its FreeNoise, in which every window counts with all of its frames."""
    num_frames, length = shot.num_frames, shot.context_length

    def forward(block: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = hidden_states
        total, weight = torch.zeros_like(hidden), torch.zeros(num_frames, dtype=hidden.dtype)
        first = list(range(0, num_frames if shot.loop else num_frames - length + 1, shot.context_stride))
        if not shot.loop and first[-1] + length < num_frames:
            first.append(num_frames - length)
        for start in first:
            frames = [(start + k) % num_frames for k in range(length)]
            part = hidden[:, frames]
            for norm, attend in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
                part = attend(block.pos_embed(norm(part))) + part
            for k, frame in enumerate(frames):
                total[:, frame] += min(k + 1, length - k) * part[:, k]
                weight[frame] += min(k + 1, length - k)
        hidden = total / weight[:, None]
        fed: torch.Tensor = block.ff(block.norm3(hidden)) + hidden
        return fed

    with mock.patch.object(FreeNoiseTransformerBlock, "forward", forward):
        return by_stock_free_noise(pipe, shot)


def by_chain(
    pipe: PIAPipeline,
    shot: Shot,
    piece_texts: Callable[[range], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Truth:
    """Call the stock pipeline for one piece after the other, with one generator.

    Args:
        pipe: The pipeline.
        shot: The shot.
        piece_texts: Context in which the UNet reads the texts of these frames, for a prompt that travels.
    """
    generator = torch.Generator("cpu").manual_seed(shot.seed)
    piece = dataclasses.replace(
        shot, num_frames=shot.context_length, ip_adapter_image=shot.ip_adapter_image or shot.image
    )
    with piece_texts(range(shot.context_length)):
        truth = single_call(pipe, piece, generator)
    latents, frames = [truth.latents], [truth.frames]
    while sum(map(len, frames)) < shot.num_frames:
        piece = dataclasses.replace(piece, image=Image.fromarray(truth.frames[-1]))
        first = sum(map(len, frames)) - 1
        with piece_texts(range(first, first + shot.context_length)):
            truth = single_call(pipe, piece, generator)
        latents.append(truth.latents[:, 1:])
        frames.append(truth.frames[1:])
    return Truth(torch.cat(latents, dim=1)[:, : shot.num_frames], np.concatenate(frames)[: shot.num_frames])


@torch.no_grad()
def by_brute_force(
    pipe: PIAPipeline, shot: Shot, frame_texts: tuple[torch.Tensor, torch.Tensor] | None = None
) -> Truth:
    """Generate a clip of more frames than a window; FreeInit and image prompts are left out.

    Args:
        pipe: The pipeline.
        shot: The shot.
        frame_texts: Positive and negative text of every frame, (F, tokens, features) each; None: those of the shot.
    """
    generator = torch.Generator().manual_seed(shot.seed)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(shot.num_inference_steps)
    dtype, length = pipe.unet.dtype, shot.context_length
    size = (shot.height // pipe.vae_scale_factor, shot.width // pipe.vae_scale_factor)
    shape = (1, 4, shot.num_frames, *size)

    latents = shuffled_noise(shape, length, min(4, length), generator, dtype) * scheduler.init_noise_sigma
    pixels = torch.from_numpy(np.array(shot.image, np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1
    image = pipe.vae.encode(pixels.to(dtype)).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
    image = torch.nn.functional.interpolate(image, size=size)
    timesteps = scheduler.timesteps
    if shot.strength < 1:
        timesteps = timesteps[len(timesteps) - int(shot.num_inference_steps * shot.strength) :]
        fresh = torch.randn(shape, generator=generator, dtype=dtype)
        still = image[:, :, None].repeat(1, 1, shot.num_frames, 1, 1)
        latents = scheduler.add_noise(still, fresh, timesteps[:1])
    likeness = torch.tensor(coefficients(shot), dtype=dtype)
    guided = shot.guidance_scale > 1
    # The pipeline looks for the final norm where transformers 4 kept it.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    texts, nothing = pipe.encode_prompt(
        shot.prompt, "cpu", 1, guided, negative_prompt=shot.negative_prompt, clip_skip=shot.clip_skip
    )
    texts = texts.expand(shot.num_frames, -1, -1) if frame_texts is None else frame_texts[0]
    if guided:
        nothing = nothing.expand(shot.num_frames, -1, -1) if frame_texts is None else frame_texts[1]

    def predict(sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        total, weight = torch.zeros_like(latents), torch.zeros(shot.num_frames, dtype=dtype)
        for start in starts(shot):
            frames = [(start + k) % shot.num_frames for k in range(length)]
            mask = likeness[frames].view(1, 1, -1, 1, 1).expand(1, 1, -1, *size)
            still = image[:, :, None].expand(1, 4, length, *size)
            seen = torch.cat([sample[:, :, frames], mask, still], dim=1)
            noise = pipe.unet(seen, timestep, text[frames]).sample
            for k, frame in enumerate(frames):
                total[:, :, frame] += min(k + 1, length - k) * noise[:, :, k]
                weight[frame] += min(k + 1, length - k)
        return total / weight.view(1, 1, -1, 1, 1)

    for timestep in timesteps:
        sample = scheduler.scale_model_input(latents, timestep)
        noise = predict(sample, timestep, texts)
        if guided:
            other = predict(sample, timestep, nothing)
            noise = other + shot.guidance_scale * (noise - other)
        taken = inspect.signature(scheduler.step).parameters
        options = {name: value for name, value in (("eta", shot.eta), ("generator", generator)) if name in taken}
        latents = scheduler.step(noise, timestep, latents, **options).prev_sample
    video = pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="pil")[0]
    return Truth(latents[0], np.stack([np.asarray(frame) for frame in video]))
