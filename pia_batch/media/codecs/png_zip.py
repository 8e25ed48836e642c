"""Zip of PNG files, one per frame, lossless, with the frame rate in a JSON file."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from PIL import Image

from pia_batch.config import EncodingConfig
from pia_batch.media.codecs.codec import AnyFrames, Codec, Frames, Playback, exact_rate, require
from pia_batch.media.metadata import Metadata, in_png

_INDEX = "animation.json"
_PROVENANCE = "provenance.json"
_MAX_COMMENT_BYTES = 2**20


def _encode(frames: AnyFrames, playback: Playback, config: EncodingConfig, metadata: Metadata | None) -> bytes:  # noqa: ARG001
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, _INDEX, json.dumps({"fps": float(playback.fps), "num_frames": len(frames)}).encode())
        if metadata:
            _add(archive, _PROVENANCE, metadata.comment.encode())
        for number, frame in enumerate(frames):
            png = io.BytesIO()
            Image.fromarray(frame).save(png, "PNG", compress_level=1)  # level 6 takes 3 times as long and saves a tenth
            # Each frame becomes a file of its own once the zip is unpacked.
            _add(archive, f"{number:04d}.png", in_png(png.getvalue(), metadata) if metadata else png.getvalue())
    return file.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    member = zipfile.ZipInfo(name)  # dated 1980-01-01
    member.create_system, member.external_attr = 3, 0o644 << 16  # Unix, also where Python runs on another
    archive.writestr(member, content)


def _decode(data: bytes, take: Callable[[Frames], None]) -> Fraction:
    require(data[-22:].startswith(b"PK\5\6"), "bytes after the archive")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        index = json.loads(archive.read(_INDEX))
        require(archive.infolist()[0].header_offset == 0, "bytes before the archive")
        names = sorted(set(archive.namelist()) - {_INDEX, _PROVENANCE})
        require(len(names) == index["num_frames"], f"{len(names)} of {index['num_frames']} frames")
        for name in names:
            with Image.open(io.BytesIO(archive.read(name)), formats=("PNG",)) as image:
                take(np.asarray(image.convert("RGB")))
    return len(names) / exact_rate(index["fps"])


def _comments(data: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if _PROVENANCE not in archive.namelist():
            return []
        with archive.open(_PROVENANCE) as member:  # bounded, whatever its unpacked size
            return [member.read(_MAX_COMMENT_BYTES).decode("ascii")]


PNG_ZIP = Codec(
    format="png_zip",
    extension="zip",
    signature=(0, b"PK\3\4"),
    encode=_encode,
    decode=_decode,
    comments=_comments,
    player=None,
    bytes_per_pixel=(1.4, 2.0),
)
