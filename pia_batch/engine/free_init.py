"""FreeInit: a further pass over a clip, from its own low frequencies and fresh high ones.

Source: arXiv 2312.07537; numbers and order of draws are those of diffusers 0.42.1 `FreeInitMixin`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from pia_batch.config import FreeInitMethod
from pia_batch.engine.shots import Shot

_VOLUME = (-3, -2, -1)


def renoise(
    shot: Shot, clip: torch.Tensor, first: torch.Tensor, scheduler: Any, generator: torch.Generator
) -> torch.Tensor:
    """The latents that the next pass starts from.

    Args:
        shot: whose filter it is.
        clip: (1, 4, F, h, w), what the last pass ended with.
        first: as `clip`, what the first pass started from.
        scheduler: with the schedule of the last pass.
        generator: gives one float32 number for each latent.

    Returns:
        (1, 4, F, h, w), in the clip's dtype and on its device.

    Raises:
        IndexError: the schedule knows no noise level for the last timestep of training.
    """
    noised = scheduler.add_noise(clip, first, last_timestep(scheduler)).float()
    fresh = torch.randn(clip.shape, generator=generator, dtype=torch.float32).to(clip.device)
    low = low_pass(
        (clip.shape[2], clip.shape[3], clip.shape[4]),
        shot.free_init_method,
        shot.free_init_order,
        shot.free_init_spatial_stop,
        shot.free_init_temporal_stop,
    ).to(clip.device)
    mixed = torch.fft.fftn(noised, dim=_VOLUME) * low + torch.fft.fftn(fresh, dim=_VOLUME) * (1 - low)
    latents: torch.Tensor = torch.fft.ifftn(mixed, dim=_VOLUME).real.to(clip.dtype)
    return latents


def last_timestep(scheduler: Any) -> torch.Tensor:
    """The noisiest timestep of training, at which every further pass starts: int64, shape (1,)."""
    return torch.tensor([scheduler.config.num_train_timesteps - 1])


@functools.lru_cache(maxsize=32)
def low_pass(
    shape: tuple[int, int, int], method: FreeInitMethod, order: int, spatial_stop: float, temporal_stop: float
) -> torch.Tensor:
    """How much of each frequency is kept: float32, 0 to 1, of the given shape (F, h, w), frequency zero first.

    All zero where a stop frequency is zero. 32 are kept, of 0.26 MB each for 16 frames of 512 x 512.

    Source: the `ideal` filter's limit of twice the stop frequency, where its square would be expected, is diffusers'
    and the paper's own code's.
    """
    if spatial_stop == 0 or temporal_stop == 0:
        return torch.zeros(shape)
    stretches = (spatial_stop / temporal_stop, 1.0, 1.0)
    time, height, width = (
        torch.tensor([(stretch * (2 * index / size - 1)) ** 2 for index in range(size)], dtype=torch.float64)
        for stretch, size in zip(stretches, shape, strict=True)
    )
    distance = time[:, None, None] + height[:, None] + width
    if method == "butterworth":
        kept = 1 / (1 + (distance / spatial_stop**2) ** order)
    elif method == "gaussian":
        kept = torch.exp(-1 / (2 * spatial_stop**2) * distance)
    else:
        kept = distance <= spatial_stop * 2
    zero_first: torch.Tensor = torch.fft.ifftshift(kept.float())
    return zero_first
