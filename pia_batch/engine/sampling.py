"""Denoising many rows together, each by its own schedule.

Every row owns a scheduler, a generator and its latents; only the UNet sees them side by side, with one timestep a row.
So steps, strength, eta, guidance and the solver's history stay the row's own with any scheduler, and a row's schedule
does not depend on its batch-mates. Rows whose schedule has ended leave the batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pia_batch.engine.conditioning import Posterior, Prompt, motion_coefficients
from pia_batch.engine.loading import Components
from pia_batch.engine.shots import Shot
from pia_batch.errors import UnsupportedSettingError

_LATENT_CHANNELS = 4


@dataclass(slots=True)
class Row:
    """One shot between noise and latents.

    Attributes:
        latents: (1, 4, F, h, w), what the schedule has made so far.
        condition: (1, 5, F, h, w): the motion coefficients as a mask, then the image's latents, the same all along.
        positive: (1, tokens, features).
        negative: as `positive`; None without guidance.
        timesteps: what is left to do, on the CPU, so that reading one never waits for a GPU.
        options: keyword arguments of the scheduler's `step`, the row's generator among them.
    """

    shot: Shot
    scheduler: Any
    timesteps: list[torch.Tensor]
    latents: torch.Tensor
    condition: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def unet_samples(self) -> int:
        """How many samples of a UNet call this row takes: its cost relative to its batch-mates, by step."""
        return 1 if self.negative is None else 2

    def advance(self, conditional: torch.Tensor, unconditional: torch.Tensor | None) -> None:
        """Take one step along the predicted noise, both (1, 4, F, h, w)."""
        noise = conditional
        if unconditional is not None:
            noise = unconditional + self.shot.guidance_scale * (conditional - unconditional)
        timestep = self.timesteps.pop(0)
        self.latents = self.scheduler.step(noise, timestep, self.latents, **self.options).prev_sample


def start(shot: Shot, parts: Components, posterior: Posterior, positive: Prompt, negative: Prompt | None) -> Row:
    """The row before its first step.

    Its generator draws in the pipeline's order: initial noise, then the image's latents, then (strength < 1) the
    noise that replaces the initial one, then whatever the scheduler's steps ask for.

    Raises:
        UnsupportedSettingError: the scheduler cannot make such a schedule.

    Source: the order is that of diffusers 0.42.1 `PIAPipeline.__call__`.
    """
    generator = torch.Generator("cpu").manual_seed(shot.seed)
    scheduler, timesteps = _schedule(parts.scheduler, shot)
    size = (shot.height // parts.latent_stride, shot.width // parts.latent_stride)
    shape = (1, _LATENT_CHANNELS, shot.num_frames, *size)

    latents = _noise(shape, generator, parts) * scheduler.init_noise_sigma
    image = posterior.sample(generator).to(parts.device, parts.dtype)
    image = torch.nn.functional.interpolate(image, size=size) * parts.vae.config.scaling_factor
    still = image[:, :, None].expand(shape)
    if shot.strength < 1:
        latents = scheduler.add_noise(still, _noise(shape, generator, parts), timesteps[:1])

    coefficients = torch.tensor(motion_coefficients(shot), dtype=parts.dtype, device=parts.device)
    mask = coefficients.view(1, 1, -1, 1, 1).expand(1, 1, *shape[2:])
    return Row(
        shot=shot,
        scheduler=scheduler,
        timesteps=list(timesteps),
        latents=latents,
        condition=torch.cat([mask, still], dim=1),
        positive=positive.embedding,
        negative=None if negative is None else negative.embedding,
        options=_step_options(scheduler, eta=shot.eta, generator=generator),
    )


def denoise(unet: Any, rows: Sequence[Row]) -> None:
    """Run every row to the end of its schedule, in place. All rows have the same frames and size."""
    left = [row for row in rows if row.timesteps]
    while left:
        batch = _Batch(left)
        for _ in range(min(len(row.timesteps) for row in left)):
            batch.step(unet)
        left = [row for row in left if row.timesteps]


class _Batch:
    """Rows that share UNet calls: first the unconditional samples of the guided rows, then one sample of each row.

    What stays the same from step to step is laid out once.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._guided = [row for row in rows if row.negative is not None]
        samples = [*self._guided, *rows]
        frames = rows[0].shot.num_frames
        texts = [row.negative for row in self._guided if row.negative is not None]
        texts += [row.positive for row in rows]
        self._texts = torch.cat(texts).repeat_interleave(frames, dim=0)
        conditions = torch.cat([row.condition for row in samples])
        blank = conditions.new_zeros((len(samples), _LATENT_CHANNELS, *conditions.shape[2:]))
        self._input = torch.cat([blank, conditions], dim=1)

    def step(self, unet: Any) -> None:
        """One UNet call, then one scheduler step of each row."""
        scaled = {id(row): row.scheduler.scale_model_input(row.latents, row.timesteps[0]) for row in self._rows}
        samples = [*self._guided, *self._rows]
        self._input[:, :_LATENT_CHANNELS] = torch.cat([scaled[id(row)] for row in samples])
        timesteps = torch.stack([row.timesteps[0] for row in samples]).to(self._input.device, non_blocking=True)
        noise = unet(self._input, timesteps, encoder_hidden_states=self._texts).sample.split(1)
        unconditional = {id(row): part for row, part in zip(self._guided, noise, strict=False)}
        for row, conditional in zip(self._rows, noise[len(self._guided) :], strict=True):
            row.advance(conditional, unconditional.get(id(row)))


def _schedule(configured: Any, shot: Shot) -> tuple[Any, torch.Tensor]:
    """A scheduler of the row's own, and the timesteps that strength leaves."""
    scheduler = copy.deepcopy(configured)
    try:
        scheduler.set_timesteps(shot.num_inference_steps, device="cpu")
    except (IndexError, ValueError) as err:
        raise UnsupportedSettingError(f"num_inference_steps {shot.num_inference_steps}: {err}") from err
    first = (shot.num_inference_steps - shot.num_steps) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler, scheduler.timesteps[first:]


def _noise(shape: tuple[int, ...], generator: torch.Generator, parts: Components) -> torch.Tensor:
    """Drawn on the CPU and then moved, so that a seed means the same on every device."""
    return torch.randn(shape, generator=generator, dtype=parts.text_encoder.dtype).to(parts.device)


def _step_options(scheduler: Any, **offered: Any) -> dict[str, Any]:
    """Those of the offered arguments that this scheduler's `step` takes."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in taken}
