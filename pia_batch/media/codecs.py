"""Frames to the bytes of an animation file and back, in memory: MP4, GIF, WebP, or PNGs in a zip.

The same frames, settings and library versions give the same bytes. Knows nothing of where files are stored.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import GifImagePlugin, Image, ImageSequence

from pia_batch.config import EncodingConfig, Format
from pia_batch.errors import EncodingError
from pia_batch.media.metadata import (
    Tags,
    gif_blocks,
    gif_comments,
    image_comments,
    in_png,
    mp4_box,
    walk_gif,
    webp_chunks,
)

Frames = npt.NDArray[np.uint8]
"""(F, H, W, 3) RGB, 0-255."""

EXTENSIONS: dict[Format, str] = {"mp4": "mp4", "gif": "gif", "webp": "webp", "png_zip": "zip"}
MEDIA_TYPES: dict[Format, str] = {
    "mp4": "video/mp4",
    "gif": "image/gif",
    "webp": "image/webp",
    "png_zip": "application/zip",
}

_MAX_FPS: dict[Format, float] = {"mp4": 60, "gif": 50, "webp": 60, "png_zip": 60}
"""GIF counts in 10 ms, and browsers show a frame of 10 ms for 100."""


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What an animation file holds once every frame is decoded. `duration_s` is how long one pass plays, seconds."""

    width: int
    height: int
    num_frames: int
    duration_s: float


def encode(frames: Frames, fmt: Format, fps: float, config: EncodingConfig, tags: Tags | None = None) -> bytes:
    """The animation as one file; GIF and WebP loop forever. Every frame is kept, also where neighbours are identical.

    MP4 keeps `fps` to a 1001th. GIF counts in 10 ms and WebP in 1 ms: there single delays differ by one unit, so that
    the whole keeps its duration (8 fps as GIF: 130, 120, 130, ... ms).

    Args:
        frames: uint8, shape (F, H, W, 3), RGB, 0-255, F from 1. H and W even for MP4.
        fmt: the kind of file.
        fps: frames per second, 1 to 60; GIF to 50.
        config: quality and speed of each kind.
        tags: what the file says of itself; None: nothing. No pixel depends on it.

    Raises:
        EncodingError: other shape or dtype, a rate that the format cannot play, or a refusal of the encoder.
    """
    if frames.dtype != np.uint8 or frames.shape[3:] != (3,) or 0 in frames.shape:
        msg = f"frames must be uint8 of shape (F, H, W, 3) and not empty, not {frames.dtype} of {frames.shape}"
        raise EncodingError(msg)
    if not 1 <= fps <= _MAX_FPS[fmt]:  # also catches NaN
        msg = f"{fmt} plays 1 to {_MAX_FPS[fmt]:g} frames per second, not {fps:g}"
        raise EncodingError(msg)
    try:
        # 1001 is the denominator of the NTSC rates; 7.5 and 23.976 stay what they are.
        return _ENCODERS[fmt](np.ascontiguousarray(frames), Fraction(fps).limit_denominator(1001), config, tags)
    except (av.FFmpegError, OSError, ValueError, MemoryError, struct.error) as err:
        msg = f"cannot encode {len(frames)} frames as {fmt}: {type(err).__name__}: {err}"
        raise EncodingError(msg) from err


def decode(data: bytes, fmt: Format) -> Frames:
    """All frames of a file that `encode` wrote, uint8, shape (F, H, W, 3), RGB, 0-255.

    Raises:
        EncodingError: truncated, followed by other bytes, corrupt, or another format.
    """
    return _read(data, fmt)[0]


def probe(data: bytes, fmt: Format) -> MediaInfo:
    """What the file holds, found by decoding every frame of it.

    Raises:
        EncodingError: as for `decode`.
    """
    frames, duration = _read(data, fmt)
    num_frames, height, width, _ = frames.shape
    return MediaInfo(width=width, height=height, num_frames=num_frames, duration_s=float(duration))


