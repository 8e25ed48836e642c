"""Sampling: denoises many rows together, each with its own schedule.

Every row owns a scheduler, a generator and its latents. Only the UNet processes the rows together, with one timestep
for each row. So steps, strength, eta, guidance and the solver's history belong to the row, with any scheduler, and a
row's schedule does not depend on the other rows. A row whose schedule has ended begins its next FreeInit pass, or
leaves the batch.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pia_batch.config.speed_presets import EXACT, OUTERMOST_SHARE, SpeedPreset, whole_evaluations
from pia_batch.engine import free_init
from pia_batch.engine.async_transfers import AsyncTransfers
from pia_batch.engine.compiling import Call, directly
from pia_batch.engine.conditioning import LruCache, Posterior, Prompt
from pia_batch.engine.image_prompts import ImagePrompt, ImagePromptAttention
from pia_batch.engine.loading import Components
from pia_batch.engine.motion import motion_coefficients
from pia_batch.engine.prediction import DeepFeatures, predictor
from pia_batch.engine.shots import Shot
from pia_batch.errors import UnsupportedSettingError

_LATENT_CHANNELS = 4

_MAX_BATCHES = 8
"""Number of cached row combinations, for batches whose rows reuse deep features at different steps."""


@dataclass(slots=True)
class Row:
    """State of one shot during denoising.

    Attributes:
        shot: The shot.
        generator: CPU generator of the row; the source of all its random numbers.
        scheduler: Scheduler of the row, a copy of its own.
        timesteps: Remaining timesteps of this pass, on the CPU, so that reading one never waits for a GPU.
        passes: Numbers of steps of the FreeInit passes after this one.
        first_latents: Latents at the start of the first pass, (1, 4, F, h, w); FreeInit adds noise with them again.
        latents: Current latents, (1, 4, F, h, w).
        condition: UNet input besides the latents, (1, 5, F, h, w): the motion coefficients as a mask, then the image's
            latents; constant over all steps.
        positive: Prompt embedding, (1, tokens, features).
        negative: Embedding of the negative prompt, in the shape of `positive`; None without guidance.
        image_prompt: Input of the IP-Adapter, weighted by the shot's `ip_adapter_scale`; None without an adapter.
        options: Keyword arguments of the scheduler's `step`, the row's generator among them.
        unet_samples: Number of UNet samples computed so far; a call of the outermost layers counts as their share of
            the UNet. This is the row's cost relative to the other rows.
        shortcuts: Layers and steps that the row's speed preset leaves out.
        whole: For each of `timesteps`, True if the whole UNet runs.
        deep: Latest deep features, with guidance those of the unconditional sample and then of the conditional one;
            empty if no later step reuses them.
    """

    shot: Shot
    generator: torch.Generator
    scheduler: Any
    timesteps: list[torch.Tensor]
    passes: list[int]
    first_latents: torch.Tensor
    latents: torch.Tensor
    condition: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor | None
    image_prompt: ImagePrompt | None
    options: dict[str, Any] = field(default_factory=dict)
    unet_samples: float = 0
    shortcuts: SpeedPreset = EXACT
    whole: list[bool] = field(init=False)
    deep: DeepFeatures = ()

    def __post_init__(self) -> None:
        self._begin(self.timesteps)

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
        self.unet_samples += part * (1 if unconditional is None else 2)
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
) -> Row:
    """Return the row before its first step.

    The row's generator is used in the pipeline's order: initial noise, then the image's latents, then (strength < 1)
    the noise that replaces the initial one, then the random numbers of the scheduler's steps and, between them, those
    of each FreeInit pass after the first.

    Args:
        shot: Shot to denoise.
        parts: Networks and scheduler.
        posterior: VAE posterior of the shot's image.
        positive: Encoded prompt.
        negative: Encoded negative prompt; None without guidance.
        image_prompt: Encoded image prompt; None without an IP-Adapter.

    Raises:
        UnsupportedSettingError: The scheduler has no such schedule, for the clip or for one of its FreeInit passes.

    Source: the order is that of diffusers 0.42.1 `PIAPipeline.__call__`.
    """
    generator = torch.Generator("cpu").manual_seed(shot.seed)
    scheduler = copy.deepcopy(parts.scheduler)
    if shot.free_init_iters:
        _check_free_init_schedules(scheduler, shot)
    timesteps = _schedule(scheduler, shot)
    size = (shot.height // parts.latent_stride, shot.width // parts.latent_stride)
    shape = (1, _LATENT_CHANNELS, shot.num_frames, *size)

    latents = _noise(shape, generator, parts)
    if parts.arithmetic == "diffusers":  # the original does not scale: DDIM, its only scheduler, needs no scale
        latents = latents * scheduler.init_noise_sigma
    image = posterior.sample(generator).to(parts.device, parts.dtype)
    image = torch.nn.functional.interpolate(image, size=size) * parts.vae.config.scaling_factor
    still = image[:, :, None].expand(shape)
    if shot.strength < 1:
        latents = scheduler.add_noise(still, _noise(shape, generator, parts), timesteps[0][None])
    if shot.free_init_iters:  # the pipeline scales the noise by the whole schedule, and shortens the pass afterwards
        timesteps = _set_schedule(scheduler, shot.pass_steps[0], shot)

    coefficients = torch.tensor(motion_coefficients(shot, parts.arithmetic), dtype=parts.dtype, device=parts.device)
    mask = coefficients.view(1, 1, -1, 1, 1).expand(1, 1, *shape[2:])
    return Row(
        shot=shot,
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
        options=_step_options(scheduler, eta=shot.eta, generator=generator),
        shortcuts=parts.shortcuts,
    )


def denoise(unet: Any, rows: Sequence[Row], call: Call = directly) -> None:
    """Denoise every row to the end of its last schedule, in place.

    Args:
        unet: Network that predicts the noise.
        rows: Rows with the same number of frames and the same size.
        call: Function that calls `unet.run` and its variants, such as a `Compiler`.
    """
    left = [row for row in rows if row.timesteps]
    while left:
        batches: LruCache[tuple[int, ...], _Batch] = LruCache(_MAX_BATCHES)
        for _ in range(min(len(row.timesteps) for row in left)):
            for alike in _group_by_network(left):
                key = tuple(id(row) for row in alike)
                with AsyncTransfers():
                    batch = batches.get(key, functools.partial(_Batch, unet, alike, call))
                batch.step()
        left = [row for row in left if row.timesteps]


def _group_by_network(rows: Sequence[Row]) -> list[list[Row]]:
    """Separate rows that need the whole network next from rows that reuse deep features, for one UNet call each."""
    groups = [[row for row in rows if row.whole[0] is whole] for whole in (True, False)]
    return [group for group in groups if group]


class _Batch:
    """Rows that share UNet calls: first the unconditional samples of the guided rows, then one sample of each row."""

    def __init__(self, unet: Any, rows: Sequence[Row], call: Call) -> None:
        self._rows = rows
        self._guided = [index for index, row in enumerate(rows) if row.negative is not None]
        samples = [*self._guided, *range(len(rows))]
        texts = [row.negative for row in rows if row.negative is not None]
        embeddings = [
            row.image_prompt.negative for row in rows if row.negative is not None and row.image_prompt is not None
        ]
        embeddings += [row.image_prompt.positive for row in rows if row.image_prompt is not None]
        scales = [rows[k].shot.ip_adapter_scale for k in samples]
        self._predict = predictor(
            unet,
            samples,
            torch.cat([row.condition for row in rows]),
            [*texts, *(row.positive for row in rows)],
            ImagePromptAttention(unet, embeddings, scales, rows[0].shot.num_frames),
            call,
        )

    def step(self) -> None:
        """Call the UNet once, then take one scheduler step in each row."""
        latents = torch.cat([row.scheduler.scale_model_input(row.latents, row.timesteps[0]) for row in self._rows])
        timesteps = torch.stack([row.timesteps[0] for row in self._rows]).to(latents.device, non_blocking=True)
        noise = torch.split(self._noise(latents, timesteps), 1)
        unconditional = dict(zip(self._guided, noise, strict=False))
        with AsyncTransfers():  # not around the UNet: its compiler does not support this mode
            for index, (row, conditional) in enumerate(zip(self._rows, noise[len(self._guided) :], strict=True)):
                row.advance(conditional, unconditional.get(index))

    def _noise(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Predict the noise of each sample; reuse the rows' deep features where the preset and the step allow it."""
        rows, guided, shortcuts = self._rows, self._guided, self._rows[0].shortcuts
        if shortcuts == EXACT:
            return self._predict(latents, timesteps)
        known: DeepFeatures = ()
        if not rows[0].whole[0] and rows[0].deep:
            known = (*(rows[index].deep[0] for index in guided), *(row.deep[-1] for row in rows))
        noise, deep = self._predict.reusing(latents, timesteps, shortcuts.layers, known)
        for row in rows:
            row.deep = ()
        samples = [*guided, *range(len(rows))]
        for index, own in zip(samples, deep, strict=bool(deep)):
            if rows[index].whole[1:2] == [False]:
                rows[index].deep += (own,)
        return noise


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
    """Sample noise on the CPU and move it to the device, so that a seed gives the same noise on every device."""
    return torch.randn(shape, generator=generator, dtype=parts.text_encoder.dtype).to(parts.device)


def _step_options(scheduler: Any, **offered: Any) -> dict[str, Any]:
    """Return those of the offered arguments that this scheduler's `step` accepts."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in taken}
