"""PNG parts that Pillow does not read as they are: 16-bit colour, colour keys of every depth (tRNS), large profiles.

Pillow compares the key of a 1-, 2- or 4-bit picture with samples that it has scaled already, and keeps only the high
byte of 16-bit colour.

Source: PNG specification (third edition), 11.3.1.1 tRNS and 13.12 sample depth rescaling; where a chunk is invalid,
libpng and with it browsers ignore it.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, PngImagePlugin

from pia_batch.errors import ImageUnreadableError
from pia_batch.media import image_headers, png_colours
from pia_batch.media.png_colours import PngColours

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""Colour types of IHDR."""

_KEY_BYTES = {GREY: 2, RGB: 6}

_PICTURE = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
"""Chunks that Pillow gets. Without those of an animation it shows the picture that other programs show."""

_COLOURS = frozenset({b"gAMA", b"cHRM", b"sRGB"})
"""Chunks that say what colours are, where there is no profile; damaged ones are ignored."""

_INTENTS = frozenset({b"\0", b"\1", b"\2", b"\3"})
"""Payloads of a valid sRGB chunk."""

_TO_8_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)


def layout(data: bytes) -> tuple[int, int]:
    """Return bits per sample and colour type."""
    return data[24], data[25]


@dataclass(frozen=True)
class Png:
    """Parts of a PNG that define its picture.

    Attributes:
        data: File of nothing but header, palette, transparency of the palette, and pixels. Pillow refuses a file for
            more than 1 MiB of packed text or profile, and misreads colour keys.
        key: Colour key as stored samples, or None.
        profile: ICC profile of the decoded picture, or None.
        colours: Colours that other chunks give, by which samples are decoded; None: these are encoded as in sRGB, or
            as the profile has it.
    """

    data: bytes
    key: tuple[int, ...] | None
    profile: bytes | None
    colours: PngColours | None = None


def parts(data: bytes) -> Png:
    """Return the parts of a whole file that define its picture.

    Raises:
        ImageUnreadableError: A tRNS chunk is damaged, or there are too many chunks.
        IncompleteError: The file ends within a tRNS chunk.
    """
    depth, colour_type = layout(data)
    key: tuple[int, ...] | None = None
    profile: bytes | None = None
    kept = [data[:8]]
    names: set[bytes] = set()
    colours: dict[bytes, bytes] = {}
    for name, start, end in image_headers.png_chunks(data):
        is_first, has_pixels = name not in names, b"IDAT" in names
        names.add(name)
        if name == b"tRNS" and is_first and not has_pixels:
            payload = _checked(data, name, start, end)
            if colour_type != PALETTE:
                key = _key(payload, depth, colour_type)
            elif payload and b"PLTE" in names:
                kept.append(data[start - 8 : end + 4])
        elif name == b"iCCP" and is_first and not has_pixels:
            profile = _profile(data[start:end])
        elif name in _COLOURS and is_first and not has_pixels and _is_whole(data, name, start, end):
            colours[name] = data[start:end]
        elif name in _PICTURE:
            kept.append(data[start - 8 : end + 4])
        if name == b"IEND":
            break
    if profile is not None or colours.get(b"sRGB") in _INTENTS:
        return Png(b"".join(kept), key, profile)
    found = png_colours.read(colours.get(b"gAMA"), colours.get(b"cHRM"))
    return Png(b"".join(kept), key, None if found is None else found.profile, found)


def refuse_missing_pixels(image: Image.Image, data: bytes) -> None:
    """Refuse a decoded picture whose file has fewer rows: Pillow leaves them 0 if the packed data ends between rows.

    The data is unpacked once more only where one of the last two rows is 0, which also covers the last two passes of an
    interlaced picture.

    Raises:
        ImageUnreadableError: The file ends its pixels early.
    """
    width, height = image.size
    last = np.asarray(image.crop((0, max(0, height - 2), width, height)))
    if last.reshape(len(last), -1).any(axis=1).all():
        return
    wanted = _num_unpacked(data, width, height)
    found = 0
    unpacker = zlib.decompressobj()
    for name, start, end in image_headers.png_chunks(data):
        packed = data[start:end] if name == b"IDAT" else b""
        while packed and found < wanted:
            part = unpacker.decompress(packed, _UNPACKED_BYTES)
            found += len(part)
            packed = unpacker.unconsumed_tail if len(part) == _UNPACKED_BYTES else b""
    if found < wanted:
        msg = f"truncated image: the PNG's pixels end after {found} of {wanted} bytes"
        raise ImageUnreadableError(msg)


_UNPACKED_BYTES = 2**20
"""Largest number of bytes that are unpacked at a time."""

_SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
"""Samples of a pixel by colour type."""

