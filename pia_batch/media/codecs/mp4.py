"""MP4: H.264, which every browser and player decodes, or AV1.

HEVC is left out: libx265 in the wheel of PyAV 18.1 writes beyond its memory where a picture is a single block, gives
other bytes from run to run, and fails from time to time (measured).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import av

from pia_batch.config import EncodingConfig
from pia_batch.media.codecs.codec import AnyFrames, Codec, Frames, Playback, require
from pia_batch.media.codecs.video import EncoderOptions, decode_stream, mux, read_comments, texts_of
from pia_batch.media.metadata import Metadata, mp4_box
from pia_batch.schema.settings import VideoCodec


def _encoder(codec: VideoCodec, config: EncodingConfig) -> EncoderOptions:
    if codec == "av1":
        options = {"crf": str(config.av1_crf), "preset": str(config.av1_preset), "svtav1-params": "lp=1"}
        return EncoderOptions("libsvtav1", options)
    # Without this, x264's output depends on the processor, and with AVX-512 sometimes on uninitialised memory.
    options = {"crf": str(config.mp4_crf), "preset": config.mp4_preset, "x264-params": "cpu-independent=1"}
    return EncoderOptions("libx264", options)


def _encode(frames: AnyFrames, playback: Playback, config: EncodingConfig, metadata: Metadata | None) -> bytes:
    fps = playback.fps
    texts = texts_of(metadata)
    muxing = {
        "fflags": "+bitexact",  # no time stamp, no version
        # Room for the index at the front, so that a player can start before it has the whole file. `faststart` does the
        # same, but opens the file again by name. The index of 1 frame takes 0.8 KB, each further one at most 24 bytes.
        "moov_size": str(2048 + 32 * frames.shape[0] + sum(len(text.encode()) for text in texts.values())),
        "movie_timescale": str(fps.numerator),  # the default, milliseconds, cannot express 1/7.5 s
    }
    data = mux(frames, fps, _encoder(playback.video_codec, config), "mp4", muxing, texts)
    return data + (mp4_box(metadata) if metadata else b"")


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
        count = decode_stream(container, take)
        require(count == stream.frames, f"{count} of {stream.frames} frames decode")
        duration: Fraction = stream.duration * stream.time_base
        return duration


MP4 = Codec(
    format="mp4",
    extension="mp4",
    signature=(4, b"ftyp"),
    encode=_encode,
    decode=_decode,
    comments=partial(read_comments, container_format="mp4"),
    player="video",
    bytes_per_pixel=(0.03, 0.08),
    side_multiple=2,  # 4:2:0 stores one chroma sample for 2 x 2 pixels
    errors=(av.FFmpegError,),
)
