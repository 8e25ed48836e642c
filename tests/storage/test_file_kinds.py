"""`storage.file_kinds`: kinds by first bytes. `tests/manifest/test_foreign_formats.py` tries every kind."""

from __future__ import annotations

import codecs

import pytest

from pia_batch.storage import file_kinds
from pia_batch.storage.file_kinds import FileKind


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"GGUF\x03\0\0\0\xff", FileKind("a GGUF file, whose weights are quantized", "weights")),
        (b"\x08\x07\x12\x07pytorch\0\xff", FileKind("an ONNX file", "weights")),
        (codecs.BOM_UTF8 + b"version https://git-lfs.github.com/spec/v1\n", file_kinds.identify(b"version https://git-lfs")),
        (codecs.BOM_UTF8 + b"<!DOCTYPE html>", FileKind("HTML or XML", "page")),
        (b"GGUF is a format\n", None),
        (b'{"a": 1}', None),
        (b"", None),
    ],
    ids=["GGUF", "ONNX", "pointer with a mark", "page with a mark", "text", "JSON", "empty"],
)  # fmt: skip
def test_a_kind_is_known_by_the_first_bytes_and_text_is_none(head, kind):
    assert file_kinds.identify(head) == kind
    assert head or not file_kinds.is_text(b"\xff")
