"""Packs: many small entries of an output held in few large objects, so that a reader asks for megabytes, not for each.

A *pack* is an immutable Parquet table with one row for each entry, named by its content. A *head*,
`<generation>-<hash>.json`, names the packs that count; of all heads the newest that can be read does. Small packs are
merged into larger ones as entries come, so that there are few of either.

Nothing here is the only truth: whoever uses an index can do without it. What is missing, damaged or foreign is left out
with a warning. Everything is created by a conditional PUT and nothing is changed, so two writers at once leave two
heads, of which one is read; what only the other has is an entry that is not indexed yet.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_batch.errors import ObjectExistsError
from pia_batch.storage.object_store import ObjectInfo, Store

log = logging.getLogger(__name__)

PACK_BYTES = 16 * 2**20
"""What one pack holds at most, unless a single entry is larger. Packs of less than half are merged as others come."""

READ_THREADS = 4
"""Packs asked for at a time, which are 64 MB in memory."""

KEPT_HEADS = 2
"""The newest heads, whose packs a reader may just be asking for."""

_HEAD = re.compile(r"[0-9]{12}-[0-9a-f]{32}\.json")
_PACK = re.compile(r"[0-9a-f]{32}\.parquet")


@dataclass(frozen=True)
class Pack:
    """An object of the index: its name below the index's prefix, and its size in bytes, as stored."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Head:
    """The packs that count; generation 0 is an index that does not exist yet."""

    generation: int = 0
    packs: tuple[Pack, ...] = ()


