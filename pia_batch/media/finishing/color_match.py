"""Colour match: gives a frame the mean and the standard deviation of an image's colours, in CIE Lab."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
"""(H, W, 3) RGB, 0-255."""

_Floats = npt.NDArray[np.float32]

RATIOS = (0.5, 2.0)
"""Smallest and largest factor of a deviation. Without it, noise of a frame that is nearly grey becomes colour."""

_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
"""Linear sRGB to XYZ, IEC 61966-2-1, white D65."""

_FROM_RGB = (_XYZ / _XYZ.sum(axis=1, keepdims=True)).T.astype(np.float32)
_TO_RGB = np.linalg.inv(_XYZ / _XYZ.sum(axis=1, keepdims=True)).T.astype(np.float32)
_LAB = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], np.float32).T
"""f(X), f(Y), f(Z) to L + 16, a, b. Source: CIE 15, 8.2.1."""

_FROM_LAB = np.linalg.inv(_LAB).astype(np.float32)
_DELTA = 6 / 29


def _linear_table() -> _Floats:
    codes = np.arange(256) / 255
    linear = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)  # noqa: PLR2004 - sRGB
    return linear.astype(np.float32)


def _code_table() -> Picture:
    """Return the sRGB code of 65,536 steps of linear light."""
    linear = np.arange(2**16) / (2**16 - 1)
    codes = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)  # noqa: PLR2004 - sRGB
    table: Picture = np.rint(codes * 255).astype(np.uint8)
    return table


_LINEAR, _CODES = _linear_table(), _code_table()


def lab(picture: Picture) -> _Floats:
    """Return CIE Lab of a picture: L + 16 in 16 to 116, a and b about -128 to 128; float32, shape (H, W, 3)."""
    relative = _LINEAR[picture] @ _FROM_RGB
    dark = relative / (3 * _DELTA**2) + 4 / 29
    values: _Floats = np.where(relative > _DELTA**3, np.cbrt(relative), dark).astype(np.float32) @ _LAB
    return values


def _picture(values: _Floats) -> Picture:
    """Return the picture of what `lab` returns; colours that sRGB has not are clipped."""
    roots = values @ _FROM_LAB
    relative = np.where(roots > _DELTA, roots**3, 3 * _DELTA**2 * (roots - 4 / 29))
    linear = np.clip(relative.astype(np.float32) @ _TO_RGB, 0, 1)
    picture: Picture = _CODES[np.rint(linear * (2**16 - 1)).astype(np.uint16)]
    return picture


class ColorMatch:
    """Match to the colours of one image.

    L, a and b of a frame are shifted to the image's means and scaled to its standard deviations, by factors within
    RATIOS. Source: Reinhard, Ashikhmin, Gooch and Shirley, "Color Transfer between Images", 2001, in CIE Lab.

    Args:
        image: Image, uint8, shape (H, W, 3), RGB, 0-255.
    """

    def __init__(self, image: Picture) -> None:
        self._mean, self._deviation = _moments(lab(image))

    def __call__(self, frame: Picture) -> Picture:
        """Return the matched frame; uint8, shape (H, W, 3)."""
        values = lab(frame)
        mean, deviation = _moments(values)
        ratio = np.ones(3)
        np.divide(self._deviation, deviation, out=ratio, where=deviation > 0)
        ratio = np.clip(ratio, *RATIOS)
        values *= ratio.astype(np.float32)
        values += (self._mean - mean * ratio).astype(np.float32)
        return _picture(values)


def _moments(values: _Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation of each channel; shape (3,)."""
    channels = values.reshape(-1, 3)
    mean = channels.mean(axis=0, dtype=np.float64)
    squares = np.square(channels).mean(axis=0, dtype=np.float64)
    return mean, np.sqrt(np.maximum(squares - mean**2, 0))
