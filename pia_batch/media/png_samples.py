"""PNG samples that Pillow does not read as they are: 16-bit colour, and the colour key of every depth (tRNS).

Pillow compares the key of a 1-, 2- or 4-bit picture with samples that it has scaled already, and keeps only the high
byte of 16-bit colour.

Source: PNG specification (third edition), 11.3.1.1 tRNS and 13.12 sample depth rescaling; where a chunk is invalid,
libpng and with it browsers ignore it.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, PngImagePlugin

from pia_batch.errors import ImageUnreadableError
from pia_batch.media import image_headers

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""Colour types of IHDR."""

_KEY_BYTES = {GREY: 2, RGB: 6}

_TO_8_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)


def layout(data: bytes) -> tuple[int, int]:
    """Return bits per sample and colour type."""
    return data[24], data[25]


def colour_key(data: bytes) -> tuple[bytes, tuple[int, ...] | None]:
    """Return the file without a tRNS chunk that Pillow would misread, and the key as stored samples, if it has one.

    A palette keeps its valid tRNS chunk, which Pillow reads as it should be read.

    Raises:
        ImageUnreadableError: A tRNS chunk is damaged.
        IncompleteError: The file ends within a tRNS chunk.
    """
    depth, colour_type = layout(data)
    key: tuple[int, ...] | None = None
    has_palette, seen, kept, end_of_kept = False, False, [], 0
    for name, start, end in image_headers.png_chunks(data):
        if name in (b"IDAT", b"IEND"):
            break
        if name == b"PLTE":
            has_palette = True
        if name != b"tRNS":
            continue
        payload = data[start:end]
        if len(data) < end + 4:
            raise image_headers.IncompleteError
        if zlib.crc32(name + payload) != int.from_bytes(data[end : end + 4], "big"):
            msg = "corrupt or truncated image: the checksum of the PNG's tRNS chunk is wrong"
            raise ImageUnreadableError(msg)
        if colour_type == PALETTE and has_palette and not seen and payload:
            seen = True
            continue
        kept.append(data[end_of_kept : start - 8])
        end_of_kept = end + 4
        if key is None and len(payload) == _KEY_BYTES.get(colour_type):
            # The upper bits of a key are ignored where samples have fewer bits.
            key = tuple(each & (1 << depth) - 1 for each in struct.unpack(f">{len(payload) // 2}H", payload))
    return b"".join([*kept, data[end_of_kept:]]) if kept else data, key


def alpha_of_key(image: Image.Image, key: tuple[int, ...], depth: int) -> Image.Image:
    """Return alpha in mode L: 0 where all samples equal the key.

    Args:
        image: Picture of up to 8 bits per sample in mode 1, L or RGB, whose samples Pillow has scaled to 8 bits.
        key: Key as stored samples.
        depth: Bits per sample in the file.
    """
    largest = (1 << depth) - 1
    channels = (image.convert("L"),) if image.mode == "1" else image.split()
    alpha: Image.Image | None = None
    for channel, value in zip(channels, key, strict=True):
        scaled = value * 255 // largest
        differs = channel.point([0 if level == scaled else 255 for level in range(256)])
        alpha = differs if alpha is None else ImageChops.lighter(alpha, differs)
    if alpha is None:
        msg = "a key has one sample or more"
        raise ValueError(msg)
    return alpha


def decode_16_bit(data: bytes, key: tuple[int, ...] | None) -> tuple[Image.Image, Image.Image | None, dict[Any, Any]]:
    """Return colour in mode L or RGB, alpha in mode L or None, and Pillow's `info`.

    Reads 16-bit RGB, grey with alpha, and RGBA.

    Args:
        data: Whole file, without a tRNS chunk.
        key: Colour key as stored samples.
    """
    _, colour_type = layout(data)
    if colour_type == GREY_ALPHA:
        # Four bytes a pixel are 8-bit RGBA to filters and interlacing alike.
        header = data[12:24] + bytes((8, RGBA)) + data[26:29]
        crc = zlib.crc32(header).to_bytes(4, "big")
        with _open(data[:12] + header + crc + data[33:]) as image:
            image.load()
            halves, info = image.split(), image.info
        return _joined(halves[0], halves[1]), _joined(halves[2], halves[3]), info
    mode = "RGB" if colour_type == RGB else "RGBA"
    with _open(data) as image:
        image.load()
        high, info = image.split(), image.info
    with _open(data) as image:
        # Read as if the bytes of each sample were swapped, of which Pillow keeps the low one.
        image.tile = [tile._replace(args=f"{mode};16L") for tile in image.tile]
        image.load()
        low = image.split()
    colour = Image.merge("RGB", [_joined(*halves) for halves in zip(high[:3], low[:3], strict=True)])
    if colour_type == RGBA:
        return colour, _joined(high[3], low[3]), info
    if key is None:
        return colour, None, info
    differs = np.zeros((colour.height, colour.width), bool)
    for upper, lower, value in zip(high, low, key, strict=True):
        differs |= (np.asarray(upper) != value >> 8) | (np.asarray(lower) != value & 255)
    return colour, Image.fromarray(differs.astype(np.uint8) * np.uint8(255)), info


def decode_16_bit_grey(image: Image.Image, key: tuple[int, ...] | None) -> tuple[Image.Image, Image.Image | None]:
    """Return grey and alpha of Pillow's modes I;16 and I, scaled to 8 bits. Pillow's own conversion clips at 255."""
    samples = np.asarray(image)
    if samples.dtype != np.uint16:
        samples = np.clip(samples, 0, 65535).astype(np.uint16)
    grey = Image.fromarray(_TO_8_BITS[samples])
    if key is None:
        return grey, None
    return grey, Image.fromarray(np.where(samples == key[0], 0, 255).astype(np.uint8))


def _open(data: bytes) -> PngImagePlugin.PngImageFile:
    return PngImagePlugin.PngImageFile(io.BytesIO(data))


def _joined(high: Image.Image, low: Image.Image) -> Image.Image:
    """Return 8-bit samples, rounded, from the two bytes of 16-bit samples."""
    samples: NDArray[np.uint16] = np.asarray(high).astype(np.uint16)
    samples <<= 8
    samples |= np.asarray(low)
    return Image.fromarray(_TO_8_BITS[samples])
