"""WebP: frames are encoded one by one and assembled here.

libwebp's own animation encoder drops identical frames, and writes a single frame without its duration.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable
from fractions import Fraction

from PIL import Image

from pia_batch.config import EncodingConfig
from pia_batch.media.codecs.codec import AnyFrames, Codec, Frames, Playback, decode_with_pillow, frame_delays, require
from pia_batch.media.metadata import Metadata, image_comments, webp_chunks

_ANIMATED, _HAS_EXIF_AND_XMP = 0x02, 0x08 | 0x04
"""Flags of the VP8X chunk. Source: RFC 9649, 2.7."""

_TICKS_PER_SECOND = 1000


def _encode(frames: AnyFrames, playback: Playback, config: EncodingConfig, metadata: Metadata | None) -> bytes:
    num_frames, height, width, _ = frames.shape
    canvas = _uint24(width - 1) + _uint24(height - 1)
    flags = _ANIMATED | (_HAS_EXIF_AND_XMP if metadata else 0)
    chunks = [
        _chunk(b"VP8X", bytes([flags, 0, 0, 0]) + canvas),
        _chunk(b"ANIM", b"\0\0\0\xff" + struct.pack("<H", playback.loop_count)),  # black background
    ]
    settings = {"quality": config.webp_quality, "lossless": config.webp_lossless, "method": config.webp_method}
    for frame, delay in zip(frames, frame_delays(num_frames, playback.fps, _TICKS_PER_SECOND), strict=True):
        still = io.BytesIO()
        Image.fromarray(frame).save(still, "WEBP", **settings)
        place = bytes(6) + canvas + _uint24(delay) + b"\x02"  # replaces the previous frame
        chunks.append(_chunk(b"ANMF", place + still.getvalue()[12:]))  # without the RIFF header
    chunks += [_chunk(name, content) for name, content in (webp_chunks(metadata) if metadata else [])]
    return _chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def _chunk(name: bytes, payload: bytes) -> bytes:
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def _uint24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _decode(data: bytes, take: Callable[[Frames], None]) -> Fraction:
    require(int.from_bytes(data[4:8], "little") + 8 == len(data), f"{len(data)} bytes do not match the header")
    return decode_with_pillow(data, "WEBP", take)


WEBP = Codec(
    format="webp",
    extension="webp",
    signature=(8, b"WEBP"),
    encode=_encode,
    decode=_decode,
    comments=functools.partial(image_comments, pillow_format="WEBP"),
    player="image",
    bytes_per_pixel=(0.12, 0.28),
)
