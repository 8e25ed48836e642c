"""Bytes of JSONL and CSV files: decompressed within a limit, without a byte order mark."""

from __future__ import annotations

import codecs
import threading

import pyarrow as pa

from pia_batch.errors import ManifestError
from pia_batch.manifest.foreign_formats import refuse_other_format
from pia_batch.storage.file_kinds import HEAD_BYTES

MAX_TEXT_BYTES = 512 * 2**20
"""Largest size of all files of a JSONL or CSV manifest, decompressed; they are read whole."""

COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
"""Compressions of text files by the extension that they add."""

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_MAGIC |= {bytes([0x50 + number]) + b"\x2a\x4d\x18": "zstd" for number in range(16)}  # pzstd's skippable frames

_CHUNK_BYTES = 4 * 2**20


class TextBudget:
    """Bytes of text that the files of one manifest may still have; shared by threads.

    Args:
        place: Name of the manifest for messages.
    """

    def __init__(self, place: str) -> None:
        self._place, self._left, self._lock = place, MAX_TEXT_BYTES, threading.Lock()

    def take(self, num_bytes: int) -> None:
        """Count bytes.

        Raises:
            ManifestError: there are more than MAX_TEXT_BYTES in all.
        """
        with self._lock:
            self._left -= num_bytes
            if self._left < 0:
                msg = (
                    f"{self._place} has more than {MAX_TEXT_BYTES} bytes of JSONL or CSV, decompressed; write it as "
                    "Parquet"
                )
                raise ManifestError(msg)


def compression_of(head: bytes) -> str | None:
    """Return the compression of a file that begins with these bytes, as Arrow names it, or None."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def read_text(source: pa.NativeFile, path: str, budget: TextBudget) -> bytes:
    """Return the text of a file, decompressed if its content is compressed, whatever its name.

    Args:
        source: The file.
        path: Its path for messages.
        budget: Budget that the text is counted in.

    Raises:
        ManifestError: it is of another format, in UTF-16 or UTF-32, or too large.
        Exception: the file cannot be read, or ends within its compression.
    """
    compression = compression_of(bytes(source.read_at(min(8, source.size()), 0)))
    if compression is None:
        budget.take(source.size())
        data = bytes(source.read_at(source.size(), 0))
    else:
        source.seek(0)
        data = _decompressed(source, compression, budget)
        again = compression_of(data[:8])
        if again is not None:
            msg = f"manifest file {path} is compressed twice, with {compression} around {again}; compress it once"
            raise ManifestError(msg)
    while data.startswith(codecs.BOM_UTF8):  # programs that join files, or save one twice, leave more than one
        data = data.removeprefix(codecs.BOM_UTF8)
    refuse_other_format(data[:HEAD_BYTES], f"manifest file {path}", "text")
    return data


def _decompressed(source: pa.NativeFile, compression: str, budget: TextBudget) -> bytes:
    chunks = []
    with pa.CompressedInputStream(source, compression) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            budget.take(len(chunk))
            chunks.append(bytes(chunk))
    return b"".join(chunks)
