"""BMP pixels that Pillow does not read with their transparency: 16 and 32 bits with bit masks, and run-length encoding.

The other BMPs have no transparency and are left to Pillow: palettes, 24 bits, and BI_RGB, whose fourth byte is unused.

Sources: Microsoft's pages on BITMAPINFOHEADER, BITMAPV4HEADER and BITMAPV5HEADER; where these are silent, what browsers
do (Chromium's `bmp_image_reader.cc`, Firefox's `nsBMPDecoder.cpp`).
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pia_batch.errors import ImageUnreadableError
from pia_batch.media.image_headers import IncompleteError

_RLE8, _RLE4, _BITFIELDS, _ALPHABITFIELDS = 1, 2, 3, 6
"""Values of biCompression. The last is of Windows CE: an alpha mask follows the three masks of colours."""

_MASKED_HEADERS = frozenset({40, 52, 56, 108, 124})
"""Sizes of the headers, in bytes, under which biCompression 3 means bit masks; in OS/2's 64 bytes it does not."""

_ALPHA_HEADER = 56
"""Size of the smallest header that has an alpha mask: BITMAPV3INFOHEADER."""

_MASKS_AT = 54
"""Offset of the masks in the file: within the header from 52 bytes on, behind a header of 40 bytes."""

_DEFAULT_MASKS = {16: (0x7C00, 0x03E0, 0x001F), 32: (0xFF0000, 0xFF00, 0xFF)}
"""Masks of red, green and blue where a file leaves all three at 0, by bits per pixel."""

_END_OF_ROW, _END_OF_PICTURE, _STEP = 0, 1, 2
"""Codes that follow a zero byte in a run-length encoded picture; a step moves to the right and up."""

_BAND_PIXELS = 1 << 20
"""Number of pixels that are converted at a time; bounds the memory that the conversion takes above its result."""


def decode(data: bytes) -> tuple[Image.Image, Image.Image | None] | None:
    """Return colour in mode RGB and alpha in mode L, or None for the alpha of an opaque picture.

    Returns None for the whole if Pillow reads the file as it should be read.

    Args:
        data: Whole file, whose size has been validated.

    Raises:
        IncompleteError: The file ends before its pixels.
        ImageUnreadableError: The masks overlap or have holes.
    """
    if len(data) < _MASKS_AT:
        return None
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    bits, compression = struct.unpack_from("<HI", data, 28)
    if header_bytes not in _MASKED_HEADERS:
        return None
    if compression in (_BITFIELDS, _ALPHABITFIELDS) and bits in _DEFAULT_MASKS:
        return _masked(data, header_bytes, bits, has_alpha=header_bytes >= _ALPHA_HEADER or compression != _BITFIELDS)
    if (compression, bits) in ((_RLE8, 8), (_RLE4, 4)):
        return _run_length(data, header_bytes, bits)
    return None


