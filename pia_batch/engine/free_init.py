"""FreeInit: a further denoising pass that starts from the clip's own low frequencies and new high ones.

Source: arXiv 2312.07537; values and order of random numbers are those of diffusers 0.42.1 `FreeInitMixin`.
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
    """Return the latents from which the next pass starts.

    Args:
        shot: Shot that defines the low-pass filter.
        clip: Latents (1, 4, F, h, w) at the end of the last pass.
        first: Latents at the start of the first pass, in the shape of `clip`.
        scheduler: Scheduler, with the schedule of the last pass.
        generator: CPU generator; one float32 number is taken for each latent.

    Returns:
        Latents (1, 4, F, h, w), in the clip's dtype and on its device.

    Raises:
        IndexError: The schedule has no noise level for the last timestep of training.
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
    """Return the noisiest timestep of training, at which every further pass starts: int64, shape (1,)."""
    return torch.tensor([scheduler.config.num_train_timesteps - 1])


@functools.lru_cache(maxsize=32)
def low_pass(
    shape: tuple[int, int, int], method: FreeInitMethod, order: int, spatial_stop: float, temporal_stop: float
) -> torch.Tensor:
    """Return the share of each frequency that is kept: float32, 0 to 1, of shape (F, h, w), frequency zero first.

    All values are zero where a stop frequency is zero. 32 filters are cached, 0.26 MB each for 16 frames of 512 x 512.

    Source: the limit of the `ideal` filter is twice the stop frequency, where its square would be expected, both in
    diffusers and in the code of the paper.
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
