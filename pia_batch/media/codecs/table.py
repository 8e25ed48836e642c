"""Table of the animation formats, and encoding and decoding by a format's name.

The same frames, settings and library versions give the same bytes. Nothing here knows where files are stored.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

import numpy as np

from pia_batch.config import EncodingConfig, Format
from pia_batch.errors import EncodingError
from pia_batch.media.codecs.codec import Codec, Frames, FrameStream, MediaInfo, Playback, exact_rate, require
from pia_batch.media.codecs.gif import GIF
from pia_batch.media.codecs.mp4 import MP4
from pia_batch.media.codecs.png_zip import PNG_ZIP
from pia_batch.media.codecs.webm import WEBM
from pia_batch.media.codecs.webp import WEBP
from pia_batch.media.metadata import Metadata, image_comments
from pia_batch.schema.settings import VideoCodec

CODECS: Mapping[Format, Codec] = MappingProxyType({codec.format: codec for codec in (MP4, GIF, WEBP, PNG_ZIP, WEBM)})
"""The codec of every format."""

_PNG_SIGNATURE = (0, b"\x89PNG")


def encode(
    frames: Frames | FrameStream,
    fmt: Format,
    fps: float,
    config: EncodingConfig,
    metadata: Metadata | None = None,
    *,
    loop_count: int = 0,
    video_codec: VideoCodec = "h264",
) -> bytes:
    """Return the animation as one file. Identical neighbouring frames are all kept.

    MP4 keeps `fps` to a 1001th. GIF counts in 10 ms and WebP in 1 ms: single delays differ by one unit, so that the
    whole animation keeps its duration (8 fps as GIF: 130, 120, 130, ... ms).

    Args:
        frames: Pixels, uint8, shape (F, H, W, 3), RGB, 0-255, with at least one frame. H and W must be multiples of
            `side_multiple` of the codec. A stream of them is consumed once.
        fmt: Format of the file.
        fps: Rate in frames per second, from 1 to `max_fps` of the codec.
        config: Quality and speed of each format.
        metadata: Description of the animation to embed; None: nothing. Pixels do not depend on it.
        loop_count: Number of times that a GIF or WebP plays, at most 65535; 0: for ever.
        video_codec: Video codec of an MP4.

    Raises:
        EncodingError: Shape, dtype or rate is not supported by the format, or the encoder fails.
    """
    codec = CODECS[fmt]
    dtype = np.dtype(np.uint8) if isinstance(frames, FrameStream) else frames.dtype
    if dtype != np.uint8 or frames.shape[3:] != (3,) or 0 in frames.shape:
        msg = f"frames must be uint8 of shape (F, H, W, 3) and not empty (got {dtype} of {frames.shape})"
        raise EncodingError(msg)
    if not 1 <= fps <= codec.max_fps:  # also catches NaN
        msg = f"{fmt} plays 1 to {codec.max_fps} frames per second (got {fps:g})"
        raise EncodingError(msg)
    num_frames, height, width, _ = frames.shape
    if width % codec.side_multiple or height % codec.side_multiple:
        msg = f"{fmt} needs a width and a height that are multiples of {codec.side_multiple} (got {width} x {height})"
        raise EncodingError(msg)
    failures: tuple[type[Exception], ...] = (*codec.errors, OSError, ValueError, MemoryError, struct.error)
    try:
        playback = Playback(exact_rate(fps), loop_count, video_codec)
        pixels = frames if isinstance(frames, FrameStream) else np.ascontiguousarray(frames)
        return codec.encode(pixels, playback, config, metadata)
    except failures as err:
        msg = f"cannot encode {num_frames} frames as {fmt}: {type(err).__name__}: {err}"
        raise EncodingError(msg) from err


def decode(data: bytes, fmt: Format) -> Frames:
    """Return all frames of a file that `encode` wrote: uint8, shape (F, H, W, 3), RGB, 0-255.

    Raises:
        EncodingError: The file is truncated, followed by other bytes, corrupt, or of another format.
    """
    frames: list[Frames] = []
    _decode(data, fmt, frames.append)
    return np.stack(frames)


def probe(data: bytes, fmt: Format, on_frame: Callable[[Frames], object] = lambda _: None) -> MediaInfo:
    """Return size, number of frames and duration of a file, after decoding every frame of it, one at a time.

    Args:
        data: The file.
        fmt: Its format.
        on_frame: Function to call with each frame, uint8, shape (H, W, 3), RGB, 0-255.

    Raises:
        EncodingError: See `decode`.
    """
    shapes: list[tuple[int, ...]] = []

    def take(frame: Frames) -> None:
        shapes.append(frame.shape)
        on_frame(frame)

    duration = _decode(data, fmt, take)
    height, width, _ = shapes[0]
    return MediaInfo(width=width, height=height, num_frames=len(shapes), duration_s=float(duration))


def comments(data: bytes) -> list[str]:
    """Return the comments in a file, whichever program wrote them; of an MP4 every metadata value.

    Args:
        data: A GIF, an MP4, a WebM, a WebP, a PNG, or a zip with a `provenance.json` as `encode` writes it.

    Raises:
        EncodingError: The file is of another kind, or is damaged.
    """
    readers = (reader for (start, magic), reader in _COMMENTS if data[start : start + len(magic)] == magic)
    reader = next(readers, None)
    if reader is None:
        msg = "not a GIF, an MP4, a WebM, a WebP, a PNG or a zip of PNGs"
        raise EncodingError(msg)
    try:
        return reader(data)
    except Exception as err:  # the readers raise almost any exception on corrupt bytes
        msg = f"the file is too damaged to be read: {type(err).__name__}: {err}"
        raise EncodingError(msg) from err


def _decode(data: bytes, fmt: Format, take: Callable[[Frames], None]) -> Fraction:
    """Give each frame of a file to `take`, all of one shape and at least one; return the duration in seconds."""
    shapes: set[tuple[int, ...]] = set()

    def take_one(frame: Frames) -> None:
        shapes.add(frame.shape)
        require(len(shapes) == 1, f"frames of different sizes: {sorted(shapes)}")
        take(frame)

    try:
        duration = CODECS[fmt].decode(data, take_one)
        require(bool(shapes), "no frame")
    except Exception as err:  # the readers raise almost any exception on corrupt bytes
        msg = f"not a complete {fmt} file of this program: {type(err).__name__}: {err}"
        raise EncodingError(msg) from err
    return duration


_COMMENTS: list[tuple[tuple[int, bytes], Callable[[bytes], list[str]]]] = [
    *((codec.signature, codec.comments) for codec in CODECS.values()),
    (_PNG_SIGNATURE, functools.partial(image_comments, pillow_format="PNG")),  # one frame of an unpacked zip
]
"""Readers of comments by the signature of a file."""