class Index:
    """The packs below one prefix of an output. The first column of `schema` is the entry's name, a string."""

    def __init__(self, store: Store, prefix: str, schema: pa.Schema) -> None:
        self._store, self._prefix, self._schema = store, prefix, schema
        self._entries: dict[Pack, pa.Array] = {}

    def head(self) -> Head:
        """The newest head that can be read.

        Raises:
            StorageError: the store refused or did not answer.
        """
        names = (item.name.removeprefix(self._prefix) for item in self._store.list(self._prefix))
        for name in sorted(filter(_HEAD.fullmatch, names), reverse=True):
            head = _read_head(self._store, self._prefix, name)
            if head is not None:
                return head
        return Head()

    def tables(self, head: Head) -> Iterator[pa.Table]:
        """The packs that can be read, several asked for at a time; those that cannot are missing.

        Raises:
            StorageError: the store refused or did not answer.
        """
        for pack, table in zip(head.packs, self._read_packs(head.packs), strict=True):
            if table is not None:
                self._entries[pack] = table[0].combine_chunks()
                yield table

    def entries(self, head: Head) -> pa.ChunkedArray:
        """The names of all entries of `head`. A pack is read for them only once, whatever heads it is in."""
        new = [pack for pack in head.packs if pack not in self._entries]
        for pack, table in zip(new, self._read_packs(tuple(new)), strict=True):
            if table is not None:
                self._entries[pack] = table[0].combine_chunks()
        known = [self._entries[pack] for pack in head.packs if pack in self._entries]
        return pa.chunked_array(known, pa.string())

    def extend(self, head: Head, entries: pa.Table) -> Head:
        """Add entries to those of `head`, whose small packs are merged with them, and give the new head.

        Packs that cannot be read any more are dropped, and with them their entries.

        Args:
            head: as it was read, or as this returned it.
            entries: rows of the schema, of which none is in `head`.

        Raises:
            StorageError: the store refused or did not answer.
        """
        small = tuple(pack for pack in head.packs if pack.num_bytes < PACK_BYTES // 2)
        self.entries(Head(head.generation, tuple(pack for pack in head.packs if pack not in small)))
        kept = [pack for pack in head.packs if pack not in small and pack in self._entries]
        merged = pa.concat_tables([*self.tables(Head(packs=small)), entries.cast(self._schema)])
        written = [self._write_pack(part) for part in _parts(merged)]
        new = Head(head.generation + 1, (*kept, *written))
        said = json.dumps({"packs": [[pack.name, pack.num_bytes] for pack in new.packs]}).encode()
        self._create(f"{new.generation:012d}-{_hash(said)}.json", said)
        return new

    def _read_packs(self, packs: tuple[Pack, ...]) -> Iterator[pa.Table | None]:
        """One table for each pack, in order, None for one that cannot be read."""
        names = [self._prefix + pack.name for pack in packs]
        done = 0
        while done < len(packs):
            try:
                for data in self._store.read_all(names[done:], READ_THREADS):
                    done += 1
                    yield self._table(packs[done - 1].name, data)
            except FileNotFoundError:
                _warn(self._prefix + packs[done].name)
                done += 1
                yield None

    def _table(self, name: str, data: bytes) -> pa.Table | None:
        try:
            if f"{_hash(data)}.parquet" == name:
                table = pq.ParquetFile(pa.BufferReader(data)).read()
                if table.schema.equals(self._schema):
                    return table
        except (pa.ArrowException, OSError):
            pass
        _warn(self._prefix + name)
        return None

    def _write_pack(self, table: pa.Table) -> Pack:
        sink = pa.BufferOutputStream()
        # Keys are random: what can be made smaller are the columns beside them.
        large = {item.name for item in self._schema if pa.types.is_large_binary(item.type)}
        compression = {item.name: "none" if item.name in large else "zstd" for item in self._schema}
        pq.write_table(table, sink, compression=compression, use_dictionary=False, write_statistics=False)
        data = bytes(sink.getvalue())
        pack = Pack(f"{_hash(data)}.parquet", len(data))
        self._create(pack.name, data)
        self._entries[pack] = table[0].combine_chunks()
        return pack

    def _create(self, name: str, data: bytes) -> None:
        try:
            self._store.create(self._prefix + name, data)
        except ObjectExistsError:  # named by its content: somebody else has written the same
            log.info("index_exists name=%s%s", self._prefix, name)


def superseded(store: Store, prefix: str) -> Iterator[ObjectInfo]:
    """Yield the objects of the index at `prefix` that no reader needs: all but the newest heads and their packs.

    Raises:
        StorageError: the store refused the request or did not answer.
    """
    listed = {item.name.removeprefix(prefix): item for item in store.list(prefix)}
    heads = sorted(filter(_HEAD.fullmatch, listed), reverse=True)
    needed = set(heads[:KEPT_HEADS])
    for name in heads[:KEPT_HEADS]:
        head = _read_head(store, prefix, name)
        needed |= {pack.name for pack in head.packs} if head is not None else set()
    ours = (name for name in listed if _HEAD.fullmatch(name) or _PACK.fullmatch(name))
    yield from (listed[name] for name in sorted(ours) if name not in needed)


def _read_head(store: Store, prefix: str, name: str) -> Head | None:
    try:
        data = store.read(prefix + name)
        generation, expected = name.removesuffix(".json").split("-")
        if _hash(data) == expected:
            packs = tuple(Pack(str(pack), int(size)) for pack, size in json.loads(data)["packs"])
            return Head(int(generation), packs)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    _warn(prefix + name)
    return None


def _warn(name: str) -> None:
    log.warning("index_damaged name=%s: left out; what it held is read where it came from", name)


def _parts(table: pa.Table) -> Iterator[pa.Table]:
    """The rows of `table` in tables of at most PACK_BYTES, or one row."""
    ends = np.cumsum(_row_bytes(table))
    start = 0
    while start < len(table):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PACK_BYTES, side="right")))
        yield table.slice(start, stop - start)
        start = stop


def _row_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """What each row needs, without what is small in all of them."""
    sizes = np.full(len(table), 32, np.int64)
    for column in table.columns:
        if pa.types.is_large_binary(column.type):
            sizes += np.asarray(pc.fill_null(pc.binary_length(column), 0))
    return sizes


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
