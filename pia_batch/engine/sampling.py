"""Sampling: denoises many rows together, each with its own schedule.

Every row owns a scheduler, a generator and its latents. Only the UNet processes the rows together, with one timestep
for each row. So steps, strength, eta, guidance and the solver's history belong to the row, with any scheduler, and a
row's schedule does not depend on the other rows. A row whose schedule has ended begins its next FreeInit pass, or
leaves the batch. A long row is predicted window by window; windows of all rows share UNet calls.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pia_batch.config import contexts
from pia_batch.config.speed_presets import EXACT, OUTERMOST_SHARE, SpeedPreset, whole_evaluations
from pia_batch.engine import free_init
from pia_batch.engine.async_transfers import AsyncTransfers
from pia_batch.engine.compiling import Call, directly
from pia_batch.engine.conditioning import LruCache, Posterior, Prompt
from pia_batch.engine.image_prompts import ImagePrompt, ImagePromptAttention
from pia_batch.engine.loading import Components
from pia_batch.engine.lora_scales import Scales
from pia_batch.engine.motion import motion_coefficients
from pia_batch.engine.prediction import DeepFeatures, Predictor, predictor, supports_sliding
from pia_batch.engine.prompt_travel import Text, part_of
from pia_batch.engine.shots import Shot
from pia_batch.engine.windows import Fusion, Windows, shuffled, sliding_windows_of, windows_of
from pia_batch.errors import UnsupportedSettingError

_LATENT_CHANNELS = 4

_MAX_BATCHES = 8
"""Number of cached row combinations, for batches whose rows reuse deep features at different steps, and of
combinations of rows in one call, for rows with windows."""


@dataclass(slots=True)
class Row:
    """State of one shot during denoising.

    Attributes:
        shot: The shot.
        windows: Windows over its frames; a single one where one call predicts all frames.
        sliding: Windows of FreeNoise inside of the UNet; None without FreeNoise.
        generator: CPU generator of the row; the source of all its random numbers.
        scheduler: Scheduler of the row, a copy of its own.
        timesteps: Remaining timesteps of this pass, on the CPU, so that reading one never waits for a GPU.
        passes: Numbers of steps of the FreeInit passes after this one.
        first_latents: Latents at the start of the first pass, (1, 4, F, h, w); FreeInit adds noise with them again.
        latents: Current latents, (1, 4, F, h, w).
        condition: UNet input besides the latents, (1, 5, F, h, w): the motion coefficients as a mask, then the image's
            latents; constant over all steps.
        positive: Text of the prompt.
        negative: Text of the negative prompt; None without guidance.
        image_prompt: Input of the IP-Adapter, weighted by the shot's `ip_adapter_scale`; None without an adapter.
        lora_scales: Scale of each LoRA, if the shot has scales of its own; None: those of the config.
        config_scales: Scale of each LoRA in the config.
        options: Keyword arguments of the scheduler's `step`, the row's generator among them.
        unet_samples: Number of UNet samples computed so far; a call of the outermost layers counts as their share of
            the UNet, and each window as a sample. This is the row's cost relative to the other rows.
        shortcuts: Layers and steps that the row's speed preset leaves out.
        whole: For each of `timesteps`, True if the whole UNet runs.
        deep: Latest deep features by the start of their window, with guidance those of the unconditional sample and
            then of the conditional one; empty if no later step reuses them.
    """

    shot: Shot
    windows: Windows
    sliding: Windows | None
    generator: torch.Generator
    scheduler: Any
    timesteps: list[torch.Tensor]
    passes: list[int]
    first_latents: torch.Tensor
    latents: torch.Tensor
    condition: torch.Tensor
    positive: Text
    negative: Text | None
    image_prompt: ImagePrompt | None
    lora_scales: Scales | None = None
    config_scales: Scales = ()
    options: dict[str, Any] = field(default_factory=dict)
    unet_samples: float = 0
    shortcuts: SpeedPreset = EXACT
    whole: list[bool] = field(init=False)
    deep: dict[int, DeepFeatures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begin(self.timesteps)

    @property
    def num_samples(self) -> int:
        """Number of UNet samples of each window."""
        return 1 if self.negative is None else 2

    def _begin(self, timesteps: list[torch.Tensor]) -> None:
        times = [float(timestep) for timestep in timesteps]
        self.timesteps = timesteps
        self.whole = whole_evaluations(self.shortcuts, times, self.scheduler.config.num_train_timesteps)

    def advance(self, conditional: torch.Tensor, unconditional: torch.Tensor | None) -> None:
        """Take a scheduler step with the predicted noise, (1, 4, F, h, w) each. After the last, begin the next pass."""
        noise = conditional
        if unconditional is not None:
            noise = unconditional + self.shot.guidance_scale * (conditional - unconditional)
        timestep = self.timesteps.pop(0)
        part = 1 if self.whole.pop(0) else OUTERMOST_SHARE[self.shortcuts.layers]
        self.latents = self.scheduler.step(noise, timestep, self.latents, **self.options).prev_sample
        self.unet_samples += part * self.num_samples * len(self.windows.starts)
        if self.passes and not self.timesteps:
            self.latents = free_init.renoise(
                self.shot, self.latents, self.first_latents, self.scheduler, self.generator
            )
            self._begin(_set_schedule(self.scheduler, self.passes.pop(0), self.shot))


def start(
    shot: Shot,
    parts: Components,
    posterior: Posterior,
    positive: Prompt,
    negative: Prompt | None,
    image_prompt: ImagePrompt | None,
    generator: torch.Generator | None = None,
) -> Row:
    """Return the row before its first step.

    The row's generator is used in the pipeline's order: initial noise, then (long clips) the permutations of its
    frames, then the image's latents, then (strength < 1) the noise that replaces the initial one, then the random
    numbers of the scheduler's steps and, between them, those of each FreeInit pass after the first.

    Args:
        shot: Shot to denoise.
        parts: Networks and scheduler.
        posterior: VAE posterior of the shot's image.
        positive: Encoded prompt.
        negative: Encoded negative prompt; None without guidance.
        image_prompt: Encoded image prompt; None without an IP-Adapter.
        generator: CPU generator to continue; None: a new one with the shot's seed.

    Raises:
        UnsupportedSettingError: The scheduler has no such schedule, for the clip or for one of its FreeInit passes; or
            FreeNoise does not go with the UNet.

    Source: the order is that of diffusers 0.42.1 `PIAPipeline.__call__`.
    """
    generator = generator or torch.Generator("cpu").manual_seed(shot.seed)
    scheduler = copy.deepcopy(parts.scheduler)
    if shot.free_init_iters:
        _check_free_init_schedules(scheduler, shot)
    timesteps = _schedule(scheduler, shot)
    size = (shot.height // parts.latent_stride, shot.width // parts.latent_stride)
    shape = (1, _LATENT_CHANNELS, shot.num_frames, *size)

    windows, sliding = windows_of(shot, parts.limits.max_frames), sliding_windows_of(shot, parts.limits.max_frames)
    if sliding is not None and not supports_sliding(parts.unet):
        raise UnsupportedSettingError(
            "context freenoise does not go with this UNet, which has hooks or layers of its own; set context to windows"
        )
    if parts.scales_of(shot) is not None and not supports_sliding(parts.unet):
        raise UnsupportedSettingError(
            "lora_scales does not go with this UNet, which has hooks or layers of its own; set scales in model.loras"
        )
    noise = _noise(shape, generator, parts)
    if sliding is not None:
        noise = shuffled(noise, sliding.length, shot.context_stride, generator)
    elif not windows.is_single:
        noise = shuffled(noise, windows.length, min(contexts.NOISE_STRIDE, windows.length), generator)
    latents = noise.to(parts.device)
    if parts.arithmetic == "diffusers":  # the original does not scale: DDIM, its only scheduler, needs no scale
        latents = latents * scheduler.init_noise_sigma
    image = posterior.sample(generator).to(parts.device, parts.dtype)
    image = torch.nn.functional.interpolate(image, size=size) * parts.vae.config.scaling_factor
    still = image[:, :, None].expand(shape)
    if shot.strength < 1:
        latents = scheduler.add_noise(still, _noise(shape, generator, parts).to(parts.device), timesteps[0][None])
    if shot.free_init_iters:  # the pipeline scales the noise by the whole schedule, and shortens the pass afterwards
        timesteps = _set_schedule(scheduler, shot.pass_steps[0], shot)

    coefficients = torch.tensor(motion_coefficients(shot, parts.arithmetic), dtype=parts.dtype, device=parts.device)
    mask = coefficients.view(1, 1, -1, 1, 1).expand(1, 1, *shape[2:])
    return Row(
        shot=shot,
        windows=windows,
        sliding=sliding,
        generator=generator,
        scheduler=scheduler,
        timesteps=timesteps,
        passes=list(shot.pass_steps[1:]),
        first_latents=latents,
        latents=latents,
        condition=torch.cat([mask, still], dim=1),
        positive=positive.embedding,
        negative=None if negative is None else negative.embedding,
        image_prompt=image_prompt,
        lora_scales=parts.scales_of(shot),
        config_scales=tuple(scale for _, scale in parts.loras),
        options=_step_options(scheduler, eta=shot.eta, generator=generator),
        shortcuts=parts.shortcuts,
    )


def denoise(unet: Any, rows: Sequence[Row], call: Call = directly) -> None:
    """Denoise every row to the end of its last schedule, in place.

    No UNet call has more samples than the first windows of all rows, so that memory does not grow with the number of
    frames.

    Args:
        unet: Network that predicts the noise.
        rows: Rows with the same number of frames in a window, the same size and the same windows of FreeNoise.
        call: Function that calls `unet.run` and its variants, such as a `Compiler`.
    """
    left = [row for row in rows if row.timesteps]
    capacity = sum(row.num_samples for row in rows)
    while left:
        batches: LruCache[tuple[int, ...], _Batch] = LruCache(_MAX_BATCHES)
        for _ in range(min(len(row.timesteps) for row in left)):
            for alike in _group_by_network(left):
                key = tuple(id(row) for row in alike)
                batches.get(key, functools.partial(_Batch, unet, alike, call, capacity)).step()
        left = [row for row in left if row.timesteps]


def _group_by_network(rows: Sequence[Row]) -> list[list[Row]]:
    """Separate rows that need the whole network next from rows that reuse deep features, for one UNet call each."""
    groups = [[row for row in rows if row.whole[0] is whole] for whole in (True, False)]
    return [group for group in groups if group]


class _Batch:
    """Rows that take their steps together, and the UNet calls that predict the windows of all of them."""

    def __init__(self, unet: Any, rows: Sequence[Row], call: Call, capacity: int) -> None:
        self._unet = unet
        self._rows = rows
        self._call = call
        self._calls = _calls(rows, capacity)
        self._predictors: LruCache[tuple[int, ...], Predictor] = LruCache(_MAX_BATCHES)

    def step(self) -> None:
        """Predict the noise of every window, then take one scheduler step in each row."""
        latents = [row.scheduler.scale_model_input(row.latents, row.timesteps[0]) for row in self._rows]
        conditional = [Fusion(row.windows) for row in self._rows]
        unconditional = [Fusion(row.windows) for row in self._rows]
        for windows in self._calls:
            predicted = torch.split(self._noise(windows, latents), 1)
            guided = [each for each in windows if each.row.negative is not None]
            for window, noise in zip(guided, predicted, strict=False):
                unconditional[window.index].add(window.start, noise)
            for window, noise in zip(windows, predicted[len(guided) :], strict=True):
                conditional[window.index].add(window.start, noise)
        with AsyncTransfers():  # not around the UNet: its compiler does not support this mode
            for row, positive, negative in zip(self._rows, conditional, unconditional, strict=True):
                dtype = row.latents.dtype
                row.advance(positive.mean(dtype), None if row.negative is None else negative.mean(dtype))

    def _noise(self, windows: Sequence[_Window], latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """Predict the noise of the samples of a call; reuse deep features where the preset and the step allow it.

        Args:
            windows: Windows of the call.
            latents: Input of the UNet for each row of the batch, (1, 4, F, h, w).
        """
        predict = self._predictor(windows)
        part = torch.cat([window.row.windows.part(latents[window.index], window.start) for window in windows])
        timesteps = torch.stack([window.row.timesteps[0] for window in windows]).to(part.device, non_blocking=True)
        shortcuts = windows[0].row.shortcuts
        if shortcuts == EXACT:
            return predict(part, timesteps)
        guided = [window for window in windows if window.row.negative is not None]
        known: DeepFeatures = ()
        if not windows[0].row.whole[0] and windows[0].deep:
            known = (*(window.deep[0] for window in guided), *(window.deep[-1] for window in windows))
        noise, deep = predict.reusing(part, timesteps, shortcuts.layers, known)
        for window in windows:
            window.row.deep.pop(window.start, None)
        for window, own in zip([*guided, *windows], deep, strict=bool(deep)):
            if window.row.whole[1:2] == [False]:
                window.row.deep[window.start] = (*window.deep, own)
        return noise

    def _predictor(self, windows: Sequence[_Window]) -> Predictor:
        """Return the predictor of a call; calls with windows of the same rows share one, and change its conditions."""
        with AsyncTransfers():
            conditions = functools.partial(_conditions, windows)
            key = tuple(window.index for window in windows)
            predict = self._predictors.get(key, lambda: self._new_predictor(windows, conditions()))
            if len(self._calls) > 1:
                predict.condition(conditions(), _texts(windows))
        return predict

    def _new_predictor(self, windows: Sequence[_Window], conditions: torch.Tensor) -> Predictor:
        rows = [window.row for window in windows]
        guided = [index for index, row in enumerate(rows) if row.negative is not None]
        samples = [*guided, *range(len(rows))]
        embeddings = [
            row.image_prompt.negative for row in rows if row.negative is not None and row.image_prompt is not None
        ]
        embeddings += [row.image_prompt.positive for row in rows if row.image_prompt is not None]
        scales = [rows[k].shot.ip_adapter_scale for k in samples]
        return predictor(
            self._unet,
            samples,
            conditions,
            _texts(windows),
            ImagePromptAttention(self._unet, embeddings, scales, rows[0].windows.length),
            self._call,
            rows[0].sliding,
            _scales_of_samples([rows[k] for k in samples]),
        )


def _scales_of_samples(samples: Sequence[Row]) -> list[Scales] | None:
    """Return the LoRA scales of each sample by its row; None if all have those of the config."""
    if all(row.lora_scales is None for row in samples):
        return None
    return [row.config_scales if row.lora_scales is None else row.lora_scales for row in samples]


@dataclass(frozen=True, slots=True)
class _Window:
    """One window of a row.

    Attributes:
        row: The row.
        index: Number of the row in its batch.
        start: First frame of the window.
    """

    row: Row
    index: int
    start: int

    @property
    def deep(self) -> DeepFeatures:
        """Deep features of the window; empty if there are none."""
        return self.row.deep.get(self.start, ())


def _calls(rows: Sequence[Row], capacity: int) -> list[list[_Window]]:
    """Distribute the windows of all rows to UNet calls of at most `capacity` samples, in order."""
    calls: list[list[_Window]] = [[]]
    num_samples = 0
    for index, row in enumerate(rows):
        for start in row.windows.starts:
            if num_samples + row.num_samples > capacity:
                calls.append([])
                num_samples = 0
            calls[-1].append(_Window(row, index, start))
            num_samples += row.num_samples
    return calls


def _texts(windows: Sequence[_Window]) -> list[Text]:
    """Return the text of each sample of a call: first the negative ones of guided rows, then one of each window."""
    frames = [window.row.windows.frames(window.start) for window in windows]
    negatives = [(window.row.negative, own) for window, own in zip(windows, frames, strict=True)]
    positives = [(window.row.positive, own) for window, own in zip(windows, frames, strict=True)]
    return [part_of(text, own) for text, own in [*negatives, *positives] if text is not None]


def _conditions(windows: Sequence[_Window]) -> torch.Tensor:
    """Return the UNet's input besides the latents for each window, (windows, 5, L, h, w)."""
    return torch.cat([window.row.windows.part(window.row.condition, window.start) for window in windows])


