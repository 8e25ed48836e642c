"""Measures of frames alone: flicker, second difference and the gap of a loop. `measures` has their formulas."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WHITE = 255.0

Frames = npt.NDArray[np.uint8]
"""(F, H, W, 3) RGB, 0-255."""


def pixel_measures(frames: Frames) -> dict[str, float | None]:
    """Return `flicker`, `second_difference` and `loop_gap`; None where there are too few frames.

    Args:
        frames: Clip, uint8, shape (F, H, W, 3), 0-255.
    """
    num_frames = len(frames)
    steps, bends = [], []
    previous: npt.NDArray[np.int16] | None = None
    for t in range(num_frames - 1):  # pair by pair, so that no copy of the clip in a wider type is made
        step = np.subtract(frames[t + 1], frames[t], dtype=np.int16)
        steps.append(_mean_size(step))
        if previous is not None:
            bends.append(_mean_size(step - previous))
        previous = step
    gap = _mean_size(np.subtract(frames[-1], frames[0], dtype=np.int16)) if num_frames > 1 else None
    return {
        "flicker": (WHITE - float(np.mean(steps))) / WHITE if steps else None,
        "second_difference": float(np.mean(bends)) if bends else None,
        "loop_gap": gap,
    }


def _mean_size(values: npt.NDArray[np.int16]) -> float:
    """Return the mean absolute value; integers of this size are added exactly."""
    return float(np.abs(values).sum(dtype=np.int64) / values.size)
