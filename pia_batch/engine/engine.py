"""PIA engine: one loaded model on one device, which turns a batch of shots into one clip for each shot.

Row k of any batch equals the result of a single `diffusers.PIAPipeline` call with that row's settings and
`torch.Generator("cpu").manual_seed(seed)`. Batching only lowers the cost.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from pia_batch.config import ModelConfig, contexts
from pia_batch.config.arithmetic import Arithmetic
from pia_batch.config.speed_presets import EXACT, PRESETS, Speed
from pia_batch.engine import compiling, loading, sampling, self_test
from pia_batch.engine.batch_limit import CPU_BATCH_PIXELS, BatchLimit
from pia_batch.engine.chaining import Film
from pia_batch.engine.conditioning import ImageEncoder, Prompt, PromptEncoder
from pia_batch.engine.decoding import FrameDecoder
from pia_batch.engine.image_prompts import ImagePrompt, ImagePromptEncoder
from pia_batch.engine.shared_weights import SharedParts
from pia_batch.engine.shots import Clip, Shot
from pia_batch.engine.windows import sliding_windows_of, windows_of
from pia_batch.errors import DeviceMemoryError, NonFiniteError, RequestError, is_out_of_memory, message_of
from pia_batch.schema.key_prompts import KeyPrompt
from pia_batch.weights.identity import engine_id, resolved_dtype
from pia_batch.weights.resolve import resolve

if TYPE_CHECKING:
    from diffusers import PIAPipeline


class PiaEngine:
    """One PIA model on one device, loaded once, for any number of batches.

    Create it with `load` or `from_pipeline`. It keeps bounded caches and no other state between calls. It is not
    thread-safe.
    """

    shot = Shot
    """Class of the arguments of `animate`, for callers that hold an engine but must not import torch."""

    def __init__(self, components: loading.Components, identify: Callable[[], str], *, embedded: bool = False) -> None:
        """Create an engine from components that no other code modifies.

        Args:
            components: Networks and scheduler, as `loading` returns them.
            identify: Function that computes `engine_id`; called at most once.
            embedded: True for the embedded model without adapters; the self-test then compares its clip with the
                stored one.
        """
        self._parts = components
        self._identify = identify
        self._embedded = embedded
        self.limits = components.limits
        """Range of settings that this model supports; `Limits`."""
        self._prompts = PromptEncoder(components.tokenizer, components.text_encoder)
        self._images = ImageEncoder(components.vae)
        self._image_prompts = None
        if components.image_encoder is not None:
            self._image_prompts = ImagePromptEncoder(
                components.unet, components.image_encoder, components.image_processor, components.device
            )
        self._decoder = FrameDecoder(components.vae, components.call, per_frame=components.vae_decode == "per_frame")
        self._batch_limit = BatchLimit(CPU_BATCH_PIXELS if components.device.type == "cpu" else None)

    @classmethod
    def load(cls, model: ModelConfig, device: str | None = None, shared: SharedParts | None = None) -> PiaEngine:
        """Load the weights that `model` names and return their engine.

        Args:
            model: Model to load; `ModelConfig()` is the embedded checkpoint.
            device: Torch device such as `cpu` or `cuda:0`. None: a GPU if there is one, else the CPU.
            shared: Parts of other engines on this device, to be reused; see `model_cache.ModelCache`.

        Raises:
            ConfigError: The weights are missing, unsafe, unsuitable for PIA, or do not fit each other.
            StorageError: An object store refused or did not answer.
            torch.OutOfMemoryError: The device has too little memory for the weights.
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
        cls,
        pipe: PIAPipeline,
        speed: Speed = "exact",
        compiler: compiling.Compiler | None = None,
        arithmetic: Arithmetic = "diffusers",
    ) -> PiaEngine:
        """Return an engine that uses a pipeline's networks, scheduler, device and dtype; leave the pipeline unchanged.

        Args:
            pipe: Pipeline whose networks generate the clips.
            speed: Speed preset, as in `ModelConfig.speed`.
            compiler: Compiler that calls the UNet and the VAE. None: they are called without compilation. Several
                engines may share one compiler.
            arithmetic: Implementation of PIA whose results the clips equal, as in `ModelConfig.arithmetic`; the
                scheduler stays that of the pipeline.

        Raises:
            ConfigError: The pipeline has FreeInit or offloading enabled, several IP-Adapters, or an IP-Adapter that
                does not read images.
        """
        call = compiler or compiling.directly
        parts = dataclasses.replace(loading.adopt(pipe, arithmetic), shortcuts=PRESETS[speed], call=call)
        return cls(parts, lambda: loading.adopted_id(parts))

    @cached_property
    def engine_id(self) -> str:
        """Hash of weights, scheduler, dtype and engine version, 32 hexadecimal digits.

        For an engine from `load` it is `weights.identity.engine_id`.
        """
        return self._identify()

    @property
    def device(self) -> str:
        """Device of the networks, such as `cpu` or `cuda:0`."""
        return str(self._parts.device)

    @property
    def dtype(self) -> str:
        """Dtype of the UNet and the VAE: `float32`, `float16` or `bfloat16`."""
        return str(self._parts.dtype).removeprefix("torch.")

    def with_scheduler(self, scheduler: Any) -> PiaEngine:
        """Return a second engine that uses the same networks with another diffusers scheduler."""
        return PiaEngine(dataclasses.replace(self._parts, scheduler=scheduler), self._identify, embedded=self._embedded)

    def fresh(self) -> PiaEngine:
        """Return a second engine that uses the same networks, and has not seen which batches fit."""
        return self.with_scheduler(self._parts.scheduler)

    def check(self) -> None:
        """Generate a small fixed clip, alone and within a batch, and return if both are as expected.

        For the embedded model, compare the clip with a stored one; for every model, compare it with itself. The
        self-test takes two small UNet calls, four for the embedded model. It does not use, and so does not test, the
        configured scheduler and speed preset.

        Raises:
            BrokenDeviceError: The clip differs from the expected one, is flat, or could not be generated.
            ConfigError: The stored clip is missing, or belongs to another embedded model.
        """
        scheduler = self_test.scheduler(self._parts.scheduler, embedded=self._embedded)
        exact = dataclasses.replace(self._parts, scheduler=scheduler, shortcuts=EXACT)
        self_test.check(PiaEngine(exact, self._identify, embedded=self._embedded), embedded=self._embedded)

    def animate(self, shots: Sequence[Shot], *, keep_latents: bool = False) -> list[Clip]:
        """Generate a clip for every shot.

        Shots with the same size and the same number of frames, or of frames in a window, share a batch, whatever else
        differs. A batch that does not fit into the device's memory is halved until it fits. Later batches start with
        the size that fitted, and grow again after a while. On a CPU batches are also no larger than its caches bear.

        Args:
            shots: Shots with any mixture of settings. An empty sequence returns an empty list.
            keep_latents: True to return the latents that the VAE decoded, too.

        Returns:
            One clip per shot, in the order of `shots`. A failed shot has a clip with an `error`:
            `UnsupportedSettingError`, `ImageUnreadableError`, `NonFiniteError` or `DeviceMemoryError`. A failed shot
            does not affect the others.
        """
        clips: dict[int, Clip] = {}
        groups: dict[Hashable, list[int]] = {}
        for index, shot in enumerate(shots):
            try:
                self.limits.check(shot)
            except RequestError as err:
                clips[index] = Clip(error=err)
            else:
                groups.setdefault(self._shape(shot), []).append(index)
        with torch.inference_mode():
            for indices in groups.values():
                generated = self._generate([shots[index] for index in indices], keep_latents)
                clips.update(zip(indices, generated, strict=True))
        return [clips[index] for index in range(len(shots))]

    def _generate(self, shots: Sequence[Shot], keep_latents: bool) -> list[Clip]:
        """Generate clips for shots of one size, in batches no larger than the known limit."""
        clips: list[Clip] = []
        tried_alone = False
        while len(clips) < len(shots):
            loads = [self._memory_load(shot) for shot in shots[len(clips) :]]
            size = self._batch_limit.batch_size(loads)
            outcome = self._generate_if_it_fits(shots[len(clips) : len(clips) + size], keep_latents)
            if isinstance(outcome, list):
                self._batch_limit.record_success(loads, size)
                clips += outcome
                tried_alone = False
            else:
                self._batch_limit.record_overflow(loads, size)
                # A single row gets a second try: another process may have used the memory for a moment.
                if size == 1 and tried_alone:
                    clips.append(Clip(error=outcome))
                tried_alone = size == 1 and not tried_alone
        return clips

    def _shape(self, shot: Shot) -> Hashable:
        """Return what the shots of a UNet call have in common."""
        known = self.limits.max_frames
        piece = Film(shot, known).next_piece
        return windows_of(piece, known).length, shot.width, shot.height, sliding_windows_of(piece, known)

    def _memory_load(self, shot: Shot) -> int:
        """Return the shot's share of a batch's memory, in pixels of all samples that the UNet processes at once."""
        known = self.limits.max_frames
        windows = windows_of(Film(shot, known).next_piece, known)
        frames: float = windows.length
        if self._parts.shortcuts != EXACT and not windows.is_single:
            frames += contexts.DEEP_SHARE * len(windows.starts) * windows.length
        return int(frames * shot.width * shot.height * (2 if shot.guided else 1))

    def _generate_if_it_fits(self, shots: Sequence[Shot], keep_latents: bool) -> list[Clip] | DeviceMemoryError:
        """Return the clips, or an error if the device's memory is too small; then free what the attempt allocated."""
        try:
            return self._generate_together(shots, keep_latents)
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            reason = message_of(err)
        # Collect here, outside the handler: the exception's traceback holds the tensors that filled the memory.
        gc.collect()
        if self._parts.device.type == "cuda":
            torch.cuda.empty_cache()
        return DeviceMemoryError(
            f"{self.device} has too little memory for this request alone; lower its num_frames, width or height, or "
            f"set model.memory to low: {reason}"
        )

    def _generate_together(self, shots: Sequence[Shot], keep_latents: bool) -> list[Clip]:
        began = time.perf_counter()
        prompts = [self._prompt(shot, shot.prompt_keys, shot.clip_skip) for shot in shots]
        negatives = [self._prompt(shot, shot.negative_keys) if shot.guided else None for shot in shots]
        films = [Film(shot, self.limits.max_frames) for shot in shots]
        errors: dict[int, RequestError] = {}
        left = list(range(len(shots)))
        while left:
            texts = {index: (prompts[index], negatives[index]) for index in left}
            errors |= self._add_pieces({index: films[index] for index in left}, texts, keep_latents)
            left = [index for index in left if index not in errors and not films[index].is_complete]
        seconds = time.perf_counter() - began
        total = max(1, sum(film.unet_samples for film in films))
        return [
            Clip(
                None if index in errors else film.frames,
                latents=film.latents if keep_latents and index not in errors else None,
                prompt_tokens=prompt.num_tokens,
                prompt_truncated=prompt.truncated,
                device_seconds=seconds * film.unet_samples / total,
                error=errors.get(index),
            )
            for index, (film, prompt) in enumerate(zip(films, prompts, strict=True))
        ]

    def _add_pieces(
        self, films: dict[int, Film], texts: Mapping[int, tuple[Prompt, Prompt | None]], keep_latents: bool
    ) -> dict[int, RequestError]:
        """Generate the next piece of each film; return the errors of those that have none."""
        errors: dict[int, RequestError] = {}
        rows: dict[int, sampling.Row] = {}
        for index, film in films.items():
            prompt, negative = texts[index]
            prompt, negative = prompt.of_frames(film.next_frames), negative and negative.of_frames(film.next_frames)
            started = self._start(film.next_piece, prompt, negative, film.generator)
            if isinstance(started, RequestError):
                errors[index] = started
            else:
                rows[index] = started
        sampling.denoise(self._parts.unet, list(rows.values()), self._parts.call)
        decoded = self._decoder.decode([row.latents for row in rows.values()])
        for (index, row), frames in zip(rows.items(), decoded, strict=True):
            films[index].unet_samples += row.unet_samples
            films[index].generator = row.generator
            if isinstance(frames, RequestError):
                errors[index] = frames
            else:
                films[index].add(frames, row.latents[0] if keep_latents else None)
        return errors

    def _start(
        self, shot: Shot, prompt: Prompt, negative: Prompt | None, generator: torch.Generator | None = None
    ) -> sampling.Row | RequestError:
        if not (prompt.is_finite and (negative is None or negative.is_finite)):
            return NonFiniteError("the text encoder's embedding of the prompt holds NaN or infinity")
        try:
            posterior = self._images.encode(shot.image)
            image_prompt = self._image_prompt(shot)
            return sampling.start(shot, self._parts, posterior, prompt, negative, image_prompt, generator)
        except RequestError as err:
            return err

    def _prompt(self, shot: Shot, keys: Sequence[KeyPrompt], clip_skip: int | None = None) -> Prompt:
        return self._prompts.encode_keys(
            keys,
            shot.num_frames,
            clip_skip,
            interpolation=shot.prompt_interpolation,
            hold=shot.prompt_hold,
            wraps=shot.returns,
            scales=self._parts.scales_of(shot),
        )

    def _image_prompt(self, shot: Shot) -> ImagePrompt | None:
        if self._image_prompts is None:
            return None
        return self._image_prompts.encode(shot.image if shot.ip_adapter_image is None else shot.ip_adapter_image)
