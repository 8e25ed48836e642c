"""Scan cache: results of earlier scans of a manifest, stored under the output in the packs of an index.

A file that was scanned before and has not changed is not read again. An entry is used only if everything that decides
it is the same: the file's version, the column types that the other files of the manifest impose, the part of the config
that keys depend on, the engines, and the code itself. A file for which any of these is unknown is scanned.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.errors import ManifestError, PiaBatchError
from pia_batch.journal import layout
from pia_batch.journal.pack_index import Head, PackIndex
from pia_batch.manifest.files import Contents, ManifestFile, reading
from pia_batch.manifest.reader import Manifest
from pia_batch.schema.keys import KEY_BYTES, Keys
from pia_batch.storage import filesystems, store_uris
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)

MIN_ROWS = 10_000
MIN_FILES = 10
"""A manifest with fewer rows and fewer files is not cached: reading it again takes less than a second."""

SETTLED_NS = 20_000_000
SETTLED_WHOLE_SECONDS_NS = 2_000_000_000
"""Minimum age of a local file's last change, in nanoseconds, at which every later change must get another time: one
tick of the kernel's clock, or of a clock that counts whole seconds."""

_CODE = (
    "config/*.py",
    "manifest/*.py",
    "schema/*.py",
    "planning/scan*.py",
    "planning/statistics.py",
    "planning/words.py",
)
"""Modules that turn rows into keys and work classes, this one included, as patterns under the package."""

_SCANNED = pa.schema(
    [
        ("path", pa.string()),
        ("version", pa.string()),
        ("shape", pa.string()),
        ("first_row", pa.int64()),
        ("num_rows", pa.int64()),
        ("contents", pa.binary()),
        ("keys", pa.large_binary()),
        ("id_hashes", pa.large_binary()),
        ("rejected", pa.binary()),
        ("work_classes", pa.large_binary()),
    ]
)
"""Entry: some rows of one file. `shape` identifies how they were read, `contents` is the file's `Contents`."""


@dataclass(frozen=True)
class Chunk:
    """Scan of neighbouring rows of one file."""

    file: ManifestFile
    shape: str
    first_row: int
    num_rows: int
    contents: Contents
    """Contents of the whole file."""
    keys: Keys
    id_hashes: npt.NDArray[np.uint64]
    rejected: pa.Table
    """Rejected rows; `row` counts from the first row of the file."""
    work_classes: bytes
    """`WorkClasses.packed` of these rows."""


class ScanCache:
    """Results of earlier scans of one manifest with one config. Reading it writes nothing."""

    def __init__(self, store: Store, run: RunConfig, engine_ids: Mapping[str, str]) -> None:
        self._index = PackIndex(store, layout.scan_cache_folder(_identity(run, engine_ids)), _SCANNED)
        self._head = self._index.head()
        self._entries: dict[tuple[str, str], list[_Entry]] = {}
        for table in self._index.tables(self._head):
            for path, version, shape, first_row, row in zip(
                *table.select(["path", "version", "shape", "first_row"]).to_pydict().values(),
                range(len(table)),
                strict=True,
            ):
                self._entries.setdefault((path, version), []).append(_Entry(table, row, shape, first_row))
        self._versions = frozenset(self._entries)
        pa.default_memory_pool().release_unused()  # reading the packs has taken as much memory again

    def release(self) -> None:
        """Free everything that `save` does not need."""
        self._entries.clear()

    def contents(self, path: str, version: str) -> Contents | None:
        """Return the contents of this version of a file, or None if it is not cached."""
        for entry in self._entries.get((path, version), ()):
            return entry.contents
        return None

    def chunks(self, file: ManifestFile, shape: str, contents: Contents) -> list[Chunk] | None:
        """Return all chunks of a file as read in this shape, or None if any of them is not cached."""
        entries = {entry.first_row: entry for entry in self._entries.get((file.path, file.version), ())}
        found: list[Chunk] = []
        row = 0
        while (entry := entries.get(row)) is not None and entry.shape == shape:
            found.append(entry.chunk(file, contents))
            row += found[-1].num_rows
            if row == contents.num_rows:
                return found
        return None

    def save(self, found: Manifest, new_chunks: Sequence[Chunk]) -> None:
        """Add the chunks of files that have not changed since. A failure only costs the next plan time."""
        if found.num_rows < MIN_ROWS and len(found.files) < MIN_FILES:
            return
        settled = {file for file in {chunk.file for chunk in new_chunks} if _is_settled(file, found)}
        entries = pa.Table.from_pylist([_entry(chunk) for chunk in new_chunks if chunk.file in settled], _SCANNED)
        used = {(file.path, file.version) for file, _ in found.opened}
        try:
            if len(self._versions - used) > len(used):  # most of it describes files that were replaced or are gone
                old = pa.concat_tables([_SCANNED.empty_table(), *self._index.tables(self._head)])
                named = zip(old["path"].to_pylist(), old["version"].to_pylist(), strict=True)
                old = old.filter(pa.array([pair in used for pair in named], pa.bool_()))
                self._index.extend(Head(self._head.generation), pa.concat_tables([old, entries]))
            elif len(entries):
                self._index.extend(self._head, entries)
        except PiaBatchError as err:
            log.warning("scan_cache_save_failed manifest=%s error=%s", redacted_uri(found.uri), err)