def _schedule(scheduler: Any, shot: Shot) -> list[torch.Tensor]:
    """Return the timesteps that remain after `strength`; set the scheduler to the first of them."""
    timesteps = _set_schedule(scheduler, shot.num_inference_steps, shot)
    first = (shot.num_inference_steps - shot.num_steps) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


def _set_schedule(scheduler: Any, num_steps: int, shot: Shot) -> list[torch.Tensor]:
    """Set the scheduler to a new schedule of `num_steps` steps and return its timesteps.

    Raises:
        UnsupportedSettingError: The scheduler has no such schedule.
    """
    name = type(scheduler).__name__
    asked, remedy = f"num_inference_steps {shot.num_inference_steps}", "change num_inference_steps"
    if num_steps < shot.num_steps:
        asked = f"free_init_fast shortens {asked} to {num_steps} in one pass"
        remedy += " or clear free_init_fast"
    if "original_inference_steps" in inspect.signature(scheduler.set_timesteps).parameters:
        most = scheduler.config.original_inference_steps
        if num_steps > most:
            raise UnsupportedSettingError(
                f"{asked}: {name} supports at most {most} steps; lower num_inference_steps, or raise "
                "original_inference_steps in model.scheduler.settings"
            )
    try:
        scheduler.set_timesteps(num_steps, device="cpu")
    except (IndexError, ValueError) as err:
        raise UnsupportedSettingError(f"{asked}: {name} has no {num_steps}-step schedule ({err}); {remedy}") from err
    return list(scheduler.timesteps)


