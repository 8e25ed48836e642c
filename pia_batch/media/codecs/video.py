"""Video streams, as MP4 and WebM share them: BT.709 limited range at 4:2:0, encoded into a container and decoded.

Encoders run on one thread, so that the same frames give the same bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import av
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from pia_batch.media.codecs.codec import AnyFrames, Frames
from pia_batch.media.metadata import Metadata

_ACCURATE = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
_BT709 = {"src_colorspace": Colorspace.ITU709, "dst_colorspace": Colorspace.ITU709, "threads": 1}
_BT709 |= {"interpolation": Interpolation.BICUBIC | Interpolation.BITEXACT | _ACCURATE}
_TO_YUV = _BT709 | {"format": "yuv420p", "src_color_range": ColorRange.JPEG, "dst_color_range": ColorRange.MPEG}
_TO_RGB = _BT709 | {"format": "rgb24", "src_color_range": ColorRange.MPEG, "dst_color_range": ColorRange.JPEG}


@dataclass(frozen=True)
class EncoderOptions:
    """Encoder of a video stream.

    Attributes:
        library: Name of the encoder in FFmpeg.
        options: Its options, by FFmpeg's names.
    """

    library: str
    options: Mapping[str, str]


def mux(
    frames: AnyFrames,
    fps: Fraction,
    encoder: EncoderOptions,
    container_format: str,
    container_options: Mapping[str, str],
    texts: Mapping[str, str],
) -> bytes:
    """Return a file with one video stream.

    Args:
        frames: Pixels, uint8, shape (F, H, W, 3), RGB, 0-255; H and W even.
        fps: Rate in frames per second.
        encoder: Encoder of the stream.
        container_format: Name of the container in FFmpeg.
        container_options: Options of the container, by FFmpeg's names.
        texts: Metadata of the container.

    Raises:
        FFmpegError: The encoder or the container refuses something.
    """
    os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints its settings to standard error unless only errors are wanted
    file = io.BytesIO()
    with av.open(file, "w", format=container_format, container_options=dict(container_options)) as container:
        stream = container.add_stream(encoder.library, rate=fps, options=dict(encoder.options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1  # more threads slice a frame differently: other bytes
        codec.time_base = 1 / fps
        codec.color_range, codec.colorspace = ColorRange.MPEG, Colorspace.ITU709
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        container.metadata.update(texts)
        for number, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(**_TO_YUV)
            frame.pts, frame.time_base, frame.duration = number, 1 / fps, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def texts_of(metadata: Metadata | None) -> dict[str, str]:
    """Return a file's metadata under names that every player knows; programs that copy a file drop other names."""
    if metadata is None:
        return {}
    return {"comment": metadata.comment, "description": metadata.description, "encoding_tool": metadata.software}


def read_comments(data: bytes, container_format: str) -> list[str]:
    """Return the texts of a file's metadata.

    Raises:
        FFmpegError: The file is no such container.
    """
    with av.open(io.BytesIO(data), format=container_format) as container:
        return list(container.metadata.values())


def decode_stream(container: av.container.InputContainer, take: Callable[[Frames], None]) -> int:
    """Give each frame of the container's video, of shape (H, W, 3), to `take`; return the number of frames.

    Raises:
        FFmpegError: The stream is damaged.
    """
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}  # the default conceals errors
    count = 0
    for frame in container.decode(stream):
        take(frame.to_ndarray(**_TO_RGB))
        count += 1
    return count
