"""Truth of prompt travel: single calls of the pipeline whose UNet gets another text for every frame, by a hook."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import PIAPipeline
from pipelines import Truth, single_call

from pia_batch.engine import Shot

Keys = list[tuple[int, str]]


@torch.no_grad()
def truth_of(pipe: PIAPipeline, shot: Shot) -> Truth:
    """Call the pipeline once, with the texts of each frame mixed here, frame by frame, as embeddings."""
    positive = embeddings(pipe, shot, list(shot.prompt_keys), shot.clip_skip)
    negative = embeddings(pipe, shot, list(shot.negative_keys), None)
    texts = torch.cat([negative, positive]) if shot.guidance_scale > 1 else positive
    plain = dataclasses.replace(shot, prompt=shot.prompt_keys[0].prompt, prompts=None, negative_prompts=None)
    with text_per_frame(pipe.unet, texts):
        return single_call(pipe, plain)


@contextlib.contextmanager
def text_per_frame(unet: Any, texts: torch.Tensor) -> Iterator[None]:
    """Give the stock UNet these embeddings, (samples x frames, tokens, features), inside of a block."""

    def replaced(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"encoder_hidden_states": texts}

    hook = unet.register_forward_pre_hook(replaced, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def embeddings(pipe: PIAPipeline, shot: Shot, keys: Keys, clip_skip: int | None) -> torch.Tensor:
    """Return the text of each frame, (frames, tokens, features), by the formulas of the documentation."""
    of = {text: _encoded(pipe, text, clip_skip) for _, text in keys}
    if shot.returns:
        keys = [*keys, (shot.num_frames, keys[0][1])]
    frames = []
    for frame in range(shot.num_frames):
        start, before = max(key for key in keys if key[0] <= frame)
        later = [key for key in keys if key[0] > frame]
        if not later or shot.prompt_interpolation == "hold":
            frames.append(of[before])
            continue
        end, after = min(later)
        held = min(start + round((end - start) * shot.prompt_hold), end - 1)
        share = max(0.0, (frame - held) / (end - held))
        frames.append(_mixed(of[before], of[after], share, shot.prompt_interpolation))
    return torch.cat(frames)


def _mixed(before: torch.Tensor, after: torch.Tensor, share: float, interpolation: str) -> torch.Tensor:
    dot = float((before / before.norm() * (after / after.norm())).sum())
    if interpolation == "linear" or abs(dot) > 0.9995:
        return (1 - share) * before + share * after
    omega = math.acos(dot)
    return (math.sin((1 - share) * omega) * before + math.sin(share * omega) * after) / math.sin(omega)


def _encoded(pipe: PIAPipeline, text: str, clip_skip: int | None) -> torch.Tensor:
    text = pipe.maybe_convert_prompt(text, pipe.tokenizer)
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids.to(pipe.device)
    output = pipe.text_encoder(ids, output_hidden_states=True)
    if clip_skip is None:
        return output.last_hidden_state
    return pipe.text_encoder.final_layer_norm(output.hidden_states[-(clip_skip + 1)])


def worst(clip: Any, truth: Truth) -> float:
    """Return the largest difference of the latents."""
    assert clip.error is None, clip.error
    assert np.abs(clip.frames.astype(int) - truth.frames.astype(int)).max() <= 1
    return float((clip.latents - truth.latents).abs().max())
