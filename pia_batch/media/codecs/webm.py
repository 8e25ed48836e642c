"""WebM: VP9, without fees, which every current browser plays."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import av

from pia_batch.config import EncodingConfig
from pia_batch.media.codecs.codec import AnyFrames, Codec, Frames, Playback, exact_rate, require
from pia_batch.media.codecs.video import EncoderOptions, decode_stream, mux, read_comments, texts_of
from pia_batch.media.metadata import Metadata

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
"""Ids of the two elements of a WebM file. Source: RFC 9559, 4."""


def _encode(frames: AnyFrames, playback: Playback, config: EncodingConfig, metadata: Metadata | None) -> bytes:
    quality = {"lossless": "1"} if config.webm_lossless else {"crf": str(config.webm_crf), "b": "0"}
    options = quality | {"deadline": "good", "cpu-used": str(config.webm_speed), "row-mt": "0"}
    texts = texts_of(metadata)
    if metadata:
        texts["xmp"] = metadata.xmp.decode()  # Matroska has no place of its own for XMP
    muxing = {"fflags": "+bitexact"}  # no time stamp, no version, no random id
    return mux(frames, playback.fps, EncoderOptions("libvpx-vp9", options), "webm", muxing, texts)


def _decode(data: bytes, take: Callable[[Frames], None]) -> Fraction:
    position, ids = 0, []
    while position < len(data):
        ids.append(data[position : position + 4])
        size, width = _size(data, position + 4)
        position += 4 + width + size
    require(position == len(data) and ids == [_EBML, _SEGMENT], f"{len(data)} bytes for {position} of {ids!r}")
    with av.open(io.BytesIO(data), format="webm") as container:
        count = decode_stream(container, take)
        rate = container.streams.video[0].average_rate
        require(bool(rate), "no frame rate")
        # Times are in milliseconds, rounded; the frame rate is exact.
        return count / exact_rate(float(rate or 0))


def _size(data: bytes, position: int) -> tuple[int, int]:
    """Return the size of an element's content, and the number of bytes that state it. Source: RFC 8794, 4."""
    width = 9 - data[position].bit_length()
    require(width <= 8, "not an EBML size")  # noqa: PLR2004 - see the source
    return int.from_bytes(data[position : position + width], "big") & ((1 << 7 * width) - 1), width


WEBM = Codec(
    format="webm",
    extension="webm",
    signature=(0, _EBML),
    encode=_encode,
    decode=_decode,
    comments=partial(read_comments, container_format="webm"),
    player="video",
    bytes_per_pixel=(0.02, 0.06),
    side_multiple=2,  # 4:2:0 stores one chroma sample for 2 x 2 pixels
    errors=(av.FFmpegError,),
)
