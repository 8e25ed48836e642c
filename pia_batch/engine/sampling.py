"""Denoising many rows together, each by its own schedule.

Every row owns a scheduler, a generator and its latents; only the UNet sees them side by side, with one timestep a row.
So steps, strength, eta, guidance and the solver's history stay the row's own with any scheduler, and a row's schedule
does not depend on its batch-mates. A row whose schedule has ended begins its next FreeInit pass, or leaves the batch.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pia_batch.config.speed_presets import EXACT, OUTERMOST_SHARE, Shortcuts, whole_evaluations
from pia_batch.engine import free_init
from pia_batch.engine.async_transfers import AsyncTransfers
from pia_batch.engine.compiling import Call, directly
from pia_batch.engine.conditioning import LruCache, Posterior, Prompt
from pia_batch.engine.image_prompts import Attention, ImagePrompt
from pia_batch.engine.loading import Components
from pia_batch.engine.motion import motion_coefficients
from pia_batch.engine.prediction import Deep, predictor
from pia_batch.engine.shots import Shot
from pia_batch.errors import UnsupportedSettingError

_LATENT_CHANNELS = 4

_MAX_BATCHES = 8
"""Compositions of rows that are kept laid out, where rows of one batch take their shortcuts at different steps."""


@dataclass(slots=True)
class Row:
    """One shot between noise and latents.

    Attributes:
        latents: (1, 4, F, h, w), what the schedule has made so far.
        condition: (1, 5, F, h, w): the motion coefficients as a mask, then the image's latents, the same all along.
        positive: (1, tokens, features).
        negative: as `positive`; None without guidance.
        image_prompt: what an IP-Adapter reads, weighed by the shot's `ip_adapter_scale`; None without an adapter.
        generator: the row's own, on the CPU: every number that it draws.
        timesteps: what is left of this pass, on the CPU, so that reading one never waits for a GPU.
        passes: steps of each FreeInit pass after this one.
        first_latents: what the first pass started from, (1, 4, F, h, w); FreeInit noises with it again.
        options: keyword arguments of the scheduler's `step`, the row's generator among them.
        unet_samples: samples of UNet calls taken so far, of the outermost layers by their share of it: the row's cost
            relative to its batch-mates.
        shortcuts: what its preset leaves out.
        whole: at each of `timesteps`, whether the whole UNet runs.
        deep: what its deep part made last, with guidance of the unconditional sample, then of the conditional one;
            empty where it is not used again.
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
    shortcuts: Shortcuts = EXACT
    whole: list[bool] = field(init=False)
    deep: Deep = ()

    def __post_init__(self) -> None:
        self._begin(self.timesteps)

    def _begin(self, timesteps: list[torch.Tensor]) -> None:
        times = [float(timestep) for timestep in timesteps]
        self.timesteps = timesteps
        self.whole = whole_evaluations(self.shortcuts, times, self.scheduler.config.num_train_timesteps)

    def advance(self, conditional: torch.Tensor, unconditional: torch.Tensor | None) -> None:
        """Take one step along the predicted noise, both (1, 4, F, h, w). After a pass's last, begin the next pass."""
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
            self._begin(_spread(self.scheduler, self.passes.pop(0), self.shot))