def _masked(data: bytes, header_bytes: int, bits: int, *, has_alpha: bool) -> tuple[Image.Image, Image.Image | None]:
    count = 4 if has_alpha else 3
    if len(data) < _MASKS_AT + 4 * count:
        raise IncompleteError
    # Some files have an alpha mask in bits that their pixels do not have.
    masks = [mask & (1 << bits) - 1 for mask in struct.unpack_from(f"<{count}I", data, _MASKS_AT)]
    if not any(masks[:3]):
        masks[:3] = _DEFAULT_MASKS[bits]
    _check(masks)
    if count == 4 and not masks[3]:  # noqa: PLR2004 - red, green, blue, alpha
        count = 3
    width, height = struct.unpack_from("<ii", data, 18)
    stride = (width * bits + 31) // 32 * 4
    start = _start(data, max(14 + header_bytes, _MASKS_AT + 4 * len(masks)))
    if len(data) < start + stride * abs(height):
        raise IncompleteError
    rows = np.frombuffer(data, np.uint8, stride * abs(height), start).reshape(abs(height), stride)
    rows = rows[:, : width * bits // 8].view("<u2" if bits == 16 else "<u4")  # noqa: PLR2004 - bits of two bytes
    samples = np.empty((abs(height), width, count), np.uint8)
    step = max(1, _BAND_PIXELS // width)
    is_opaque = True
    for top in range(0, abs(height), step):
        band = rows[top : top + step]
        for channel in range(count):
            samples[top : top + step, :, channel] = _channel(band, masks[channel])
        # Of the stored bits: a small alpha of more than 8 bits is 0 once it is scaled.
        is_opaque = is_opaque and (count == 3 or not (band & masks[3]).any())  # noqa: PLR2004
    if height > 0:  # stored from the bottom
        samples = samples[::-1]
    colour = Image.fromarray(np.ascontiguousarray(samples[..., :3]))
    # Chromium shows a picture whose alpha is 0 everywhere as opaque: many programs declare alpha and leave it unset.
    if is_opaque:
        return colour, None
    return colour, Image.fromarray(np.ascontiguousarray(samples[..., 3]))


def _check(masks: list[int]) -> None:
    seen = 0
    for mask in masks:
        lowest = mask & -mask
        if mask & seen or (mask + lowest) & mask:
            msg = f"corrupt image: a BMP whose bit masks overlap or have holes (got {[hex(each) for each in masks]})"
            raise ImageUnreadableError(msg)
        seen |= mask


def _channel(pixels: NDArray[Any], mask: int) -> NDArray[Any]:
    """Return the samples under a mask, scaled to 8 bits; 0 for an empty mask."""
    if not mask:
        return np.zeros(pixels.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    largest = mask >> shift
    values = ((pixels & mask) >> shift).astype(np.uint64)
    scaled: NDArray[np.uint8] = ((values * 510 + largest) // (2 * largest)).astype(np.uint8)
    return scaled


def _start(data: bytes, after_header: int) -> int:
    """Return the offset of the pixels; a file that names none has them behind its headers."""
    (offset,) = struct.unpack_from("<I", data, 10)
    return int(offset) or after_header


def _run_length(data: bytes, header_bytes: int, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """Decode RLE8 and RLE4; pixels that the code skips are transparent, as in browsers."""
    width, height = struct.unpack_from("<ii", data, 18)
    (colours,) = struct.unpack_from("<I", data, 46)
    colours = min(colours or 1 << bits, 256)
    first = 14 + header_bytes
    if len(data) < first + 4 * colours:
        raise IncompleteError
    table = np.zeros((256, 3), np.uint8)
    table[:colours] = np.frombuffer(data, np.uint8, 4 * colours, first).reshape(colours, 4)[:, 2::-1]
    indices, written = _codes(data, _start(data, first + 4 * colours), width, abs(height), bits)
    picture = np.frombuffer(indices, np.uint8).reshape(abs(height), width)
    alpha = np.frombuffer(written, np.uint8).reshape(abs(height), width)
    if height > 0:  # stored from the bottom
        picture, alpha = picture[::-1], alpha[::-1]
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.putpalette(table.tobytes())
    return image.convert("RGB"), None if alpha.all() else Image.fromarray(np.ascontiguousarray(alpha))


def _codes(data: bytes, position: int, width: int, height: int, bits: int) -> tuple[bytearray, bytearray]:
    """Return the indices of a run-length encoded picture, row by row as stored, and 255 where one was written.

    Raises:
        IncompleteError: The code ends before the picture.
        ImageUnreadableError: More codes write nothing than an honest picture has.
    """
    indices, written = bytearray(width * height), bytearray(width * height)
    x = y = idle = 0
    while y < height:
        if len(data) < position + 2:
            if x == width and y == height - 1:  # complete, without an end code
                break
            raise IncompleteError
        before = x, y
        count, value = data[position], data[position + 1]
        if count:
            runs = _RUNS.match(data, position)
            end = position + 2 if runs is None else runs.end()
            kept = _runs(data[position:end], bits, width - x)
            position = end
        elif value == _END_OF_ROW:
            kept = b""
            position += 2
            x, y = 0, y + 1
        elif value == _END_OF_PICTURE:
            break
        elif value == _STEP:
            kept = b""
            right, up = _slice(data, position + 2, 2)
            position += 4
            x, y = min(x + right, width), y + up
        else:  # so many pixels one by one, padded to 16 bits
            num_bytes = (value * bits + 7) // 8
            kept = _unpacked(_slice(data, position + 2, num_bytes), bits)[: min(value, width - x)]
            position += 2 + num_bytes + num_bytes % 2
        if kept:
            at = y * width + x
            indices[at : at + len(kept)] = kept
            written[at : at + len(kept)] = b"\xff" * len(kept)
            x += len(kept)
        idle += (x, y) == before
        if idle > height + MAX_IDLE_CODES:
            msg = (
                f"corrupt image: a BMP whose run-length code does not advance (got more than {height + MAX_IDLE_CODES} "
                "codes that write nothing; the limit is fixed); save the image again, such as a PNG"
            )
            raise ImageUnreadableError(msg)
    return indices, written


MAX_IDLE_CODES = 10_000
"""Largest number of codes, in addition to one a row, that do not advance in a picture; each costs 2 us (measured)."""

_RUNS = re.compile(rb"(?:[\x01-\xff][\x00-\xff])+", re.DOTALL)
"""Runs without another code between them: all of them are of one row."""


def _runs(code: bytes, bits: int, most: int) -> bytes:
    """Return the first `most` indices of a sequence of runs, pairs of a count and a value."""
    if len(code) <= _FEW_RUNS:
        single = [_unpacked(code[k + 1 : k + 2], bits) * code[k] for k in range(0, len(code), 2)]
        return b"".join(each[: code[2 * k]] for k, each in enumerate(single))[:most]
    pairs = np.frombuffer(code, np.uint8, min(len(code), 2 * most)).reshape(-1, 2)  # each run has a pixel or more
    counts = pairs[:, 0].astype(np.int64)
    ends = np.minimum(np.cumsum(counts), most)
    counts = np.diff(ends, prepend=0)
    values = np.repeat(pairs[:, 1], counts)
    if bits == 4:  # noqa: PLR2004 - two indices in turn
        is_second = (np.arange(len(values)) - np.repeat(ends - counts, counts)) % 2 == 1
        values = np.where(is_second, values & 15, values >> 4)
    return values.astype(np.uint8).tobytes()


_FEW_RUNS = 32
"""Number of bytes of code up to which runs are joined without numpy, which takes longer to begin."""


def _slice(data: bytes, position: int, num_bytes: int) -> bytes:
    if len(data) < position + num_bytes:
        raise IncompleteError
    return data[position : position + num_bytes]


def _unpacked(packed: bytes, bits: int) -> bytes:
    """Return one index a byte."""
    return packed if bits == 8 else bytes(half for byte in packed for half in (byte >> 4, byte & 15))  # noqa: PLR2004
