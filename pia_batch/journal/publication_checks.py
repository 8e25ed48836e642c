"""Checks of results before they are published: they have every wanted key once, and every animation that they name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.errors import AccountingError
from pia_batch.journal import layout
from pia_batch.schema.columns import SUCCEEDED
from pia_batch.schema.keys import KeySet
from pia_batch.storage.object_store import Store

LIST_THREADS = 8
"""Folders of animations, of 256, that are listed at a time: ten million objects are 10,000 pages of a listing."""


@dataclass
class KeyChecksum:
    """Number of keys and sums over them: equal for the same keys in any order, and practically never for others."""

    num_keys: int = 0
    high: int = 0
    low: int = 0

    @classmethod
    def of(cls, keys: KeySet) -> KeyChecksum:
        """Return the checksum of all members."""
        checksum = cls()
        checksum.add(keys.high, keys.low)
        return checksum

    def add(self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> None:
        """Add these keys, given as `keys.halves` returns them."""
        self.num_keys += len(high)
        self.high = (self.high + int(high.sum())) % 2**64
        self.low = (self.low + int(low.sum())) % 2**64


class ExpectedAnimations:
    """Animations and posters that results name, in one file on the local disk, in chunks of one folder each."""

    _SCHEMA = pa.schema([("name", pa.string()), ("num_bytes", pa.int64()), ("request_id", pa.string())])

    def __init__(self, disk: BinaryIO) -> None:
        self._disk = disk
        self._chunks: dict[str, list[tuple[int, int]]] = {}
        """Start and end offsets of the chunks in the file, by folder."""

    def add(self, part: pa.Table) -> None:
        """Add the succeeded rows."""
        rows = part.filter(pc.equal(part["status"], SUCCEEDED))
        tables = [self._objects(rows, "animation_uri", "num_bytes")]
        if "poster_uri" in rows.column_names:
            posters = rows.filter(pc.is_valid(rows["poster_uri"]))
            tables.append(self._objects(posters, "poster_uri", "poster_num_bytes"))
        table = pa.concat_tables(tables).sort_by("name")
        folders = pc.replace_substring_regex(table["name"], "[^/]*$", "").combine_chunks().dictionary_encode()
        bounds = np.searchsorted(folders.indices.to_numpy(), np.arange(len(folders.dictionary) + 1))
        for folder, (start, end) in zip(folders.dictionary.to_pylist(), pairwise(bounds.tolist()), strict=True):
            begin = self._disk.tell()
            with pa.ipc.new_stream(self._disk, self._SCHEMA, options=_COMPRESSED) as stream:
                stream.write_table(table.slice(start, end - start))
            self._chunks.setdefault(folder, []).append((begin, self._disk.tell()))

    def _objects(self, rows: pa.Table, uri: str, num_bytes: str) -> pa.Table:
        """Return the objects that a column of URIs names, with the sizes that another column gives them."""
        names = pa.array(map(layout.animation_name_in, rows[uri].to_pylist()), pa.string())
        return pa.table([names, rows[num_bytes], rows["request_id"]], schema=self._SCHEMA)

    def check(self, store: Store) -> None:
        """Compare with the stored objects.

        Raises:
            AccountingError: an animation or a poster is missing or has another size; the first one is reported.
        """
        self._disk.flush()
        for problem in store.each(lambda folder: self._problem(store, folder), sorted(self._chunks), LIST_THREADS):
            if problem:
                raise AccountingError(problem)

    def _problem(self, store: Store, folder: str) -> str | None:
        stored = {item.name: item.num_bytes for item in store.list(folder)}
        for start, end in self._chunks[folder]:
            chunk = os.pread(self._disk.fileno(), end - start, start)
            table = pa.ipc.open_stream(chunk).read_all()
            for name, num_bytes, request_id in zip(*(column.to_pylist() for column in table.columns), strict=True):
                size = stored.get(name)
                if size != num_bytes:
                    found = "is missing" if size is None else f"has {size} bytes"
                    what = "poster" if layout.is_poster(name) else "animation"
                    return (
                        f"{what} {store.uri_of(name)} of request {request_id!r} {found}, its result states "
                        f"{num_bytes} bytes; `pia-batch verify --repair` finds all such animations, and the next run "
                        "generates them again"
                    )
        return None


_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")
