"""Ray Datasets as sources: their blocks are the pieces, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pia_batch.datasets.sources import Kind, Piece, Rows
from pia_batch.errors import ConfigError, ManifestError


def _is_never(_: object) -> bool:
    return False


def _refuse(*_: object) -> Any:
    raise ConfigError("--kind dataset: a Ray Dataset has no URI; give it to pia_batch.prepare")


DATASET = Kind("dataset", "a Ray Dataset, from Python only", _is_never, _refuse)
"""Kind of a Ray Dataset."""


@dataclass(frozen=True)
class DatasetSource:
    """Blocks of an executed Dataset, in the object store of its cluster."""

    blocks: Sequence[Any]
    """References to Arrow tables."""
    pieces: Sequence[Piece]
    schema: pa.Schema
    pinned: Mapping[str, str]

    @classmethod
    def of(cls, dataset: ray.data.Dataset) -> DatasetSource:
        """Execute a Dataset, with its blocks in order.

        Raises:
            ManifestError: It has no row.
        """
        context = ray.data.DataContext.get_current()
        before = context.execution_options.preserve_order
        context.execution_options.preserve_order = True
        dataset.context.execution_options.preserve_order = True
        try:
            blocks = dataset.to_arrow_refs()
        finally:
            context.execution_options.preserve_order = before
        described = ray.get([ray.remote(_described).remote(block) for block in blocks])
        pieces = [Piece(f"block {k}", version, k) for k, (version, rows, _) in enumerate(described) if rows]
        if not pieces:
            raise ManifestError("the Dataset has no row; give one row for each request")
        schemas = [schema for _, rows, schema in described if rows]
        return cls(tuple(blocks), tuple(pieces), pa.unify_schemas(schemas, promote_options="permissive"), {})

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the rows of a block."""
        table = ray.get(self.blocks[piece.detail])
        yield Rows(table, pa.array([f"{piece.name}:{row}" for row in range(len(table))], pa.string()))


def _described(table: pa.Table) -> tuple[str, int, pa.Schema]:
    """Return a hash of a block's rows, their number, and their columns."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()[:32], len(table), table.schema.remove_metadata()
