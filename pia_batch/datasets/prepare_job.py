"""Work of `prepare` on one piece of a source, in a task of Ray Data. It does not use Ray itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.datasets.part_files import SHUFFLED, PieceWriter
from pia_batch.datasets.request_table import Requests, RequestTable
from pia_batch.datasets.sources import PART_BYTES, Source
from pia_batch.datasets.variations import Variations
from pia_batch.storage.object_store import Store

PART, ORDER = "__part__", "__order__"
"""Columns of shuffled rows: the file that a row belongs to, and its place there."""


@dataclass(frozen=True)
class PrepareJob:
    """Everything that a worker needs to prepare a piece."""

    source: Source
    make: RequestTable
    variations: Variations
    output: str
    limits: Mapping[int, int] = field(default_factory=dict)
    """Largest number of rows that become requests, by piece; without an entry, all do."""
    last_order: int | None = None
    """Largest number by which rows are shuffled that becomes a request; None: all do."""

    def prepare(self, number: int) -> dict[str, Any]:
        """Write the files of one piece, and return its record."""
        writer = self._writer(number)
        left = self.limits.get(number)
        for rows in self.source.read(self.source.pieces[number]):
            for requests in self.make.parts(rows, left):
                writer.add(requests)
            if left is not None:
                left -= min(left, self.make.count(rows))
        return writer.finish()

    def count(self, number: int) -> int:
        """Return the number of rows of one piece that become requests."""
        return sum(self.make.count(rows) for rows in self.source.read(self.source.pieces[number]))

    def orders(self, number: int) -> list[int]:
        """Return the numbers by which the rows of one piece are shuffled."""
        return [int(order) for requests in self._requests(number) for order in requests.order]

    def scattered(self, numbers: Sequence[int], num_parts: int, finished: AbstractSet[int]) -> Iterator[pa.Table]:
        """Yield the rows of some pieces with the file that each belongs to, except for finished files."""
        for number in numbers:
            writer = self._writer(number)
            for all_requests in self._requests(number):
                requests = all_requests
                if self.last_order is not None:
                    requests = requests.filter(requests.order <= np.uint64(self.last_order))
                writer.note(requests)
                part = ((requests.order >> np.uint64(32)) * np.uint64(num_parts)) >> np.uint64(32)
                table = requests.table.append_column(ORDER, pa.array(requests.order))
                table = table.append_column(PART, pa.array(part.astype(np.int64)))
                yield table.filter(pc.invert(pc.is_in(table[PART], pa.array(sorted(finished), pa.int64()))))
            writer.finish()

    def write_shuffled(self, rows: pa.Table) -> pa.Table:
        """Write the rows of one file in their order, and return its number."""
        number = rows[PART][0].as_py()
        writer = self._writer(number)
        rows = rows.sort_by(ORDER).drop_columns([ORDER, PART])
        most = max(1, len(rows) * PART_BYTES // max(rows.nbytes, 1))
        for start in range(0, len(rows), most):
            writer.write(rows.slice(start, most))
        writer.finish(SHUFFLED)
        return pa.table({"piece": [number]})

    def _requests(self, number: int) -> Iterator[Requests]:
        """Yield the requests of one piece."""
        for rows in self.source.read(self.source.pieces[number]):
            yield from self.make.parts(rows)

    def _writer(self, number: int) -> PieceWriter:
        return PieceWriter(Store(self.output), number, self.variations, may_differ=self.make.reads_images)
