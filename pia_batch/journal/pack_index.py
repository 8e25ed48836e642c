"""Index of packs: many small entries of an output in few large objects, so that a reader requests megabytes at a time.

A *pack* is an immutable Parquet table with one row per entry, named by its content. A *head*,
`<generation>-<hash>.json`, names the packs that count; the newest readable head counts. Small packs are merged into
larger ones as entries are added, so that both small and large packs stay few.

An index only repeats what is stored elsewhere, so its users can do without it. Objects that are missing, damaged or
foreign are ignored with a warning. Everything is created by a conditional PUT and nothing is changed. Two writers at
the same time therefore leave two heads, of which one is read; entries that only the other one has are not indexed yet.
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
"""Maximum size of a pack, unless a single entry is larger. Packs below half of it are merged as entries are added."""

READ_THREADS = 4
"""Packs that are requested at a time; they take 64 MB of memory."""

KEPT_HEADS = 2
"""Number of newest heads that are kept, because a reader may be requesting their packs."""

_HEAD = re.compile(r"[0-9]{12}-[0-9a-f]{32}\.json")
_PACK = re.compile(r"[0-9a-f]{32}\.parquet")


@dataclass(frozen=True)
class Pack:
    """Pack of an index: its name under the index's prefix, and its stored size in bytes."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Head:
    """Packs that count; generation 0 stands for an index that does not exist yet."""

    generation: int = 0
    packs: tuple[Pack, ...] = ()


class PackIndex:
    """Packs under one prefix of an output. The first column of `schema` is the entry's name, a string."""

    def __init__(self, store: Store, prefix: str, schema: pa.Schema) -> None:
        self._store, self._prefix, self._schema = store, prefix, schema
        self._entries: dict[Pack, pa.Array] = {}

    def head(self) -> Head:
        """Read the newest readable head.

        Raises:
            StorageError: the store refused the request or did not answer.
        """
        names = (item.name.removeprefix(self._prefix) for item in self._store.list(self._prefix))
        for name in sorted(filter(_HEAD.fullmatch, names), reverse=True):
            head = _read_head(self._store, self._prefix, name)
            if head is not None:
                return head
        return Head()

    def tables(self, head: Head) -> Iterator[pa.Table]:
        """Read the packs, several at a time; packs that cannot be read are left out.

        Raises:
            StorageError: the store refused the request or did not answer.
        """
        for pack, table in zip(head.packs, self._read_packs(head.packs), strict=True):
            if table is not None:
                self._entries[pack] = table[0].combine_chunks()
                yield table

    def entries(self, head: Head) -> pa.ChunkedArray:
        """Return the names of all entries of `head`; each pack is read only once for this, even for several heads."""
        new = [pack for pack in head.packs if pack not in self._entries]
        for pack, table in zip(new, self._read_packs(tuple(new)), strict=True):
            if table is not None:
                self._entries[pack] = table[0].combine_chunks()
        known = [self._entries[pack] for pack in head.packs if pack in self._entries]
        return pa.chunked_array(known, pa.string())

    def extend(self, head: Head, entries: pa.Table) -> Head:
        """Add entries to those of `head`, merge its small packs with them, and return the new head.

        Packs that can no longer be read are dropped with their entries.

        Args:
            head: Head that `head` or this method returned.
            entries: Rows of the schema, none of which is in `head`.

        Raises:
            StorageError: the store refused the request or did not answer.
        """
        small = tuple(pack for pack in head.packs if pack.num_bytes < PACK_BYTES // 2)
        self.entries(Head(head.generation, tuple(pack for pack in head.packs if pack not in small)))
        kept = [pack for pack in head.packs if pack not in small and pack in self._entries]
        merged = pa.concat_tables([*self.tables(Head(packs=small)), entries.cast(self._schema)])
        written = [self._write_pack(part) for part in _parts(merged)]
        new = Head(head.generation + 1, (*kept, *written))
        data = json.dumps({"packs": [[pack.name, pack.num_bytes] for pack in new.packs]}).encode()
        self._create(f"{new.generation:012d}-{_hash(data)}.json", data)
        return new

    def _read_packs(self, packs: tuple[Pack, ...]) -> Iterator[pa.Table | None]:
        """Yield one table per pack, in order; None for a pack that cannot be read."""
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
        # Keys are random and do not compress; the other columns do.
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
        except ObjectExistsError:  # named by its content: another writer has stored the same
            log.info("pack_found name=%s%s", self._prefix, name)


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
    log.warning("index_damaged name=%s: ignored; its entries are read from their source", name)


def _parts(table: pa.Table) -> Iterator[pa.Table]:
    """Split a table into tables of at most PACK_BYTES, or of one row."""
    ends = np.cumsum(_row_bytes(table))
    start = 0
    while start < len(table):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PACK_BYTES, side="right")))
        yield table.slice(start, stop - start)
        start = stop


def _row_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return the approximate size of each row in bytes."""
    sizes = np.full(len(table), 32, np.int64)
    for column in table.columns:
        if pa.types.is_large_binary(column.type):
            sizes += np.asarray(pc.fill_null(pc.binary_length(column), 0))
    return sizes


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
