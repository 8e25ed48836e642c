"""MP4: H.264 at 4:2:0, BT.709 limited range, which every browser and player decodes. The only module that uses PyAV."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction

import av
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from pia_batch.config import EncodingConfig
from pia_batch.media.codecs.codec import AnyFrames, Codec, Frames, Playback, require
from pia_batch.media.metadata import Metadata, mp4_box

_ACCURATE = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
_BT709 = {"src_colorspace": Colorspace.ITU709, "dst_colorspace": Colorspace.ITU709, "threads": 1}
_BT709 |= {"interpolation": Interpolation.BICUBIC | Interpolation.BITEXACT | _ACCURATE}
_TO_YUV = _BT709 | {"format": "yuv420p", "src_color_range": ColorRange.JPEG, "dst_color_range": ColorRange.MPEG}
_TO_RGB = _BT709 | {"format": "rgb24", "src_color_range": ColorRange.MPEG, "dst_color_range": ColorRange.JPEG}


def _encode(frames: AnyFrames, playback: Playback, config: EncodingConfig, metadata: Metadata | None) -> bytes:
    num_frames, height, width, _ = frames.shape
    fps = playback.fps
    file = io.BytesIO()
    # Names that every player knows: a program that copies the file keeps these, and drops names of our own.
    texts = (
        {"comment": metadata.comment, "description": metadata.description, "encoding_tool": metadata.software}
        if metadata
        else {}
    )
    muxing = {
        "fflags": "+bitexact",  # no time stamp, no version
        # Room for the index at the front, so that a player can start before it has the whole file. `faststart` does the
        # same, but opens the file again by name. The index of 1 frame takes 0.8 KB, each further one at most 24 bytes.
        "moov_size": str(2048 + 32 * num_frames + sum(len(text.encode()) for text in texts.values())),
        "movie_timescale": str(fps.numerator),  # the default, milliseconds, cannot express 1/7.5 s
    }
    with av.open(file, "w", format="mp4", container_options=muxing) as container:
        # Without this, x264's output depends on the processor, and with AVX-512 sometimes on uninitialised memory.
        options = {"crf": str(config.mp4_crf), "preset": config.mp4_preset, "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
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
    return file.getvalue() + (mp4_box(metadata) if metadata else b"")


def _decode(data: bytes, take: Callable[[Frames], None]) -> Fraction:
    position, boxes = 0, b""
    while position < len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        boxes += name if name != b"free" else b""
        position += max(8, size)
    whole = position == len(data) and boxes.removesuffix(b"uuid") == b"ftypmoovmdat"
    require(whole, f"{len(data)} bytes for {position} of {boxes!r}")
    with av.open(io.BytesIO(data), format="mp4") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}  # the default conceals errors
        count = 0
        for frame in container.decode(stream):
            take(frame.to_ndarray(**_TO_RGB))
            count += 1
        require(count == stream.frames, f"{count} of {stream.frames} frames decode")
        duration: Fraction = stream.duration * stream.time_base
        return duration


def _comments(data: bytes) -> list[str]:
    with av.open(io.BytesIO(data), format="mp4") as container:
        return list(container.metadata.values())


MP4 = Codec(
    format="mp4",
    extension="mp4",
    signature=(4, b"ftyp"),
    encode=_encode,
    decode=_decode,
    comments=_comments,
    player="video",
    bytes_per_pixel=(0.03, 0.08),
    side_multiple=2,  # 4:2:0 stores one chroma sample for 2 x 2 pixels
    errors=(av.FFmpegError,),
)
