"""Interface of one animation format, and what its implementations share."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageSequence

from pia_batch.config import MAX_FPS, EncodingConfig, Format
from pia_batch.media.metadata import Metadata
from pia_batch.schema.settings import VideoCodec
from pia_batch.storage.object_store import MEDIA_TYPES

Frames = npt.NDArray[np.uint8]
"""(F, H, W, 3) RGB, 0-255."""


@dataclass(frozen=True, slots=True)
class FrameStream:
    """Frames that are made while they are encoded, so that a long clip is never in memory as a whole.

    Attributes:
        shape: (F, H, W, 3), as that of an array of them.
        start: Function that begins with the first frame; each frame is uint8 of shape (H, W, 3), C-contiguous.
    """

    shape: tuple[int, int, int, int]
    start: Callable[[], Iterator[Frames]]

    def __iter__(self) -> Iterator[Frames]:
        return self.start()

    def __len__(self) -> int:
        return self.shape[0]

    def array(self) -> Frames:
        """Return all frames as one array, for formats that need them together."""
        frames = np.empty(self.shape, np.uint8)
        for number, frame in enumerate(self):
            frames[number] = frame
        return frames


AnyFrames = Frames | FrameStream
"""Frames of a clip, in memory or as they are made."""


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """Properties of an animation file, found by decoding every frame of it."""

    width: int
    height: int
    num_frames: int
    duration_s: float
    """Playing time of one pass, in seconds."""


@dataclass(frozen=True, slots=True)
class Playback:
    """Settings of one request that decide how its file plays."""

    fps: Fraction
    """Rate in frames per second."""
    loop_count: int = 0
    """Number of times that the animation plays; 0: for ever. Only GIF and WebP record it."""
    video_codec: VideoCodec = "h264"
    """Video codec of an MP4."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One animation format: its names, its limits, and its encoder and decoder.

    `encode` and `decode` may raise any exception; `codecs.encode` and `codecs.decode` turn them into EncodingError.
    """

    format: Format
    extension: str
    """File name extension, without the dot."""
    signature: tuple[int, bytes]
    """Byte offset and bytes by which a file of this format is recognised."""
    encode: Callable[[AnyFrames, Playback, EncodingConfig, Metadata | None], bytes]
    """Encoder of C-contiguous frames, with metadata or None for none. It takes one frame after the other, once."""
    decode: Callable[[bytes, Callable[[Frames], None]], Fraction]
    """Decoder of a complete file; gives one frame of shape (H, W, 3) after the other to a function, and returns the
    duration in seconds. It keeps no frame, so that long animations need little memory."""
    comments: Callable[[bytes], list[str]]
    """Reader of the comments in a file."""
    player: Literal["video", "image"] | None
    """HTML element that plays the format in browsers; None: browsers do not play it."""
    bytes_per_pixel: tuple[float, float]
    """Typical file size per pixel of every frame, in bytes, from calm pictures to busy ones.

    Measured: 16 frames of a slow zoom into six photographs of scikit-image at 512 x 512, with the default `encoding`.
    At half the side it is up to twice as much.
    """
    side_multiple: int = 1
    """Width and height must be multiples of this number of pixels."""
    errors: tuple[type[Exception], ...] = ()
    """Exceptions that the encoding library raises, besides Python's own."""

    @property
    def max_fps(self) -> int:
        """Highest rate, in frames per second."""
        return MAX_FPS[self.format]

    @property
    def media_type(self) -> str:
        """MIME type, as the store and browsers name the format."""
        return MEDIA_TYPES[self.extension]


def exact_rate(fps: float) -> Fraction:
    """Return a frame rate as a fraction whose denominator is at most 1001, that of the NTSC rates."""
    return Fraction(fps).limit_denominator(1001)


def frame_delays(num_frames: int, fps: Fraction, ticks_per_second: int) -> list[int]:
    """Return the display time of each frame, in ticks.

    The end times are rounded, not the delays, so that rounding errors do not add up.
    """
    ends = [math.floor(k * ticks_per_second / fps + Fraction(1, 2)) for k in range(num_frames + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def require(condition: bool, problem: str) -> None:
    """Raise ValueError with `problem` unless `condition` holds."""
    if not condition:
        raise ValueError(problem)


def decode_with_pillow(data: bytes, pillow_format: str, take: Callable[[Frames], None]) -> Fraction:
    """Give each frame of an animated image, of shape (H, W, 3), to `take`; return the duration in seconds."""
    milliseconds = 0
    with Image.open(io.BytesIO(data), formats=(pillow_format,)) as file:
        for image in ImageSequence.Iterator(file):
            take(np.asarray(image.convert("RGB")))
            milliseconds += image.info["duration"]
    return Fraction(milliseconds, 1000)
