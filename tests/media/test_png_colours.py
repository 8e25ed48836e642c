"""Colours of PNGs by gAMA and cHRM: as Chromium shows them, and untouched where they are those of sRGB."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ImageCms

from pia_batch.media import images

SRGB = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
ADOBE = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
P3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
WIDE = (34570, 35850, 73470, 26530, 15960, 84040, 3660, 10)

PIXELS = [(0, 0, 0), (32, 64, 128), (128, 128, 128), (200, 30, 90), (255, 255, 255), (10, 250, 20)]

Chunk = tuple[bytes, bytes]


def gamma(value: int) -> Chunk:
    return b"gAMA", value.to_bytes(4, "big")


def primaries(*values: int) -> Chunk:
    return b"cHRM", struct.pack(f">{len(values)}I", *values)


def profile(data: bytes) -> Chunk:
    return b"iCCP", b"x\0\0" + zlib.compress(data)


ICC = profile(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


def png(pixels: Sequence[tuple[int, ...]], colour_type: int, *chunks: Chunk, depth: int = 8) -> bytes:
    """Return a PNG of one row, with chunks between its header and its pixels."""
    row = b"\0" + b"".join(sample.to_bytes(depth // 8, "big") for pixel in pixels for sample in pixel)
    header = struct.pack(">IIBBBBB", len(pixels), 1, depth, colour_type, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, payload in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(row)), (b"IEND", b"")):
        checksum = zlib.crc32(payload, zlib.crc32(name))
        file += len(payload).to_bytes(4, "big") + name + payload + checksum.to_bytes(4, "big")
    return file


def shown(data: bytes) -> NDArray[np.int64]:
    return np.asarray(images.decode(data, max_pixels=10_000, background="#000000"))[0].astype(int)


IN_CHROMIUM: list[tuple[tuple[Chunk, ...], list[tuple[int, ...]]]] = [
    ((gamma(100_000),), [(0, 0, 0), (99, 137, 188), (188, 188, 188), (229, 96, 160), (255, 255, 255), (56, 253, 79)]),
    ((gamma(35_000),), [(0, 0, 0), (9, 38, 104), (104, 104, 104), (187, 7, 64), (255, 255, 255), (0, 249, 2)]),
    (
        (gamma(50_994), primaries(*SRGB)),
        [(0, 0, 0), (35, 73, 139), (139, 139, 139), (207, 33, 101), (255, 255, 255), (5, 251, 20)],
    ),
    (
        (gamma(100_000), primaries(*P3)),
        [(0, 0, 0), (88, 139, 192), (188, 188, 188), (247, 84, 162), (255, 255, 255), (0, 255, 22)],
    ),
    (
        (primaries(*ADOBE), gamma(45_455)),
        [(0, 0, 0), (0, 62, 131), (129, 129, 129), (233, 24, 91), (255, 255, 255), (0, 250, 0)],
    ),
    (
        (gamma(45_455), primaries(*WIDE)),
        [(0, 0, 0), (0, 67, 136), (129, 129, 129), (255, 0, 94), (255, 255, 255), (0, 255, 0)],
    ),
    ((gamma(100_000), primaries(1, 2)), [(0, 0, 0), (99, 137, 188), (188, 188, 188), (229, 96, 160), (255,) * 3]),
    ((gamma(100_000), (b"sRGB", b"\x09")), [(0, 0, 0), (99, 137, 188)]),
    ((gamma(100_000), (b"iCCP", b"x\0\0no")), [(0, 0, 0), (99, 137, 188)]),
    ((gamma(100_000), gamma(50_000)), [(0, 0, 0), (99, 137, 188)]),
]
"""Chunks, and the pixels that Chromium 156 shows for PIXELS, or for the first ones."""


@pytest.mark.parametrize(("chunks", "wanted"), IN_CHROMIUM)
def test_colours_are_those_that_a_browser_shows(chunks: tuple[Chunk, ...], wanted: list[tuple[int, ...]]) -> None:
    assert np.abs(shown(png(PIXELS, 2, *chunks))[: len(wanted)] - wanted).max() <= 1


@pytest.mark.parametrize("chunks", [IN_CHROMIUM[0][0], IN_CHROMIUM[3][0]], ids=["gamma", "primaries"])
def test_every_layout_has_the_same_colours(chunks: tuple[Chunk, ...]) -> None:
    wanted = shown(png(PIXELS, 2, *chunks))
    palette = (b"PLTE", bytes(sample for pixel in PIXELS for sample in pixel))
    wide = [tuple(sample * 257 for sample in pixel) for pixel in PIXELS]

    assert (shown(png([(*pixel, 255) for pixel in PIXELS], 6, *chunks)) == wanted).all()
    assert (shown(png([(number,) for number in range(len(PIXELS))], 3, *chunks, palette)) == wanted).all()
    assert (shown(png(wide, 2, *chunks, depth=16)) == wanted).all()
    assert (shown(png([(*pixel, 65535) for pixel in wide], 6, *chunks, depth=16)) == wanted).all()


@pytest.mark.parametrize("chunks", [(gamma(100_000),), (gamma(100_000), primaries(*P3))])
def test_grey_has_the_gamma_alone_and_alpha_has_none(chunks: tuple[Chunk, ...]) -> None:
    for depth, unit in ((8, 1), (16, 257)):
        grey, opaque = [(level * unit,) for level in (0, 10, 128, 255)], 255 * unit
        wanted = [0, 56, 188, 255]
        assert shown(png(grey, 0, *chunks, depth=depth))[:, 0].tolist() == wanted
        assert shown(png([(*each, opaque) for each in grey], 4, *chunks, depth=depth))[:, 1].tolist() == wanted
        (half,) = shown(png([(opaque, 128 * unit)], 4, *chunks, depth=depth))
        assert half.tolist() == [128] * 3
    key = (b"tRNS", struct.pack(">H", 128))
    assert shown(png([(128,), (10,)], 0, *chunks, key))[:, 0].tolist() == [0, 56]


def test_dark_levels_of_16_bits_are_not_rounded_before_the_gamma() -> None:
    samples = list(range(0, 2000, 20))

    found = shown(png([(sample,) for sample in samples], 0, gamma(100_000), depth=16))[:, 0]

    assert len(set(found.tolist())) > 40


UNTOUCHED: list[tuple[Chunk, ...]] = [
    (gamma(45_455),),
    (gamma(44_000),),
    (gamma(45_455), primaries(*SRGB)),
    (gamma(45_455), primaries(31271, 32902, 64001, 33000, 30000, 60000, 15001, 6000)),
    (primaries(*ADOBE),),
    (gamma(0),),
    (gamma(100_000), primaries(*[0] * 8)),
    (gamma(100_000), (b"sRGB", b"\0")),
    (gamma(100_000), primaries(*ADOBE), (b"sRGB", b"\1")),
    (gamma(100_000), ICC),
    ((b"gAMA", bytes(3)),),
    ((b"gAMA", bytes(8)),),
]


@pytest.mark.parametrize("chunks", UNTOUCHED)
def test_colours_of_srgb_and_chunks_without_meaning_change_nothing(chunks: tuple[Chunk, ...]) -> None:
    assert np.abs(shown(png(PIXELS, 2, *chunks)) - PIXELS).max() <= 0


@pytest.mark.parametrize("place", ["damaged", "after"])
def test_a_chunk_that_is_damaged_or_follows_the_pixels_is_ignored(place: str) -> None:
    name, payload = gamma(100_000)
    chunk = (4).to_bytes(4, "big") + name + payload
    file = png(PIXELS, 2)
    at = file.index(b"IDAT" if place == "damaged" else b"IEND") - 4
    checksum = bytes(4) if place == "damaged" else zlib.crc32(chunk[4:]).to_bytes(4, "big")

    assert (shown(file[:at] + chunk + checksum + file[at:]) == PIXELS).all()