def comments(data: bytes) -> list[str]:
    """The texts in which a file speaks of itself, whoever wrote it; of an MP4 also those that have other names.

    Args:
        data: a GIF, an MP4, a WebP, a PNG, or a zip with a `provenance.json` as `encode` writes it.

    Raises:
        EncodingError: another kind of file, or one that is damaged.
    """
    known = (reader for magic, start, reader in _COMMENTS if data[start : start + len(magic)] == magic)
    reader = next(known, None)
    if reader is None:
        msg = "neither a GIF, an MP4, a WebP, a PNG nor a zip of PNGs"
        raise EncodingError(msg)
    try:
        return reader(data)
    except Exception as err:  # the readers raise almost anything on corrupt bytes
        msg = f"too damaged to be read: {type(err).__name__}: {err}"
        raise EncodingError(msg) from err


def _read(data: bytes, fmt: Format) -> tuple[Frames, Fraction]:
    try:
        frames, duration = _DECODERS[fmt](data)
        return np.stack(frames), duration
    except Exception as err:  # the readers raise almost anything on corrupt bytes
        msg = f"not a complete {fmt} file of ours: {type(err).__name__}: {err}"
        raise EncodingError(msg) from err


def _delays(num_frames: int, fps: Fraction, ticks_per_second: int) -> list[int]:
    """How long each frame shows, in ticks. The ends are rounded, not the delays: the error never adds up."""
    ends = [math.floor(k * ticks_per_second / fps + Fraction(1, 2)) for k in range(num_frames + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


# MP4: H.264, 4:2:0, BT.709 limited range, which every browser and player decodes.

_ACCURATE = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
_BT709 = {"src_colorspace": Colorspace.ITU709, "dst_colorspace": Colorspace.ITU709, "threads": 1}
_BT709 |= {"interpolation": Interpolation.BICUBIC | Interpolation.BITEXACT | _ACCURATE}
_TO_YUV = _BT709 | {"format": "yuv420p", "src_color_range": ColorRange.JPEG, "dst_color_range": ColorRange.MPEG}
_TO_RGB = _BT709 | {"format": "rgb24", "src_color_range": ColorRange.MPEG, "dst_color_range": ColorRange.JPEG}


def _encode_mp4(frames: Frames, fps: Fraction, config: EncodingConfig, tags: Tags | None) -> bytes:
    num_frames, height, width, _ = frames.shape
    _expect(height % 2 == 0 and width % 2 == 0, f"H.264 at 4:2:0 needs even sides, not {width} x {height}")
    file = io.BytesIO()
    # Names that every player knows: another program that copies the file keeps them, and drops those of our own making.
    told = {"comment": tags.comment, "description": tags.description, "encoding_tool": tags.software} if tags else {}
    muxing = {
        "fflags": "+bitexact",  # no time stamp, no version
        # Room for the index in front, so that a player can start before it has the end. `faststart` would do that,
        # but opens the file again by name. The index of 1 frame takes 0.8 KB, each further one at most 24 bytes.
        "moov_size": str(2048 + 32 * num_frames + sum(len(text.encode()) for text in told.values())),
        "movie_timescale": str(fps.numerator),  # the default, milliseconds, cannot say 1/7.5 s
    }
    with av.open(file, "w", format="mp4", container_options=muxing) as container:
        # Without this, x264's bytes depend on the processor, and with AVX-512 at times on what lay in memory.
        options = {"crf": str(config.mp4_crf), "preset": config.mp4_preset, "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1  # more threads cut a frame elsewhere: other bytes
        codec.time_base = 1 / fps
        codec.color_range, codec.colorspace = ColorRange.MPEG, Colorspace.ITU709
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        container.metadata.update(told)
        for number, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(**_TO_YUV)
            frame.pts, frame.time_base, frame.duration = number, 1 / fps, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue() + (mp4_box(tags) if tags else b"")


def _decode_mp4(data: bytes) -> tuple[list[Frames], Fraction]:
    position, boxes = 0, b""
    while position < len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        boxes += name if name != b"free" else b""
        position += max(8, size)
    whole = position == len(data) and boxes.removesuffix(b"uuid") == b"ftypmoovmdat"
    _expect(whole, f"{len(data)} bytes for {position} of {boxes!r}")
    with av.open(io.BytesIO(data), format="mp4") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}  # the default conceals what is broken
        frames = [frame.to_ndarray(**_TO_RGB) for frame in container.decode(stream)]
        _expect(len(frames) == stream.frames, f"{len(frames)} of {stream.frames} frames decode")
        return frames, stream.duration * stream.time_base


def _mp4_comments(data: bytes) -> list[str]:
    with av.open(io.BytesIO(data), format="mp4") as container:
        return list(container.metadata.values())


# GIF: one palette for all frames, so that what stands still does not flicker.

_PALETTE_SAMPLES = 2**18
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], dtype=np.int16) - 8
"""Ordered dithering, -8 to 7 of 255. Unlike error diffusion it gives the same dots in every frame."""


