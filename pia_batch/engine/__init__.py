"""PIA on one device: a batch of shots in, one clip each out.

Row k of any batch is what a single `diffusers.PIAPipeline` call with that row's settings and
`torch.Generator("cpu").manual_seed(seed)` draws. The batch only makes it cheaper. The engine knows nothing of Ray,
storage and manifests; torch, diffusers and transformers are imported in this package only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pia_batch import weights
from pia_batch.config import ModelConfig
from pia_batch.engine import loading, sampling
from pia_batch.engine.conditioning import ImageEncoder, Prompt, PromptEncoder
from pia_batch.engine.decoding import FrameDecoder
from pia_batch.engine.shots import Clip, Shot
from pia_batch.errors import DeviceMemoryError, RequestError

if TYPE_CHECKING:
    from diffusers import PIAPipeline

__all__ = ["Clip", "PiaEngine", "Shot"]


class PiaEngine:
    """One PIA model on one device, loaded once, for any number of batches.

    Make one with `load` or `from_pipeline`. It keeps bounded caches and no other state between calls. Not for several
    threads at a time.
    """

    shot = Shot
    """What `animate` takes, for those who have the engine but must not import torch."""

    def __init__(self, components: loading.Components, identify: Callable[[], str]) -> None:
        self._parts = components
        self._identify = identify
        self._limits = components.limits
        self._prompts = PromptEncoder(components.tokenizer, components.text_encoder)
        self._images = ImageEncoder(components.vae)
        self._decoder = FrameDecoder(components.vae)
        self._room: int | None = None

    @classmethod
    def load(cls, model: ModelConfig, device: str | None = None) -> PiaEngine:
        """The engine of the weights that `model` names.

        Args:
            model: what to load; `ModelConfig()` is the embedded checkpoint.
            device: such as `cpu` or `cuda:0`; None: a GPU if there is one.

        Raises:
            ConfigError: the weights are missing, unsafe, unfit for PIA, or do not fit each other.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = weights.resolve(model)
        dtype = weights.resolved_dtype(model, on_gpu=place.type != "cpu")
        parts = loading.load(model, found, place, getattr(torch, dtype))
        return cls(parts, lambda: weights.engine_id(model, found, dtype))

    @classmethod
    def from_pipeline(cls, pipe: PIAPipeline) -> PiaEngine:
        """The engine of a pipeline's networks, with its scheduler, device and dtype. The pipeline stays as it is.

        Raises:
            ConfigError: the pipeline has an IP-Adapter, FreeInit or offloading switched on.
        """
        parts = loading.adopt(pipe)
        return cls(parts, lambda: loading.adopted_id(parts))

    @cached_property
    def engine_id(self) -> str:
        """Weights, scheduler, dtype and engine version as 32 hexadecimal digits; `weights.engine_id` where loaded."""
        return self._identify()

    @property
    def device(self) -> str:
        """Where the networks are, such as `cpu` or `cuda:0`."""
        return str(self._parts.device)

    @property
    def dtype(self) -> str:
        """What the networks compute in: `float32`, `float16` or `bfloat16`."""
        return str(self._parts.dtype).removeprefix("torch.")

    def animate(self, shots: Sequence[Shot], *, keep_latents: bool = False) -> list[Clip]:
        """Draw every shot.

        Shots of equal frames and size are drawn together, whatever else differs. A batch that the device has no
        memory for is halved until it fits, and later batches start with what fitted.

        Args:
            shots: any mixture; none is an empty list.
            keep_latents: also return what the VAE decoded.

        Returns:
            One clip per shot, in their order. A shot that could not be drawn has a clip with an `error`:
            `UnsupportedSettingError`, `ImageUnreadableError`, `NonFiniteError` or `DeviceMemoryError`. The others are
            none the worse for it.
        """
        clips: dict[int, Clip] = {}
        groups: dict[tuple[int, int, int], list[int]] = {}
        for index, shot in enumerate(shots):
            try:
                self._limits.check(shot)
            except RequestError as err:
                clips[index] = Clip(error=err)
            else:
                groups.setdefault((shot.num_frames, shot.width, shot.height), []).append(index)
        with torch.inference_mode():
            for indices in groups.values():
                drawn = self._draw([shots[index] for index in indices], keep_latents)
                clips.update(zip(indices, drawn, strict=True))
        return [clips[index] for index in range(len(shots))]

    def _draw(self, shots: Sequence[Shot], keep_latents: bool) -> list[Clip]:
        """Clips of shots of one size, in batches no larger than what is known to fit."""
        volume = shots[0].num_frames * shots[0].width * shots[0].height
        clips: list[Clip] = []
        while len(clips) < len(shots):
            most = len(shots) if self._room is None else max(1, self._room // volume)
            batch = shots[len(clips) : len(clips) + most]
            drawn = self._draw_if_it_fits(batch, keep_latents)
            if drawn is None:
                self._room = (len(batch) + 1) // 2 * volume
            else:
                clips += drawn
        return clips

    def _draw_if_it_fits(self, shots: Sequence[Shot], keep_latents: bool) -> list[Clip] | None:
        """The clips; None where several shots together are too much for the device's memory."""
        try:
            return self._draw_together(shots, keep_latents)
        except torch.OutOfMemoryError as err:
            reason = str(err)
        # Only here, with the exception gone, does its traceback no longer hold the tensors that filled the memory.
        if self._parts.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(shots) > 1:
            return None
        return [Clip(error=DeviceMemoryError(f"{self.device} has too little memory: {reason}"))]

    def _draw_together(self, shots: Sequence[Shot], keep_latents: bool) -> list[Clip]:
        began = time.perf_counter()
        prompts = [self._prompts.encode(shot.prompt, shot.clip_skip) for shot in shots]
        started = [self._start(shot, prompt) for shot, prompt in zip(shots, prompts, strict=True)]
        rows = [row for row in started if isinstance(row, sampling.Row)]
        sampling.denoise(self._parts.unet, rows)
        frames = iter(self._decoder.decode([row.latents for row in rows]))
        outcomes = [next(frames) if isinstance(row, sampling.Row) else row for row in started]
        seconds = _shares(time.perf_counter() - began, started)
        return [
            _clip(outcome, prompt, share, row if keep_latents else None)
            for outcome, prompt, share, row in zip(outcomes, prompts, seconds, started, strict=True)
        ]

    def _start(self, shot: Shot, prompt: Prompt) -> sampling.Row | RequestError:
        posterior = self._images.encode(shot.image)
        negative = self._prompts.encode(shot.negative_prompt) if shot.guided else None
        try:
            return sampling.start(shot, self._parts, posterior, prompt, negative)
        except RequestError as err:
            return err


def _shares(seconds: float, rows: Sequence[sampling.Row | RequestError]) -> list[float]:
    """The time of a batch, split by how many UNet samples each row took."""
    costs = [row.shot.num_steps * row.unet_samples if isinstance(row, sampling.Row) else 0 for row in rows]
    return [seconds * cost / max(1, sum(costs)) for cost in costs]


def _clip(
    outcome: NDArray[np.uint8] | RequestError,
    prompt: Prompt,
    seconds: float,
    row: sampling.Row | RequestError | None,
) -> Clip:
    latents = row.latents[0].cpu() if isinstance(row, sampling.Row) else None
    frames, error = (None, outcome) if isinstance(outcome, RequestError) else (outcome, None)
    return Clip(
        frames,
        latents=latents,
        prompt_tokens=prompt.num_tokens,
        prompt_truncated=prompt.truncated,
        device_seconds=seconds,
        error=error,
    )
