"""Files of other formats under the names of a manifest's: each is refused by its own name, with the remedy."""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import png, requests_table

from pia_batch.errors import ManifestError
from pia_batch.manifest.foreign_formats import refuse_other_format
from pia_batch.manifest.reader import Manifest


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(requests_table(2), sink)
    return bytes(sink.getvalue().to_pybytes())


def _stream() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, requests_table(1).schema) as stream:
        stream.write_table(requests_table(1))
    return bytes(sink.getvalue().to_pybytes())


def _tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("requests.csv"), io.BytesIO())
    return sink.getvalue()


def _zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("requests.csv", "x")
    return sink.getvalue()


def _npy() -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.zeros(2))
    return sink.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "Arrow stream": (_stream, "a stream of Arrow IPC, as Hugging Face datasets keep it; write it as Parquet"),
    "tar": (_tar, "a tar archive; unpack it, and name the files inside; a WebDataset becomes a manifest by"),
    "zip": (_zip, "a zip archive or an Excel workbook"),
    "NumPy": (_npy, "a NumPy array"),
    **{f"pickle {n}": (lambda n=n: pickle.dumps([{"a": 1}] * 9, n), "a Python pickle") for n in (2, 3, 4, 5)},
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n\0\0\0\0", "an HDF5 file"),
    "sequence file": (lambda: b"SEQ\x06\x19org.apache", "a Hadoop sequence file"),
    "RCFile": (lambda: b"RCF\x01\0\0", "a Hive RCFile"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    "RAR": (lambda: b"Rar!\x1a\x07\x01\0", "a RAR archive"),
    "compress": (lambda: b"\x1f\x9d\x90rst", "compressed with compress"),
    "lzma": (lambda: lzma.compress(b"x", lzma.FORMAT_ALONE), "compressed with lzma; decompress it, or write it as"),
    "xz": (lambda: lzma.compress(b"x"), "compressed with xz; decompress it, or write it as Parquet"),
    "lz4": (lambda: bytes(pa.compress(b"x", "lz4", asbytes=True)), "compressed with lz4"),
    "old lz4": (lambda: b"\x02\x21\x4c\x18\x20\0\0\0" + bytes(9), "compressed with lz4"),
    "lzip": (lambda: b"LZIP\1\x0c\0\xff", "compressed with lzip"),
    **{f"zlib {n}": (lambda n=n: zlib.compress(b"x" * 99, n), "compressed with zlib") for n in (1, 6, 9)},
    "snappy": (lambda: b"\xff\x06\0\0sNaPpY\0", "compressed with snappy"),
    "lzop": (lambda: b"\x89LZO\0\r\n\x1a\n", "compressed with lzop"),
    "PNG": (png, "a PNG image; a manifest is a table"),
    "JPEG": (lambda: b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
    "MP4": (lambda: b"\0\0\0\x20ftypisom\0\0", "a video or an image"),
    "PDF": (lambda: b"%PDF-1.7\n", "a PDF"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run: git lfs pull"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html>Not found", "HTML or XML; a server may have answered"),
    "HTML without a type": (lambda: b"<html><body>Sign in", "HTML or XML"),
    "S3's error": (lambda: b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "HTML or XML"),
    "DuckDB": (lambda: b"\x91\x82\xa0\xf5\0\0\0\0DUCK\x40\0", "a DuckDB database"),
}


@pytest.mark.parametrize("name", ["m", "m.parquet", "m.jsonl", "m.csv"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_format_is_named_whatever_its_name_says(kind: str, name: str, tmp_path: Path) -> None:
    make, what = FILES[kind]
    path = tmp_path / name
    path.write_bytes(make())

    with pytest.raises(ManifestError) as refused:
        Manifest.open(str(path))

    assert f"{name} is {what}" in str(refused.value) or what in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.csv", _parquet, "is Parquet; name it .parquet"),
        ("m.jsonl", _parquet, "is Parquet; name it .parquet"),
        ("m.parquet", lambda: b"request_id,image,prompt\n1,a,b\n", "is text, not Parquet; JSONL and CSV are known by"),
        ("m.parquet", lambda: "ä".encode() * 3000, "is text, not Parquet"),
        ("m.tsv", lambda: b"request_id\timage\tprompt\n1\ta\tb\n", "is text, not Parquet; JSONL and CSV are known by"),
        ("m.csv", lambda: bytes(range(1, 256)) + b"\0" * 9, "is not text, and of no format that is known here"),
        ("m.jsonl", lambda: b"\x10\0\0\0\0\0\0\0\xab\xcd", "is not text, and of no format that is known here"),
        *[
            ("m.jsonl", lambda e=e: '{"request_id": "1"}'.encode(e), f"is text in {e[:6].upper()}; save it as UTF-8")
            for e in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
        ],
    ],
)
def test_a_format_under_the_name_of_another_is_named(
    name: str, data: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data())

    with pytest.raises(ManifestError, match=message):
        Manifest.open(str(tmp_path / name))


@pytest.mark.parametrize("codec", ["lz4_raw", "snappy", "brotli"])
@pytest.mark.parametrize("num_rows", [1, 3, 50, 5000])
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_compressions_without_a_mark_are_refused_with_the_remedy(
    name: str, num_rows: int, codec: str, tmp_path: Path
) -> None:
    rows = [b'{"request_id": "%d", "image": "a.png", "prompt": "p"}' % row for row in range(num_rows)]
    if name == "m.csv":
        rows = [b"request_id,image,prompt", *(b"%d,a.png,p" % row for row in range(num_rows))]
    (tmp_path / name).write_bytes(pa.compress(b"\n".join(rows), codec, asbytes=True))

    with pytest.raises(
        ManifestError, match=r"decompress it \(raw snappy, LZ4 and brotli have no mark\)|save it as UTF-8"
    ):
        Manifest.open(str(tmp_path / name))


@pytest.mark.parametrize(("outer", "inner"), [("gzip", "gzip"), ("zstd", "gzip"), ("bz2", "zstd")])
def test_a_file_that_is_compressed_twice_is_named(outer: str, inner: str, tmp_path: Path) -> None:
    once = pa.compress(b"request_id,image,prompt\n1,a.png,p\n", "gzip" if inner == "gzip" else "zstd", asbytes=True)
    twice = bz2.compress(once) if outer == "bz2" else pa.compress(once, outer, asbytes=True)
    (tmp_path / "m.csv.gz").write_bytes(twice)

    with pytest.raises(ManifestError, match=rf"is compressed twice, with {outer} around {inner}; compress it once"):
        Manifest.open(str(tmp_path / "m.csv.gz"))


@pytest.mark.parametrize(
    "head",
    [
        b"ORCID,image,prompt\n", b"PARENT,image\n", b"BZh,b\n", b"GIF89a,b\n", b"RIFF,b\n", b"Rare,b\n", b"SEQ,b\n",
        b"01234567DUCK,b\n", b"0123ftyp,b\n", b"ARROW1,b\n", b"FEA1,b\n", b"7z,b\n", b"<x>,b\n", b"", b"a",
        b"a\0b,c\n" + b"x" * 99, "é,b\n".encode(), "é".encode()[:1].rjust(4096, b"x"), b"caf\xe9,b\n",
        b"caf\xe9,a\tb\x0b\x0c\r\n\x1a",
    ],
)  # fmt: skip
def test_text_that_begins_like_a_format_is_text(head: bytes) -> None:
    refuse_other_format(head, "manifest file m.csv", "text")


def test_a_file_of_pzstd_is_read_and_named_where_it_is_no_text(tmp_path: Path) -> None:
    packed = bytes(pa.compress(b"request_id,image,prompt\n1,a.png,p\n", "zstd", asbytes=True))
    frame = b"\x50\x2a\x4d\x18" + struct.pack("<II", 4, len(packed)) + packed
    for name in ("m.csv", "m.csv.zst"):
        (tmp_path / name).write_bytes(frame)
        assert Manifest.open(str(tmp_path / name)).schema.names == ["request_id", "image", "prompt"]
    (tmp_path / "m.parquet").write_bytes(frame)
    with pytest.raises(ManifestError, match="is compressed with zstd; name JSONL and CSV as such"):
        Manifest.open(str(tmp_path / "m.parquet"))
