"""Damage of every accepted format, each with its exact outcome: a picture, or a refusal with its reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pia_batch.errors import ImageUnreadableError
from pia_batch.media import images

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
LAYOUTS = [
    *((depth, 0, 1) for depth in (1, 2, 4, 8, 16)),
    *((depth, 3, 1) for depth in (1, 2, 4, 8)),
    *((depth, kind, samples) for depth in (8, 16) for kind, samples in ((2, 3), (4, 2), (6, 4))),
]
"""Depth, colour type and samples of a pixel, of every PNG."""

NOISE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def decode(data: bytes) -> np.ndarray:
    return np.asarray(images.decode(data, max_pixels=10_000, background="#ff00ff"))


def saved(fmt: str, image: Image.Image | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(sink, fmt, **options)
    return sink.getvalue()


def png(
    rows: bytes, size: tuple[int, int], depth: int, kind: int, *, interlaced: bool = False, palette: bytes | None = None
) -> bytes:
    """Return a PNG whose packed data is whole, however few its rows are.

    Args:
        rows: Rows with their filters.
        size: Width and height in its header.
        depth: Bits per sample.
        kind: Colour type.
        interlaced: True: the rows are those of seven passes.
        palette: Content of the palette; None: grey, as many as the depth allows. Colour type 3 only.
    """
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, interlaced)
    if palette is None:
        palette = b"".join(bytes([level] * 3) for level in range(2**depth)) if kind == 3 else b""
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if not palette:
        del chunks[1]
    parts = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def row_bytes(size: tuple[int, int], bits: int, *, interlaced: bool) -> Iterator[int]:
    """Yield the bytes of each row with its filter, in the order of the file."""
    width, height = size
    for x, y, dx, dy in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = len(range(x, width, dx)), len(range(y, height, dy))
        yield from [1 + (columns * bits + 7) // 8] * rows if columns else []


@pytest.mark.parametrize("interlaced", [False, True], ids=["in order", "interlaced"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_png_without_all_of_its_rows_is_truncated_wherever_they_end(
    layout: tuple[int, int, int], interlaced: bool
) -> None:
    depth, kind, samples = layout
    for size in [(8, 8), (5, 3), (3, 5), (1, 4)]:
        sizes = list(row_bytes(size, depth * samples, interlaced=interlaced))
        rows = [b"\0" + b"\x55" * (length - 1) for length in sizes]

        for whole in (b"".join(rows), bytes(sum(sizes)), b"".join(rows) + rows[-1]):
            assert decode(png(whole, size, depth, kind, interlaced=interlaced)).shape == (size[1], size[0], 3)
        for count in range(len(rows)):
            for part in (b"".join(rows[:count]), b"".join(rows[:count]) + rows[count][:-1]):
                with pytest.raises(ImageUnreadableError, match="truncated"):
                    decode(png(part, size, depth, kind, interlaced=interlaced))


INDEXED = b"".join(b"\0" + bytes([0, 1, 2, 3]) for _ in range(4))
COLOURS = bytes(range(3, 15))


def indexed_png(colours: int) -> bytes:
    return png(INDEXED, (4, 4), 8, 3, palette=COLOURS[: 3 * colours])


def indexed_gif(colours: int, transparent: int | None = None, last: tuple[int, int] = (2, 3)) -> bytes:
    """Return a GIF of 4 x 4 pixels, each row with the indices 0, 1 and `last`, and a palette of two or four colours."""
    codes = [code for _ in range(4) for code in (4, 0, 1, 4, *last)] + [5]
    bits = "".join(f"{code:03b}"[::-1] for code in codes)
    bits += "0" * (-len(bits) % 8)
    packed = bytes(int(bits[k : k + 8][::-1], 2) for k in range(0, len(bits), 8))
    control = b"" if transparent is None else b"!\xf9\4" + struct.pack("<BHB", 1, 0, transparent) + b"\0"
    head = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80 if colours == 2 else 0x81, 0, 0) + COLOURS[: 3 * colours]
    picture = b"," + struct.pack("<HHHHB", 0, 0, 4, 4, 0) + b"\2" + bytes([len(packed)]) + packed
    return head + control + picture + b"\0;"


def indexed_bmp(colours: int) -> bytes:
    palette = b"".join(COLOURS[3 * k : 3 * k + 3] + b"\0" for k in range(colours))
    info = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 0, 0, 2835, 2835, colours, 0)
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + 16, 0, 0, start) + info + palette + bytes([0, 1, 2, 3]) * 4


@pytest.mark.parametrize("make", [indexed_png, indexed_gif, indexed_bmp])
def test_a_pixel_without_a_colour_in_its_palette_is_corrupt(make: Any) -> None:
    colours = decode(make(4))[0].tolist()
    expected = [list(COLOURS[k : k + 3]) for k in (0, 3, 6, 9)]
    assert colours == (expected if make is not indexed_bmp else [each[::-1] for each in expected])

    with pytest.raises(ImageUnreadableError) as caught:
        decode(make(2))

    assert str(caught.value) == (
        "corrupt image: 8 of its pixels have a colour that its palette of 2 lacks; save it again"
    )


def test_a_gifs_transparent_pixels_need_no_colour() -> None:
    row = decode(indexed_gif(2, transparent=3, last=(3, 3)))[0].tolist()

    assert row == [list(COLOURS[:3]), list(COLOURS[3:6]), [255, 0, 255], [255, 0, 255]]


@pytest.mark.parametrize("palette", [b"", b"\0" * 2], ids=["none", "less than one colour"])
def test_a_palette_without_colours_is_corrupt(palette: bytes) -> None:
    with pytest.raises(
        ImageUnreadableError, match="corrupt image: 16 of its pixels have a colour that its palette of 0"
    ):
        decode(png(INDEXED, (4, 4), 8, 3, palette=palette))


WHOLE = {
    "PNG": saved("PNG"),
    "JPEG": saved("JPEG"),
    "JPEG progressive": saved("JPEG", progressive=True),
    "GIF": saved("GIF"),
    "WebP": saved("WEBP"),
    "WebP lossless": saved("WEBP", lossless=True),
    "BMP": saved("BMP"),
    "BMP of a palette": saved("BMP", Image.fromarray(NOISE).quantize(16)),
}
ENDS = {"PNG": 20, "GIF": 2}
"""Bytes after the last pixel that a picture does not need: a PNG's checksums and last chunk, the end of a GIF."""


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_that_ends_early_is_refused_wherever_it_ends(kind: str) -> None:
    data = WHOLE[kind]
    needed = len(data) - ENDS.get(kind, 0)
    wanted = decode(data)

    for length in [*range(1, needed, 7), *range(max(1, needed - 20), needed)]:
        with pytest.raises(ImageUnreadableError) as caught:
            decode(data[:length])
        assert "\n" not in str(caught.value)
    for length in range(needed, len(data)):
        assert np.array_equal(decode(data[:length]), wanted)


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind.startswith("WebP")])
def test_a_webp_whose_sizes_were_corrected_after_it_was_cut_is_refused(kind: str) -> None:
    data = WHOLE[kind]
    for length in range(40, len(data) - 2, 10):
        cut = bytearray(data[: length // 2 * 2])
        cut[4:8], cut[16:20] = struct.pack("<I", len(cut) - 8), struct.pack("<I", len(cut) - 20)

        with pytest.raises(ImageUnreadableError):
            decode(bytes(cut))


def test_a_tiff_that_ends_early_is_refused_by_the_name_of_its_format() -> None:
    data = saved("TIFF")
    for length in (8, len(data) // 2, len(data) - 1):
        with pytest.raises(ImageUnreadableError, match=r"got a TIFF image: .*; save it as PNG"):
            decode(data[:length])