def _encode_gif(frames: Frames, fps: Fraction, config: EncodingConfig, tags: Tags | None) -> bytes:
    num_frames, height, width, _ = frames.shape
    if config.gif_dither:
        dots = np.tile(_BAYER, (-(-height // 4), -(-width // 4)))[:height, :width, None].repeat(3, axis=-1)
        up, down = np.maximum(dots, 0).astype(np.uint8), np.maximum(-dots, 0).astype(np.uint8)
        frames = np.minimum(np.maximum(frames, down) - down, 255 - up) + up  # clipped sum, a fifth of np.clip's time
    step = max(1, round(math.sqrt(frames.size / 3 / _PALETTE_SAMPLES)))
    sample = frames[:, ::step, ::step].reshape(-1, 1, 3)
    palette = Image.fromarray(sample).quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    # The nearest palette entry of every 5-bit colour, once, instead of a search for every pixel.
    cube = (np.indices((32, 32, 32), dtype=np.uint8) * 8 + 4).reshape(3, -1).T[:, None]
    cells = Image.fromarray(np.ascontiguousarray(cube))
    nearest = np.asarray(cells.quantize(palette=palette, dither=Image.Dither.NONE)).ravel()
    parts: list[bytes] = []
    told = [gif_blocks(tags)] if tags else []
    for frame, delay in zip(frames, _delays(num_frames, fps, 100), strict=True):
        red, green, blue = np.moveaxis(frame >> 3, -1, 0).astype(np.uint16)
        picture = Image.fromarray(nearest[red << 10 | green << 5 | blue])
        picture.putpalette(palette.getpalette() or [])
        # Piece by piece, because Image.save drops frames that equal the one before.
        parts = parts or GifImagePlugin.getheader(picture.copy(), info={"loop": 0, "duration": 10})[0] + told
        parts += GifImagePlugin.getdata(picture, duration=10 * delay)
    return b"".join([*parts, b";"])


def _decode_gif(data: bytes) -> tuple[list[Frames], Fraction]:
    *_, (_, _, end) = walk_gif(data)
    _expect(end == len(data), "the end is not where it should be")
    return _decode_images(data, "GIF")


# WebP: encoded frame by frame and put together here, as libwebp's own animation encoder drops identical frames and
# writes a single one without its duration.

_ANIMATED, _HAS_EXIF_AND_XMP = 0x02, 0x08 | 0x04
"""Flags of the VP8X chunk. Source: RFC 9649, 2.7."""


def _encode_webp(frames: Frames, fps: Fraction, config: EncodingConfig, tags: Tags | None) -> bytes:
    num_frames, height, width, _ = frames.shape
    canvas = _uint24(width - 1) + _uint24(height - 1)
    flags = _ANIMATED | (_HAS_EXIF_AND_XMP if tags else 0)
    chunks = [
        _chunk(b"VP8X", bytes([flags, 0, 0, 0]) + canvas),
        _chunk(b"ANIM", b"\0\0\0\xff" + b"\0\0"),
    ]  # black; forever
    settings = {"quality": config.webp_quality, "lossless": config.webp_lossless, "method": config.webp_method}
    for frame, delay in zip(frames, _delays(num_frames, fps, 1000), strict=True):
        still = io.BytesIO()
        Image.fromarray(frame).save(still, "WEBP", **settings)
        place = bytes(6) + canvas + _uint24(delay) + b"\x02"  # replaces what was there
        chunks.append(_chunk(b"ANMF", place + still.getvalue()[12:]))  # without RIFF, size, WEBP
    chunks += [_chunk(name, content) for name, content in (webp_chunks(tags) if tags else [])]
    return _chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def _chunk(name: bytes, payload: bytes) -> bytes:
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def _uint24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _decode_webp(data: bytes) -> tuple[list[Frames], Fraction]:
    _expect(int.from_bytes(data[4:8], "little") + 8 == len(data), f"{len(data)} bytes are not what the header says")
    return _decode_images(data, "WEBP")


def _decode_images(data: bytes, pillow_format: str) -> tuple[list[Frames], Fraction]:
    frames, milliseconds = [], 0
    with Image.open(io.BytesIO(data), formats=(pillow_format,)) as file:
        for image in ImageSequence.Iterator(file):
            frames.append(np.asarray(image.convert("RGB")))
            milliseconds += image.info["duration"]
    return frames, Fraction(milliseconds, 1000)


# Zip: one PNG a frame, lossless, with the rate beside them.

_INDEX = "animation.json"
_PROVENANCE = "provenance.json"


def _encode_png_zip(frames: Frames, fps: Fraction, config: EncodingConfig, tags: Tags | None) -> bytes:  # noqa: ARG001
    members = {_INDEX: json.dumps({"fps": float(fps), "num_frames": len(frames)}).encode()}
    members |= {_PROVENANCE: tags.comment.encode()} if tags else {}
    for number, frame in enumerate(frames):
        png = io.BytesIO()
        Image.fromarray(frame).save(png, "PNG", compress_level=1)  # level 6 takes 3 times as long to save a tenth
        # Each frame is a file of its own once the zip is unpacked.
        members[f"{number:04d}.png"] = in_png(png.getvalue(), tags) if tags else png.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)  # dated 1980-01-01
            member.create_system, member.external_attr = 3, 0o644 << 16  # Unix, also where Python runs on another
            archive.writestr(member, content)
    return file.getvalue()


def _decode_png_zip(data: bytes) -> tuple[list[Frames], Fraction]:
    _expect(data[-22:].startswith(b"PK\5\6"), "bytes after the archive")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        index = json.loads(archive.read(_INDEX))
        _expect(archive.infolist()[0].header_offset == 0, "bytes before the archive")
        names = sorted(set(archive.namelist()) - {_INDEX, _PROVENANCE})
        _expect(len(names) == index["num_frames"], f"{len(names)} of {index['num_frames']} frames")
        frames = []
        for name in names:
            with Image.open(io.BytesIO(archive.read(name)), formats=("PNG",)) as image:
                frames.append(np.asarray(image.convert("RGB")))
    return frames, len(frames) / Fraction(index["fps"]).limit_denominator(1001)


def _zip_comments(data: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if _PROVENANCE not in archive.namelist():
            return []
        with archive.open(_PROVENANCE) as member:  # no more than this, whatever it unpacks to
            return [member.read(_MAX_COMMENT_BYTES).decode("ascii")]


_MAX_COMMENT_BYTES = 2**20

_COMMENTS: list[tuple[bytes, int, Callable[[bytes], list[str]]]] = [
    (b"GIF8", 0, gif_comments),
    (b"ftyp", 4, _mp4_comments),
    (b"WEBP", 8, functools.partial(image_comments, pillow_format="WEBP")),
    (b"\x89PNG", 0, functools.partial(image_comments, pillow_format="PNG")),
    (b"PK\3\4", 0, _zip_comments),
]
"""What a file has at which byte, and how its comments are read."""

_ENCODERS = {"mp4": _encode_mp4, "gif": _encode_gif, "webp": _encode_webp, "png_zip": _encode_png_zip}
_DECODERS = {"mp4": _decode_mp4, "gif": _decode_gif, "webp": _decode_webp, "png_zip": _decode_png_zip}