_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, step of columns and step of rows of each pass of an interlaced picture."""


def _num_unpacked(data: bytes, width: int, height: int) -> int:
    """Return the number of bytes of all rows with their filters."""
    depth, colour_type = layout(data)
    bits, is_interlaced = depth * _SAMPLES[colour_type], data[28]
    parts = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _PASSES]
    sizes = parts if is_interlaced else [(width, height)]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)


def _checked(data: bytes, name: bytes, start: int, end: int) -> bytes:
    """Return the payload of a chunk whose checksum is right."""
    if len(data) < end + 4:
        raise image_headers.IncompleteError
    if not _is_whole(data, name, start, end):
        msg = f"corrupt or truncated image: the checksum of the PNG's {name.decode()} chunk is wrong"
        raise ImageUnreadableError(msg)
    return data[start:end]


def _is_whole(data: bytes, name: bytes, start: int, end: int) -> bool:
    """Return True if the checksum of a chunk is right."""
    return zlib.crc32(data[start:end], zlib.crc32(name)) == int.from_bytes(data[end : end + 4], "big")


def _key(payload: bytes, depth: int, colour_type: int) -> tuple[int, ...] | None:
    if len(payload) != _KEY_BYTES.get(colour_type):
        return None
    # The upper bits of a key are ignored where samples have fewer bits.
    return tuple(each & (1 << depth) - 1 for each in struct.unpack(f">{len(payload) // 2}H", payload))


def _profile(payload: bytes) -> bytes | None:
    """Return the profile of an iCCP chunk, at most one byte more than is used; None if it is broken."""
    packed = payload.partition(b"\0")[2][1:]
    try:
        return zlib.decompressobj().decompress(packed, image_headers.MAX_PROFILE_BYTES + 1) or None
    except zlib.error:
        return None


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


def decode_16_bit(png: Png) -> tuple[Image.Image, Image.Image | None]:
    """Return colour in mode L or RGB, encoded as in sRGB, and alpha in mode L or None.

    Reads 16-bit RGB, grey with alpha, and RGBA.
    """
    data, key, levels = png.data, png.key, _levels(png)
    _, colour_type = layout(data)
    if colour_type == GREY_ALPHA:
        # Four bytes a pixel are 8-bit RGBA to filters and interlacing alike.
        header = data[12:24] + bytes((8, RGBA)) + data[26:29]
        crc = zlib.crc32(header).to_bytes(4, "big")
        data = data[:12] + header + crc + data[33:]
        with _open(data) as image:
            image.load()
            refuse_missing_pixels(image, data)
            halves = image.split()
        return _joined(halves[0], halves[1], levels), _joined(halves[2], halves[3])
    mode = "RGB" if colour_type == RGB else "RGBA"
    with _open(data) as image:
        image.load()
        refuse_missing_pixels(image, data)
        high = image.split()
    with _open(data) as image:
        # Read as if the bytes of each sample were swapped, of which Pillow keeps the low one.
        image.tile = [tile._replace(args=f"{mode};16L") for tile in image.tile]
        image.load()
        low = image.split()
    colour = Image.merge("RGB", [_joined(*halves, levels) for halves in zip(high[:3], low[:3], strict=True)])
    if colour_type == RGBA:
        return colour, _joined(high[3], low[3])
    if key is None:
        return colour, None
    differs = np.zeros((colour.height, colour.width), bool)
    for upper, lower, value in zip(high, low, key, strict=True):
        differs |= (np.asarray(upper) != value >> 8) | (np.asarray(lower) != value & 255)
    return colour, Image.fromarray(differs.astype(np.uint8) * np.uint8(255))


def decode_16_bit_grey(image: Image.Image, png: Png | None) -> tuple[Image.Image, Image.Image | None]:
    """Return grey and alpha of Pillow's modes I;16 and I, scaled to 8 bits. Pillow's own conversion clips at 255."""
    samples = np.asarray(image)
    if samples.dtype != np.uint16:
        samples = np.clip(samples, 0, 65535).astype(np.uint16)
    grey = Image.fromarray((_TO_8_BITS if png is None else _levels(png))[samples])
    if png is None or png.key is None:
        return grey, None
    return grey, Image.fromarray(np.where(samples == png.key[0], 0, 255).astype(np.uint8))


def _levels(png: Png) -> NDArray[np.uint8]:
    """Return the level of 8 bits, encoded as in sRGB, of every 16-bit sample of colour."""
    return _TO_8_BITS if png.colours is None else png.colours.levels(16)


def _open(data: bytes) -> PngImagePlugin.PngImageFile:
    return PngImagePlugin.PngImageFile(io.BytesIO(data))


def _joined(high: Image.Image, low: Image.Image, levels: NDArray[np.uint8] = _TO_8_BITS) -> Image.Image:
    """Return the levels of 8 bits of 16-bit samples, from their two bytes."""
    samples: NDArray[np.uint16] = np.asarray(high).astype(np.uint16)
    samples <<= 8
    samples |= np.asarray(low)
    return Image.fromarray(levels[samples])
