"""Files of a prepared manifest: deterministic Parquet, created once, each piece of the source with a record of its own.

A piece is finished when its record is there. Whoever prepares it again writes the same bytes under the same names.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pia_batch.datasets.request_table import REJECTS, Requests
from pia_batch.datasets.sources import PART_BYTES
from pia_batch.datasets.variations import Variations
from pia_batch.errors import ManifestError, ObjectExistsError
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri

STATE = "_prepare/"
"""Prefix of everything next to the manifest's own files. Readers skip names that begin with an underscore."""

PLAN = f"{STATE}plan.json"
PIECES = f"{STATE}pieces/"
SHUFFLED = f"{STATE}shuffled/"
REJECTS_OF_PIECES = f"{STATE}rejects/"
REJECTED = f"{STATE}rejects.parquet"
SUCCESS = "_SUCCESS.json"

ROW_GROUP_BYTES = 8 * 2**20
"""Size of a row group: small enough that a few hundred engines find work in one terabyte, and in one gigabyte."""

ROW_GROUP_ROWS = 8192


def record_name(number: int, prefix: str = PIECES) -> str:
    """Return the name of the record of a piece, or of a file of shuffled rows."""
    return f"{prefix}{number:06d}.json"


@dataclass
class PieceWriter:
    """Writer of one piece's requests.

    Attributes:
        store: Folder of the manifest.
        number: Number of the piece.
        variations: Variations of every request.
        may_differ: True if the same piece may have other requests the next time, because an image that was fetched
            cannot be fetched then. Names of files have a hash of their contents then, and those of the first record
            count: `remove_unrecorded` removes the others.
    """

    store: Store
    number: int
    variations: Variations
    may_differ: bool = False
    _files: list[dict[str, Any]] = field(default_factory=list)
    _rejects: list[pa.Table] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)

    def add(self, requests: Requests) -> None:
        """Write the requests of some rows as one file, unless there are none."""
        self.note(requests)
        if len(requests.table):
            self.write(requests.table)

    def note(self, requests: Requests) -> None:
        """Keep counts and rejected rows."""
        self._counts += requests.counts
        if len(requests.rejects):
            self._rejects.append(requests.rejects)

    def write(self, table: pa.Table) -> None:
        """Write requests as one file."""
        data, schema = encoded(table, self.variations)
        name = self._create(f"part-{self.number:06d}-{len(self._files):03d}", data)
        self._files.append(
            {
                "name": name,
                "rows": len(table) * self.variations.count,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "schema": base64.b64encode(schema.serialize().to_pybytes()).decode(),
            }
        )

    def finish(self, prefix: str = PIECES) -> dict[str, Any]:
        """Write the rejected rows and the record, below `prefix`, and return the record."""
        rejects = None
        if self._rejects:
            rejects = self._create(
                f"{REJECTS_OF_PIECES}part-{self.number:06d}", _parquet(pa.concat_tables(self._rejects))
            )
        record = {"files": self._files, "counts": dict(sorted(self._counts.items())), "rejects": rejects}
        name = record_name(self.number, prefix)
        try:
            create_same(self.store, name, as_json(record))
        except ManifestError:
            if not self.may_differ:
                raise
            record = self.store.read_json(name)
        return record

    def _create(self, stem: str, data: bytes) -> str:
        """Create a Parquet file, and return its name."""
        digest = f"-{hashlib.sha256(data).hexdigest()[:12]}" if self.may_differ else ""
        create_same(self.store, f"{stem}{digest}.parquet", data)
        return f"{stem}{digest}.parquet"


def encoded(table: pa.Table, variations: Variations) -> tuple[bytes, pa.Schema]:
    """Return a Parquet file with every variation of every request, and its schema.

    Variations of one image are in one row group, which stores the image once, as a dictionary.
    """
    varies = variations.count > 1
    sink, writer = io.BytesIO(), None
    for some in _groups(table, variations.count):
        rows = variations.apply(some)
        if writer is None:
            texts = [item.name for item in rows.schema if pa.types.is_string(item.type)]
            writer = pq.ParquetWriter(
                sink,
                rows.schema,
                use_dictionary=[*texts, *(["image_bytes"] if varies else [])],
                dictionary_pagesize_limit=2 * PART_BYTES if varies else 2**20,
                compression={item.name: "none" if item.name == "image_bytes" else "zstd" for item in rows.schema},
                write_statistics=[item.name for item in rows.schema if item.name != "image_bytes"],
                write_page_checksum=True,
            )
        writer.write_table(rows, row_group_size=len(rows))
    if writer is None:
        msg = "a file needs at least one row"
        raise ValueError(msg)
    writer.close()
    return sink.getvalue(), rows.schema


def _groups(table: pa.Table, variations: int) -> Iterator[pa.Table]:
    """Yield the rows of each row group."""
    mean_bytes = max(1, table.nbytes // len(table))
    most = max(
        1, min(ROW_GROUP_ROWS // variations, ROW_GROUP_BYTES // mean_bytes, PART_BYTES // (mean_bytes * variations))
    )
    for start in range(0, len(table), most):
        yield table.slice(start, most)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def remove_unrecorded(store: Store, recorded: Collection[str]) -> None:
    """Remove files of pieces that no record names: a call that was killed left them, and another fetched other images.

    Args:
        store: Folder of the manifest.
        recorded: Names of all files that belong to it.
    """
    for prefix in ("", REJECTS_OF_PIECES):
        for info in list(store.list(prefix)):
            if info.name.removeprefix(prefix).startswith("part-") and info.name not in recorded:
                store.delete(info.name)


def write_rejects(store: Store, names: Sequence[str]) -> None:
    """Write the rejected rows of all pieces as one file."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, REJECTS, compression="zstd") as writer:
        for data in store.read_all(list(names)):
            writer.write_table(read_rejects(data))
    create_same(store, REJECTED, sink.getvalue())


def read_rejects(data: bytes) -> pa.Table:
    """Return the rejected rows of a piece, with REJECTS' columns."""
    return pq.read_table(io.BytesIO(data))


def create_same(store: Store, name: str, data: bytes) -> None:
    """Create an object, or check that it has these bytes already.

    Raises:
        ManifestError: It has others.
    """
    try:
        store.create(name, data)
    except ObjectExistsError:
        if store.read(name) != data:
            msg = (
                f"{redacted_uri(store.uri_of(name))} exists with other contents: another version of the programs began "
                "there, or another program wrote it. Delete the folder of --to, or choose another one"
            )
            raise ManifestError(msg) from None


def as_json(payload: dict[str, Any]) -> bytes:
    """Return JSON that is the same bytes for the same payload."""
    return (json.dumps(payload, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