def start(
    shot: Shot,
    parts: Components,
    posterior: Posterior,
    positive: Prompt,
    negative: Prompt | None,
    image_prompt: ImagePrompt | None,
) -> Row:
    """The row before its first step.

    Its generator draws in the pipeline's order: initial noise, then the image's latents, then (strength < 1) the
    noise that replaces the initial one, then whatever the scheduler's steps ask for and, between them, each FreeInit
    pass after the first.

    Raises:
        UnsupportedSettingError: the scheduler cannot make such a schedule, for one of FreeInit's passes perhaps.

    Source: the order is that of diffusers 0.42.1 `PIAPipeline.__call__`.
    """
    generator = torch.Generator("cpu").manual_seed(shot.seed)
    scheduler = copy.deepcopy(parts.scheduler)
    if shot.free_init_iters:
        _rehearse(scheduler, shot)
    timesteps = _schedule(scheduler, shot)
    size = (shot.height // parts.latent_stride, shot.width // parts.latent_stride)
    shape = (1, _LATENT_CHANNELS, shot.num_frames, *size)

    latents = _noise(shape, generator, parts) * scheduler.init_noise_sigma
    image = posterior.sample(generator).to(parts.device, parts.dtype)
    image = torch.nn.functional.interpolate(image, size=size) * parts.vae.config.scaling_factor
    still = image[:, :, None].expand(shape)
    if shot.strength < 1:
        latents = scheduler.add_noise(still, _noise(shape, generator, parts), timesteps[0][None])
    if shot.free_init_iters:  # the pipeline scales its noise by the whole schedule, and only then shortens the pass
        timesteps = _spread(scheduler, shot.pass_steps[0], shot)

    coefficients = torch.tensor(motion_coefficients(shot), dtype=parts.dtype, device=parts.device)
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
    """Run every row to the end of its last schedule, in place. All rows have the same frames and size.

    Args:
        unet: what predicts the noise.
        rows: of one number of frames and one size.
        call: what calls the functions of the UNet's layout.
    """
    left = [row for row in rows if row.timesteps]
    while left:
        batches: LruCache[tuple[int, ...], _Batch] = LruCache(_MAX_BATCHES)
        for _ in range(min(len(row.timesteps) for row in left)):
            for alike in _alike(left):
                key = tuple(id(row) for row in alike)
                with AsyncTransfers():
                    batch = batches.get(key, functools.partial(_Batch, unet, alike, call))
                batch.step()
        left = [row for row in left if row.timesteps]


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Those that need the whole network next, and the others: two calls, lest one row's shortcut become another's."""
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
            Attention(unet, embeddings, scales, rows[0].shot.num_frames),
            call,
        )

    def step(self) -> None:
        """One UNet call, then one scheduler step of each row."""
        latents = torch.cat([row.scheduler.scale_model_input(row.latents, row.timesteps[0]) for row in self._rows])
        timesteps = torch.stack([row.timesteps[0] for row in self._rows]).to(latents.device, non_blocking=True)
        noise = torch.split(self._noise(latents, timesteps), 1)
        unconditional = dict(zip(self._guided, noise, strict=False))
        with AsyncTransfers():  # not around the UNet, whose compiler knows no such mode
            for index, (row, conditional) in enumerate(zip(self._rows, noise[len(self._guided) :], strict=True)):
                row.advance(conditional, unconditional.get(index))

    def _noise(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Of each sample; over the deep features that the rows have from earlier steps, if they have enough in them."""
        rows, guided, shortcuts = self._rows, self._guided, self._rows[0].shortcuts
        if shortcuts == EXACT:
            return self._predict(latents, timesteps)
        known: Deep = ()
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
    """The timesteps that strength leaves, at the first of which the scheduler then stands."""
    timesteps = _spread(scheduler, shot.num_inference_steps, shot)
    first = (shot.num_inference_steps - shot.num_steps) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


def _spread(scheduler: Any, num_steps: int, shot: Shot) -> list[torch.Tensor]:
    """The timesteps of a new schedule of so many steps, at the start of which the scheduler then stands.

    Raises:
        UnsupportedSettingError: the scheduler has no such schedule.
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
                f"{asked}: {name} has {most} steps at most; lower num_inference_steps, or raise "
                "original_inference_steps in model.scheduler.settings"
            )
    try:
        scheduler.set_timesteps(num_steps, device="cpu")
    except (IndexError, ValueError) as err:
        raise UnsupportedSettingError(f"{asked}: {name} has no {num_steps}-step schedule ({err}); {remedy}") from err
    return list(scheduler.timesteps)


def _rehearse(scheduler: Any, shot: Shot) -> None:
    """Return if the scheduler can begin each FreeInit pass and noise what it ends with for the next one.

    Raises:
        UnsupportedSettingError: it cannot. Better said now than after the first pass.
    """
    nothing = torch.zeros(1)
    last = free_init.last_timestep(scheduler)
    for num_steps in sorted(set(shot.pass_steps)):
        _spread(scheduler, num_steps, shot)
        if shot.free_init_iters == 1:  # nothing comes after it
            return
        try:
            scheduler.add_noise(nothing, nothing, last)
        except IndexError as err:  # it finds noise levels by their place in the schedule, and this one has none
            remedy = "set timestep_spacing to trailing in model.scheduler.settings"
            if num_steps == 1 and scheduler.config.timestep_spacing == "linspace":
                remedy += ", or raise num_inference_steps" + " or clear free_init_fast" * shot.free_init_fast
            raise UnsupportedSettingError(
                f"free_init_iters {shot.free_init_iters}: the {num_steps}-step schedule of {type(scheduler).__name__} "
                f"does not visit timestep {int(last)}, where the next pass starts; {remedy}"
            ) from err


def _noise(shape: tuple[int, ...], generator: torch.Generator, parts: Components) -> torch.Tensor:
    """Drawn on the CPU and then moved, so that a seed means the same on every device."""
    return torch.randn(shape, generator=generator, dtype=parts.text_encoder.dtype).to(parts.device)


def _step_options(scheduler: Any, **offered: Any) -> dict[str, Any]:
    """Those of the offered arguments that this scheduler's `step` takes."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in taken}
