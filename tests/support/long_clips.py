"""Long clips by brute force: every window by the UNet's own call, in plain loops over frames, windows and steps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import PIAPipeline
from diffusers.models.attention import FreeNoiseTransformerBlock
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from PIL import Image
from pipelines import Truth, coefficients, free_init, single_call

from pia_batch.config.speed_presets import PRESETS, Speed, whole_evaluations
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


class Features:
    """Features before the last layers of the stock UNet: kept at whole evaluations, put in place at the others."""

    def __init__(self, unet: Any, layers: int) -> None:
        block = unet.up_blocks[-1]
        self._layer = block.resnets[len(block.resnets) - layers] if layers else None
        self._skipped = unet.conv_in.out_channels
        self._kept: dict[Any, torch.Tensor] = {}

    @contextlib.contextmanager
    def of(self, key: Any, *, whole: bool) -> Iterator[None]:
        """Context of one call of the UNet; calls with the same key have the same features."""

        def hook(_: Any, args: Any, named: dict[str, Any]) -> Any:
            given = named["input_tensor"]
            if whole:
                self._kept[key] = given
                return None
            joined = torch.cat([self._kept[key][:, : -self._skipped], given[:, -self._skipped :]], dim=1)
            return args, named | {"input_tensor": joined}

        if self._layer is None:
            yield
            return
        handle = self._layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _image_prompts(pipe: PIAPipeline, shot: Shot) -> dict[bool, Any]:
    """Return the UNet's further conditions of the unconditional and of the conditional half."""
    if pipe.unet.encoder_hid_proj is None:
        return {False: None, True: None}
    pipe.set_ip_adapter_scale(shot.ip_adapter_scale)
    images = [shot.ip_adapter_image or shot.image]
    (embeds,) = pipe.prepare_ip_adapter_image_embeds(images, None, torch.device("cpu"), 1, shot.guidance_scale > 1)
    halves = embeds.to(pipe.unet.dtype).chunk(2)
    return {False: {"image_embeds": [halves[0]]}, True: {"image_embeds": [halves[-1]]}}


def _options(scheduler: Any, **offered: Any) -> dict[str, Any]:
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in taken}


@torch.no_grad()
def by_brute_force(
    pipe: PIAPipeline,
    shot: Shot,
    frame_texts: tuple[torch.Tensor, torch.Tensor] | None = None,
    speed: Speed = "exact",
) -> Truth:
    """Generate a clip of more frames than a window.

    Args:
        pipe: The pipeline.
        shot: The shot.
        frame_texts: Positive and negative text of every frame, (F, tokens, features) each; None: those of the shot.
        speed: Speed preset: between whole evaluations, the last layers run over each window's latest features.
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

    prompts = _image_prompts(pipe, shot)
    features = Features(pipe.unet, PRESETS[speed].layers)

    def predict(sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, half: bool, whole: bool) -> Any:
        total, weight = torch.zeros_like(latents), torch.zeros(shot.num_frames, dtype=dtype)
        for start in starts(shot):
            frames = [(start + k) % shot.num_frames for k in range(length)]
            mask = likeness[frames].view(1, 1, -1, 1, 1).expand(1, 1, -1, *size)
            still = image[:, :, None].expand(1, 4, length, *size)
            seen = torch.cat([sample[:, :, frames], mask, still], dim=1)
            with features.of((start, half), whole=whole):
                noise = pipe.unet(seen, timestep, text[frames], added_cond_kwargs=prompts[half]).sample
            for k, frame in enumerate(frames):
                total[:, :, frame] += min(k + 1, length - k) * noise[:, :, k]
                weight[frame] += min(k + 1, length - k)
        return total / weight.view(1, 1, -1, 1, 1)

    options = _options(scheduler, eta=shot.eta, generator=generator)
    with free_init(pipe, shot):
        for number in range(max(1, shot.free_init_iters)):
            if shot.free_init_iters:
                steps = shot.num_inference_steps
                latents, _ = pipe._apply_free_init(latents, number, steps, latents.device, dtype, generator)
            wholes = whole_evaluations(PRESETS[speed], [float(each) for each in timesteps], 1000)
            for timestep, whole in zip(timesteps, wholes, strict=True):
                sample = scheduler.scale_model_input(latents, timestep)
                noise = predict(sample, timestep, texts, half=True, whole=whole)
                if guided:
                    other = predict(sample, timestep, nothing, half=False, whole=whole)
                    noise = other + shot.guidance_scale * (noise - other)
                latents = scheduler.step(noise, timestep, latents, **options).prev_sample
    video = pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="pil")[0]
    return Truth(latents[0], np.stack([np.asarray(frame) for frame in video]))
