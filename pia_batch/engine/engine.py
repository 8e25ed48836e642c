"""PIA on one device: a batch of shots in, one clip each out.

Row k of any batch is what a single `diffusers.PIAPipeline` call with that row's settings and
`torch.Generator("cpu").manual_seed(seed)` draws. The batch only makes it cheaper. The engine knows nothing of Ray,
storage and manifests; torch, diffusers and transformers are imported in this package only.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pia_batch.config import ModelConfig
from pia_batch.config.speed_presets import EXACT, PRESETS, Speed
from pia_batch.engine import compiling, loading, sampling, self_test
from pia_batch.engine.batch_limit import BatchLimit, is_out_of_memory
from pia_batch.engine.conditioning import ImageEncoder, Prompt, PromptEncoder
from pia_batch.engine.decoding import FrameDecoder
from pia_batch.engine.image_prompts import ImagePrompt, ImagePromptEncoder
from pia_batch.engine.shared_weights import SharedParts
from pia_batch.engine.shots import Clip, Shot
from pia_batch.errors import DeviceMemoryError, NonFiniteError, RequestError
from pia_batch.weights.identity import engine_id, resolved_dtype
from pia_batch.weights.resolve import resolve

if TYPE_CHECKING:
    from diffusers import PIAPipeline


class PiaEngine:
    """One PIA model on one device, loaded once, for any number of batches.

    Make one with `load` or `from_pipeline`. It keeps bounded caches and no other state between calls. Not for several
    threads at a time.
    """

    shot = Shot
    """What `animate` takes, for those who have the engine but must not import torch."""

    def __init__(self, components: loading.Components, identify: Callable[[], str], *, embedded: bool = False) -> None:
        """An engine of components that nobody else changes.

        Args:
            components: as `loading` makes them.
            identify: what makes `engine_id`, called once at most.
            embedded: whether this is the embedded model with nothing laid over it, whose clips are known.
        """
        self._parts = components
        self._identify = identify
        self._embedded = embedded
        self.limits = components.limits
        """What a shot may ask for."""
        self._prompts = PromptEncoder(components.tokenizer, components.text_encoder)
        self._images = ImageEncoder(components.vae)
        self._image_prompts = None
        if components.image_encoder is not None:
            self._image_prompts = ImagePromptEncoder(
                components.unet, components.image_encoder, components.image_processor, components.device
            )
        self._decoder = FrameDecoder(components.vae, components.call)
        self._batch_limit = BatchLimit()

    @classmethod
    def load(cls, model: ModelConfig, device: str | None = None, shared: SharedParts | None = None) -> PiaEngine:
        """The engine of the weights that `model` names.

        Args:
            model: what to load; `ModelConfig()` is the embedded checkpoint.
            device: such as `cpu` or `cuda:0`; None: a GPU if there is one.
            shared: parts of other engines on this device, to be used again; see `model_cache.ModelCache`.

        Raises:
            ConfigError: the weights are missing, unsafe, unfit for PIA, or do not fit each other.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = resolve(model)
        dtype = resolved_dtype(model, on_gpu=place.type != "cpu")
        parts = loading.load(model, found, place, getattr(torch, dtype), shared)
        kept = {"name", "dtype", "memory", "scheduler", "speed", "compile"}
        plain = ModelConfig(**{name: getattr(model, name) for name in kept})
        embedded = model.model_copy(update={"sha256": {}}) == plain
        return cls(parts, lambda: engine_id(model, found, dtype), embedded=embedded)

    @classmethod
    def from_pipeline(
        cls, pipe: PIAPipeline, speed: Speed = "exact", compiler: compiling.Compiler | None = None
    ) -> PiaEngine:
        """The engine of a pipeline's networks, with its scheduler, device and dtype. The pipeline stays as it is.

        Args:
            pipe: what to draw with.
            speed: as `ModelConfig.speed`.
            compiler: what calls the UNet and the VAE; None: their own calls. Several engines may share one.

        Raises:
            ConfigError: the pipeline has FreeInit or offloading switched on, or an IP-Adapter that does not read
                images, or several.
        """
        call = compiler or compiling.directly
        parts = dataclasses.replace(loading.adopt(pipe), shortcuts=PRESETS[speed], call=call)
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

    def under(self, scheduler: Any) -> PiaEngine:
        """The same networks under another scheduler of diffusers, in an engine of its own."""
        return PiaEngine(dataclasses.replace(self._parts, scheduler=scheduler), self._identify, embedded=self._embedded)

    def check(self) -> None:
        """Draw a small fixed request, alone and among others, and return if it came out as it should.

        The embedded model's clip is compared with a stored answer, any model's with itself. Takes two small calls of
        the UNet, four of the embedded model's. Says nothing of the configured scheduler and speed, which it does not
        use.

        Raises:
            BrokenDeviceError: it came out as another clip, flat, or not at all.
            ConfigError: the stored answer is missing, or of another embedded model.
        """
        scheduler = self_test.scheduler(self._parts.scheduler, embedded=self._embedded)
        exact = dataclasses.replace(self._parts, scheduler=scheduler, shortcuts=EXACT)
        self_test.check(PiaEngine(exact, self._identify, embedded=self._embedded), embedded=self._embedded)

    def animate(self, shots: Sequence[Shot], *, keep_latents: bool = False) -> list[Clip]:
        """Draw every shot.

        Shots of equal frames and size are drawn together, whatever else differs. A batch that the device has no
        memory for is halved until it fits. Later batches start with what fitted, and grow again after a while.

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
                self.limits.check(shot)
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
        clips: list[Clip] = []
        tried_alone = False
        while len(clips) < len(shots):
            loads = [_load(shot) for shot in shots[len(clips) :]]
            taken = self._batch_limit.take(loads)
            drawn = self._draw_if_it_fits(shots[len(clips) : len(clips) + taken], keep_latents)
            if isinstance(drawn, list):
                self._batch_limit.fitted(loads, taken)
                clips += drawn
                tried_alone = False
            else:
                self._batch_limit.overflowed(loads, taken)
                if taken == 1 and tried_alone:  # once more, as it may have been another's moment of need
                    clips.append(Clip(error=drawn))
                tried_alone = taken == 1 and not tried_alone
        return clips

    def _draw_if_it_fits(self, shots: Sequence[Shot], keep_latents: bool) -> list[Clip] | DeviceMemoryError:
        """The clips; or, with nothing of the attempt left in memory, that there is too little of it."""
        try:
            return self._draw_together(shots, keep_latents)
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            reason = str(err)
        # Only here, with the exception gone, does its traceback no longer hold the tensors that filled the memory.
        gc.collect()
        if self._parts.device.type == "cuda":
            torch.cuda.empty_cache()
        return DeviceMemoryError(
            f"{self.device} has too little memory for this request alone; lower its num_frames, width or height, or "
            f"set model.memory to low: {reason}"
        )

    def _draw_together(self, shots: Sequence[Shot], keep_latents: bool) -> list[Clip]:
        began = time.perf_counter()
        prompts = [self._prompts.encode(shot.prompt, shot.clip_skip) for shot in shots]
        started = [self._start(shot, prompt) for shot, prompt in zip(shots, prompts, strict=True)]
        rows = [row for row in started if isinstance(row, sampling.Row)]
        sampling.denoise(self._parts.unet, rows, self._parts.call)
        frames = iter(self._decoder.decode([row.latents for row in rows]))
        outcomes = [next(frames) if isinstance(row, sampling.Row) else row for row in started]
        seconds = _shares(time.perf_counter() - began, started)
        return [
            _clip(outcome, prompt, share, row if keep_latents else None)
            for outcome, prompt, share, row in zip(outcomes, prompts, seconds, started, strict=True)
        ]

    def _start(self, shot: Shot, prompt: Prompt) -> sampling.Row | RequestError:
        negative = self._prompts.encode(shot.negative_prompt) if shot.guided else None
        if not (prompt.is_finite and (negative is None or negative.is_finite)):
            return NonFiniteError("the text encoder's embedding of the prompt holds NaN or infinity")
        try:
            posterior = self._images.encode(shot.image)
            return sampling.start(shot, self._parts, posterior, prompt, negative, self._image_prompt(shot))
        except RequestError as err:
            return err

    def _image_prompt(self, shot: Shot) -> ImagePrompt | None:
        if self._image_prompts is None:
            return None
        return self._image_prompts.encode(shot.image if shot.ip_adapter_image is None else shot.ip_adapter_image)


def _load(shot: Shot) -> int:
    """What the memory of a batch grows with: the pixels of all samples that the UNet sees at once."""
    return shot.num_frames * shot.width * shot.height * (2 if shot.guided else 1)


def _shares(seconds: float, rows: Sequence[sampling.Row | RequestError]) -> list[float]:
    """The time of a batch, split by how many UNet samples each row took."""
    costs = [row.unet_samples if isinstance(row, sampling.Row) else 0 for row in rows]
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
