"""Finishing of clips: the size, number and rate of the frames that are stored, given those that are generated.

Does not import torch, because the driver checks limits and estimates bytes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LOOPS, _LOOP_FRAMES = range(3, 6), 16
"""Motion scales whose curve returns to the image, and the number of frames after which it does."""

MATCH_NS, SHARPEN_NS, INTERPOLATE_NS = 80.0, 40.0, 230.0
"""Nanoseconds of one core for a pixel: to match its colour, to sharpen it, and to make it between two frames.

Measured on 512 x 512, one core of a 2-core CPU, 2026-11-28."""


@dataclass(frozen=True, slots=True)
class StoredSize:
    """Properties of a stored file, under the names that results have for them.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        num_frames: Number of frames.
        fps: Rate in frames per second.
    """

    width: int
    height: int
    num_frames: int
    fps: float


def closes(row: Mapping[str, Any]) -> bool:
    """Return True if the clip of an effective request is a loop, whose last frame is followed by its first one.

    Args:
        row: Effective settings: `motion_scale`, `motion_curve`, `loop` and `num_frames`.
    """
    if row["num_frames"] == 1 or row["motion_curve"] is not None:
        return False
    return bool(row["loop"] or (row["motion_scale"] in _LOOPS and row["num_frames"] == _LOOP_FRAMES))


def stored_size(row: Mapping[str, Any]) -> StoredSize:
    """Return the size of the file of an effective request whose image is fitted.

    With `interpolate` k, F frames become (F - 1) k + 1, and those of a loop F k. `upscale` multiplies both sides.

    Args:
        row: Effective settings, with a width and a height.
    """
    times, factor = row["interpolate"] or 1, row["upscale"] or 1
    num_frames = row["num_frames"] * times if closes(row) else (row["num_frames"] - 1) * times + 1
    return StoredSize(row["width"] * factor, row["height"] * factor, num_frames, row["fps"] * times)


def generated_frames(num_frames: int, interpolate: int | None) -> int:
    """Return the number of frames that were generated for a stored file of `num_frames`, loop or not."""
    return (num_frames - 1) // (interpolate or 1) + 1
