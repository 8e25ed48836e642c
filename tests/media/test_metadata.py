"""Tags in the bytes of files, read by programs that know nothing of ours."""

from __future__ import annotations

import contextlib
import io
import zipfile

import av
import numpy as np
import pytest
from PIL import Image

from pia_batch.config import FORMATS, EncodingConfig, Format
from pia_batch.errors import EncodingError
from pia_batch.media import codecs
from pia_batch.media.metadata import Metadata, walk_gif

CONFIG = EncodingConfig(webp_lossless=True)
XMP = "<x:xmpmeta>\ufeff 'packet' grüße</x:xmpmeta>".encode()
TAGS = Metadata(comment='{"a":"' + "x" * 700 + '"}', description="a wörd 🐱", software="maker 1.2", xmp=XMP)
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)


def tagged(fmt: Format, tags: Metadata | None = TAGS) -> bytes:
    return codecs.encode(FRAMES, fmt, 8, CONFIG, tags)


@pytest.mark.parametrize("fmt", FORMATS)
def test_tags_change_no_frame_no_duration_and_come_back(fmt: Format) -> None:
    plain = tagged(fmt, None)

    assert np.array_equal(codecs.decode(tagged(fmt), fmt), codecs.decode(plain, fmt))
    assert codecs.probe(tagged(fmt), fmt) == codecs.probe(plain, fmt)
    assert TAGS.comment in codecs.comments(tagged(fmt))
    assert TAGS.comment not in codecs.comments(plain)
    assert tagged(fmt) == tagged(fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("length", [0, 1, 254, 255, 256, 100_000])
def test_a_comment_of_any_length_comes_back(fmt: Format, length: int) -> None:
    tags = Metadata(comment="c" * length, description="d" * length, software="s", xmp=b"<x/>" * (length or 1))

    data = tagged(fmt, tags)

    assert codecs.probe(data, fmt).num_frames == 3
    assert not length or tags.comment in codecs.comments(data)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_tagged_file_cut_anywhere_or_longer_than_it_should_be_is_refused(fmt: Format) -> None:
    data = tagged(fmt)

    for length in {1, 13, 40, *range(0, len(data), len(data) // 60), len(data) - 25, len(data) - 22, len(data) - 1}:
        with pytest.raises(EncodingError):
            codecs.probe(data[:length], fmt)
    with pytest.raises(EncodingError):
        codecs.probe(data + data[-60:], fmt)


def test_pillow_and_pyav_read_what_is_meant_for_them() -> None:
    with Image.open(io.BytesIO(tagged("gif"))) as gif:
        assert gif.info["comment"].decode() == TAGS.comment
        assert gif.info["loop"] == 0
    with Image.open(io.BytesIO(tagged("webp"))) as webp:
        assert webp.info["xmp"] == XMP
        assert webp.getexif()[0x0131] == "maker 1.2"
    with zipfile.ZipFile(io.BytesIO(tagged("png_zip"))) as archive:
        assert archive.read("provenance.json").decode() == TAGS.comment
        for name in ("0000.png", "0002.png"):
            with Image.open(archive.open(name)) as png:
                png.load()
                assert png.info["XML:com.adobe.xmp"] == XMP.decode()
                assert (png.info["Comment"], png.info["Description"]) == (TAGS.comment, TAGS.description)
            assert TAGS.comment in codecs.comments(archive.read(name))
    with av.open(io.BytesIO(tagged("mp4"))) as mp4:
        told = dict(mp4.metadata)
    assert (told["comment"], told["description"], told["encoder"]) == (TAGS.comment, TAGS.description, "maker 1.2")
    assert tagged("mp4").endswith(bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + XMP)


def test_an_mp4_with_tags_still_starts_with_its_index() -> None:
    data = tagged("mp4", Metadata(comment="c" * 50_000, description="ü" * 50_000, software="s", xmp=XMP))

    assert data.index(b"moov") < data.index(b"mdat")
    assert b"moof" not in data


def test_every_block_of_a_gif_is_walked_over() -> None:
    labels = [label for label, _, _ in walk_gif(tagged("gif"))]

    assert labels == [b"!\xff", b"!\xfe", b"!\xff", *[b"!\xf9", b","] * 3, b";"]


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"%PDF-1.7 and more", b"RIFF....WEBP", b"\x89PNG\r\n\x1a\n", b"PK\3\4?"]
)
def test_what_cannot_be_read_is_an_encoding_error(data: bytes) -> None:
    with pytest.raises(EncodingError):
        codecs.comments(data)


@pytest.mark.parametrize("fmt", FORMATS)
def test_damaged_tags_are_read_or_are_an_encoding_error_and_nothing_else(fmt: Format) -> None:
    random = np.random.default_rng(len(fmt))
    data = tagged(fmt)

    for _ in range(150):
        damaged = bytearray(data)
        damaged[random.integers(min(len(data), 3000))] ^= 1 << random.integers(8)
        with contextlib.suppress(EncodingError):
            assert all(isinstance(text, str) for text in codecs.comments(bytes(damaged)))