@dataclass(frozen=True)
class _Entry:
    """Row of a pack, not decoded yet."""

    table: pa.Table
    row: int
    shape: str
    first_row: int

    @property
    def contents(self) -> Contents:
        stored = json.loads(self._bytes("contents").to_pybytes())
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored["schema"])))
        groups = np.array(stored["groups"], np.int64).reshape(-1, 2)
        return Contents(schema, groups, table=None, num_blank=stored["num_blank"])

    def chunk(self, file: ManifestFile, contents: Contents) -> Chunk:
        return Chunk(
            file,
            self.shape,
            self.first_row,
            self.table["num_rows"][self.row].as_py(),
            contents,
            np.frombuffer(self._large("keys"), f"V{KEY_BYTES}"),
            np.frombuffer(self._large("id_hashes"), np.uint64),
            pa.ipc.open_stream(self._bytes("rejected")).read_all(),
            self._large("work_classes").to_pybytes(),
        )

    def _bytes(self, name: str) -> pa.Buffer:
        return self.table[name][self.row].as_buffer()

    def _large(self, name: str) -> pa.Buffer:
        """Return a value of a large_binary column without a copy, which a scalar would make."""
        value = self.table[name].slice(self.row, 1).chunk(0)
        _, offsets, data = value.buffers()
        start, end = np.frombuffer(offsets, np.int64)[value.offset : value.offset + 2].tolist()
        return (data or pa.py_buffer(b"")).slice(start, end - start)


def _entry(chunk: Chunk) -> dict[str, str | int | bytes]:
    contents = {
        "schema": base64.b64encode(chunk.contents.schema.serialize()).decode(),
        "groups": chunk.contents.groups.tolist(),
        "num_blank": chunk.contents.num_blank,
    }
    return {
        "path": chunk.file.path,
        "version": chunk.file.version,
        "shape": chunk.shape,
        "first_row": chunk.first_row,
        "num_rows": chunk.num_rows,
        "contents": json.dumps(contents).encode(),
        "keys": chunk.keys.tobytes(),
        "id_hashes": chunk.id_hashes.astype("<u8").tobytes(),
        "rejected": _stream(chunk.rejected),
        "work_classes": chunk.work_classes,
    }


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def _identity(run: RunConfig, engine_ids: Mapping[str, str]) -> str:
    """Hash everything that decides an entry, except the file and the shape it is read in; 32 hexadecimal digits."""
    code = [path.read_bytes() for pattern in _CODE for path in sorted(Path(__file__).parents[1].glob(pattern))]
    inputs = {
        "code": [hashlib.blake2b(source, digest_size=16).hexdigest() for source in code],
        "arrow": pa.__version__,
        "manifest": store_uris.absolute(run.manifest).rstrip("/"),
        "columns": run.columns,
        "request_id_from": run.request_id_from,
        "defaults": run.defaults.model_dump(mode="json"),
        "encoding": run.encoding.model_dump(mode="json"),
        "images": run.images.identity(),
        "limits": [run.limits.max_frame_pixels, run.limits.max_call_pixels],
        "blocked_words": run.safety.blocked_words,
        "upscale": [run.upscaler, run.upscale.scale],
        "models": {
            name: [model.ip_adapter is not None, model.fuse_loras, [(each.label, each.scale) for each in model.loras]]
            for name, model in run.all_models.items()
        },
        "default_model": run.model.name,
        "engine_ids": dict(engine_ids),
    }
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_settled(file: ManifestFile, found: Manifest) -> bool:
    """Return whether the file is unchanged, and every later change must change its version."""
    try:
        with reading(file.path):
            if filesystems.version_of(found.filesystem, file.path) != file.version:
                return False
            changed_ns = filesystems.changed_ns(found.filesystem, file.path)
    except ManifestError:
        return False
    if changed_ns is None:
        return True
    coarse = changed_ns % 1_000_000_000 == 0
    return time.time_ns() - changed_ns > (SETTLED_WHOLE_SECONDS_NS if coarse else SETTLED_NS)
