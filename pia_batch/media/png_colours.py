"""Colours of a PNG without an ICC profile: its gAMA and cHRM chunks as a table of levels and as a profile.

Source: PNG specification (third edition), 11.3.2.1 cHRM and 11.3.2.2 gAMA; where it leaves something open, Chromium.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_UNIT = 100_000
"""Number in a chunk that stands for 1."""

_SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
"""Chromaticities of sRGB: x and y of white, red, green and blue."""

_SAME_COLOURS = 0.001
"""Difference of chromaticities up to which they are those of sRGB, rounded."""

_SAME_GAMMA = 0.05
"""Share by which a gamma may differ from that of sRGB and means it. Source: libpng, `PNG_GAMMA_THRESHOLD`."""

_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
"""Adaptation of white points. Source: ICC.1:2022, annex E."""


@dataclass(frozen=True)
class PngColours:
    """Colours that are not those of sRGB.

    Attributes:
        gamma: Exponent of gAMA.
        profile: ICC profile of the file's primaries with the encoding of sRGB; None: the primaries are those of sRGB.
    """

    gamma: float
    profile: bytes | None

    def levels(self, depth: int) -> NDArray[np.uint8]:
        """Return the level of 8 bits, encoded as in sRGB, of every sample of `depth` bits.

        Source: IEC 61966-2-1.
        """
        samples = np.arange(1 << depth) / ((1 << depth) - 1)
        linear = samples ** (1 / self.gamma)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # noqa: PLR2004
        return (encoded * 255 + 0.5).astype(np.uint8)

    def encoded(self, image: Image.Image) -> Image.Image:
        """Return a picture of 8 bits in mode L or RGB, encoded as in sRGB."""
        return image.point(self.levels(8).tolist() * len(image.getbands()))


def read(gamma: bytes | None, chromaticities: bytes | None) -> PngColours | None:
    """Return the colours of a file that has neither a profile nor an sRGB chunk; None if they are those of sRGB.

    As in browsers, cHRM without gAMA means nothing, and neither of them counts where cHRM is invalid. Both of sRGB, as
    some programs write them in place of an sRGB chunk, mean sRGB, of which a gamma is only an approximation.

    Args:
        gamma: Payload of the gAMA chunk, or None.
        chromaticities: Payload of the cHRM chunk, or None.
    """
    if gamma is None or len(gamma) != 4:  # noqa: PLR2004
        return None
    exponent = int.from_bytes(gamma, "big") / _UNIT
    if not exponent:
        return None
    values = _SRGB
    if chromaticities is not None and len(chromaticities) == 32:  # noqa: PLR2004
        white_x, white_y, *others = (value / _UNIT for value in struct.unpack(">8I", chromaticities))
        values = (white_x, white_y, *others)
    if max(abs(one - other) for one, other in zip(values, _SRGB, strict=True)) <= _SAME_COLOURS:
        is_srgb = abs(exponent * 2.2 - 1) <= _SAME_GAMMA
        return None if is_srgb else PngColours(exponent, None)
    profile = _profile(values)
    return None if profile is None else PngColours(exponent, profile)


def _profile(chromaticities: tuple[float, ...]) -> bytes | None:
    """Return the profile of sRGB with other primaries; None if there is none with these chromaticities."""
    points = np.array(chromaticities).reshape(4, 2)
    if (points[:, 1] <= 0).any():
        return None
    xyz = np.stack([points[:, 0], points[:, 1], 1 - points.sum(1)]) / points[:, 1]
    white, primaries = xyz[:, 0], xyz[:, 1:]
    if abs(np.linalg.det(primaries)) < 1e-6:  # noqa: PLR2004 - on one line
        return None
    primaries = primaries * np.linalg.solve(primaries, white)
    cones = np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white))
    adapted = np.linalg.inv(_BRADFORD) @ cones @ _BRADFORD @ primaries
    if not np.isfinite(adapted).all() or abs(adapted).max() > 2:  # noqa: PLR2004 - beyond any light
        return None
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    for entry in range(132, 132 + 12 * count, 12):
        name, start = struct.unpack_from(">4sI", profile, entry)
        if name in _PRIMARIES:
            column = (adapted[:, _PRIMARIES.index(name)] * 65536).round().astype(int)
            struct.pack_into(">3i", profile, start + 8, *column.tolist())
    return bytes(profile)


_PRIMARIES = (b"rXYZ", b"gXYZ", b"bXYZ")
"""Names of a profile's tags with its primaries. Source: ICC.1:2022, 9.2."""