def _check_free_init_schedules(scheduler: Any, shot: Shot) -> None:
    """Return if the scheduler can start each FreeInit pass and add noise to its result for the next pass.

    Raises:
        UnsupportedSettingError: The scheduler cannot. This check fails before the first pass rather than after it.
    """
    nothing = torch.zeros(1)
    last = free_init.last_timestep(scheduler)
    for num_steps in sorted(set(shot.pass_steps)):
        _set_schedule(scheduler, num_steps, shot)
        if shot.free_init_iters == 1:  # no pass follows
            return
        try:
            scheduler.add_noise(nothing, nothing, last)
        except IndexError as err:  # the scheduler looks noise levels up in its schedule, and this timestep is not there
            remedy = "set timestep_spacing to trailing in model.scheduler.settings"
            if num_steps == 1 and scheduler.config.timestep_spacing == "linspace":
                remedy += ", or raise num_inference_steps" + " or clear free_init_fast" * shot.free_init_fast
            raise UnsupportedSettingError(
                f"free_init_iters {shot.free_init_iters}: the {num_steps}-step schedule of {type(scheduler).__name__} "
                f"does not visit timestep {int(last)}, where the next pass starts; {remedy}"
            ) from err


def _noise(shape: tuple[int, ...], generator: torch.Generator, parts: Components) -> torch.Tensor:
    """Sample noise on the CPU, so that a seed gives the same noise on every device."""
    return torch.randn(shape, generator=generator, dtype=parts.text_encoder.dtype)


def _step_options(scheduler: Any, **offered: Any) -> dict[str, Any]:
    """Return those of the offered arguments that this scheduler's `step` accepts."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in taken}
