"""Windows of a row: the parts of a long clip that UNet calls predict one by one, and the fusion of their predictions.

Positions are relative to the window. Predictions are fused before guidance and the scheduler's step, so that a row has
one latent for each frame, and one schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pia_batch.config import contexts
from pia_batch.engine.shots import Shot

_FRAMES = -3
"""Axis of the frames, in latents (1, channels, F, h, w) and in tokens (samples, F, pixels, channels)."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows over the frames of one row.

    Attributes:
        num_frames: Number of frames of the row.
        length: Number of frames of each window; at most `num_frames`.
        starts: First frame of each window. A window that passes the last frame continues at frame 0.
    """

    num_frames: int
    length: int
    starts: tuple[int, ...] = (0,)

    @property
    def is_single(self) -> bool:
        """True if one window has all frames: a single call predicts the row, and there is nothing to fuse."""
        return self.length == self.num_frames

    def frames(self, start: int) -> tuple[int, ...]:
        """Return the frames of the window that begins at `start`."""
        return tuple((start + index) % self.num_frames for index in range(self.length))

    def part(self, clip: torch.Tensor, start: int) -> torch.Tensor:
        """Return the frames of a window from a tensor (..., F, h, w), without an index on the device."""
        if self.is_single:
            return clip
        return torch.cat([clip.narrow(_FRAMES, first, count) for first, _, count in self.spans(start)], dim=_FRAMES)

    def spans(self, start: int) -> list[tuple[int, int, int]]:
        """Return the contiguous parts of a window: first frame in the clip, first frame in the window, their number."""
        before_end = min(self.length, self.num_frames - start)
        parts = [(start, 0, before_end)]
        if before_end < self.length:
            parts.append((0, before_end, self.length - before_end))
        return parts


class Fusion:
    """Weighted mean of what windows give for each frame; a window's middle weighs most.

    Sums are in float32 or the values' own precision, whichever is higher.
    """

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._total: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    def add(self, start: int, predicted: torch.Tensor) -> None:
        """Add the values of a window, (..., L, h, w)."""
        windows = self._windows
        if windows.is_single:
            self._total = predicted
            return
        exact = torch.promote_types(predicted.dtype, torch.float32)
        device = predicted.device
        if self._total is None or self._weights is None:
            shape = list(predicted.shape)
            shape[_FRAMES] = windows.num_frames
            self._total = torch.zeros(shape, device=device, dtype=exact)
            self._weights = torch.zeros(windows.num_frames, 1, 1, device=device, dtype=exact)
        rising = torch.arange(1, windows.length + 1, device=device, dtype=exact)[
            :, None, None
        ]  # made on the device: the host need not wait
        pyramid = torch.minimum(rising, windows.length + 1 - rising)
        for first, inner, count in windows.spans(start):
            share = pyramid.narrow(0, inner, count)
            self._total.narrow(_FRAMES, first, count).add_(predicted.narrow(_FRAMES, inner, count) * share)
            self._weights.narrow(0, first, count).add_(share)

    def mean(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of all frames, (..., F, h, w), once every window was added."""
        if self._total is None:
            raise ValueError("no window was added")
        return self._total if self._weights is None else (self._total / self._weights).to(dtype)


def windows_of(shot: Shot, positions: int) -> Windows:
    """Return the windows of a shot, for motion modules that know this number of frames."""
    length = shot.context_length
    if contexts.method(shot.context, shot.num_frames, length, positions) != "windows":
        return Windows(shot.num_frames, shot.num_frames)
    starts = contexts.window_starts(shot.num_frames, length, shot.context_overlap, circular=shot.is_loop)
    return Windows(shot.num_frames, length, starts)


def sliding_windows_of(shot: Shot, positions: int) -> Windows | None:
    """Return the windows of FreeNoise for the attention over frames; None for a shot without FreeNoise."""
    length = shot.context_length
    if contexts.method(shot.context, shot.num_frames, length, positions) != "freenoise":
        return None
    starts = contexts.sliding_starts(shot.num_frames, length, shot.context_stride, circular=shot.is_loop)
    return Windows(shot.num_frames, length, starts)


def shuffled(noise: torch.Tensor, length: int, stride: int, generator: torch.Generator) -> torch.Tensor:
    """Return noise whose frames after the first `length` are permutations of earlier ones.

    Windows that start from the same noise generate the same things. Frames i to i + stride are those of one window
    earlier, in random order.

    Args:
        noise: Noise (1, channels, F, h, w), all frames sampled at once; changed in place.
        length: Number of frames that are kept as they are.
        stride: Number of frames that are permuted together.
        generator: CPU generator; one permutation is taken for each group of `stride` frames.

    Source: FreeNoise, arXiv 2310.15169; values and order of random numbers are those of diffusers 0.42.1
    `AnimateDiffFreeNoiseMixin._prepare_latents_free_noise`.
    """
    num_frames = noise.shape[2]
    for first in range(length, num_frames, stride):
        earlier = first - length + torch.randperm(stride, generator=generator)
        count = min(stride, num_frames - first)
        noise[:, :, first : first + count] = noise[:, :, earlier[:count]]
    return noise
