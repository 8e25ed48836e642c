"""Sharpening: an unsharp mask of fixed radius."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_WEIGHTS = (1, 4, 6, 4, 1)
"""Binomial weights, in 16ths: a Gaussian with a standard deviation of one pixel."""


def sharpen(picture: npt.NDArray[np.uint8], amount: float) -> npt.NDArray[np.uint8]:
    """Return x + amount (x - blurred x), rounded and clipped; the edge pixels are repeated outside of the picture.

    Args:
        picture: Picture, uint8, shape (H, W, 3), 0-255.
        amount: Amount of the mask, 0 or more.
    """
    height, width, _ = picture.shape
    padded = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="edge").astype(np.uint16)
    rows, blurred = np.zeros((height, width + 4, 3), np.uint16), np.zeros(picture.shape, np.uint16)
    for at, weight in enumerate(_WEIGHTS):
        rows += weight * padded[at : at + height]
    for at, weight in enumerate(_WEIGHTS):
        blurred += weight * rows[:, at : at + width]  # at most 255 x 256
    original = picture.astype(np.float32)
    sharpened = original + np.float32(amount) * (original - blurred.astype(np.float32) / 256)
    clipped: npt.NDArray[np.uint8] = np.clip(np.rint(sharpened), 0, 255).astype(np.uint8)
    return clipped
