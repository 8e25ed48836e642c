"""Plan of an export: the exported rows, in shards that every later start of the same export cuts the same way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import Format
from pia_batch.errors import ConfigError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal
from pia_batch.journal.results import read_latest, read_success_marker
from pia_batch.schema import far_times
from pia_batch.schema.columns import RESULT, SUCCEEDED
from pia_batch.schema.dataset_columns import DatasetColumns, Media, media_of
from pia_batch.schema.expressions import RowFilter
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri

DEFAULT_SHARD_SIZE = "500MB"

MAX_SHARD_ROWS = 100_000
"""Largest number of animations of one shard, whatever their size."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([KMG]I?)?B)?", re.IGNORECASE)


@dataclass(frozen=True)
class ShardSize:
    """Largest size of a shard; a single larger animation is a shard of its own."""

    rows: int = MAX_SHARD_ROWS
    num_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> ShardSize:
        """Return the size in a text: a number of animations, or bytes with a unit, such as `500MB`.

        Raises:
            ConfigError: It is neither.
        """
        match = _SIZE.fullmatch(text.strip())
        number = float(match[1]) if match else 0
        is_rows = match is not None and "b" not in text.lower()
        if match is None or number < 1 or (is_rows and (number > MAX_SHARD_ROWS or number != int(number))):
            msg = (
                f"--shard-size: invalid value (got {text!r}, expected 1 to {MAX_SHARD_ROWS} animations, or bytes with "
                "a unit, such as 500MB)"
            )
            raise ConfigError(msg)
        if is_rows:
            return cls(rows=int(number))
        return cls(num_bytes=int(number * _UNITS[(match[2] or "").upper()]))


@dataclass(frozen=True)
class Shard:
    """Rows of one shard. It can be pickled.

    Attributes:
        number: Number of the shard, from 0.
        rows: Row numbers in parts of the results: pairs of a part's name and its rows, int32, ascending.
        num_rows: Number of rows.
    """

    number: int
    rows: tuple[tuple[str, npt.NDArray[np.int32]], ...]
    num_rows: int


@dataclass(frozen=True)
class Published:
    """Published results of one run.

    Attributes:
        store: Output.
        run_id: The run.
        digest: Digest of its results.
        parts: Names of its parts, in order.
        sources: Weights of each model, by its name in the config.
        schema: Columns of its parts.
    """

    store: Store
    run_id: str
    digest: str
    parts: tuple[str, ...]
    sources: dict[str, dict[str, str]]
    schema: pa.Schema

    @classmethod
    def find(cls, store: Store, run_id: str | None) -> Published:
        """Return the results of a run, or the newest ones.

        Raises:
            ConfigError: There are none.
            StorageError: The store refused or did not answer.
        """
        newest = read_latest(store)
        name = run_id or (newest["run_id"] if newest else None)
        state = read_success_marker(store, name) if name else None
        if state is None:
            shown = redacted_uri(store.uri)
            if run_id and newest:
                msg = f"--run: {run_id} has no complete results in {shown}; the newest ones are {newest['run_id']}'s"
            else:
                msg = f"{shown} has no complete results; `pia-batch run` publishes them, or correct the URI"
            raise ConfigError(msg)
        parts = tuple(f"{layout.results_folder(state['run_id'])}/{part['name']}" for part in state["parts"])
        (first,) = Journal(store).read(list(parts[:1]))
        return cls(store, state["run_id"], state["digest"], parts, state.get("models", {}), first.schema)

    def read(self, part: str, columns: list[str] | None = None) -> pa.Table:
        """Return one part.

        Raises:
            StorageError: The store refused or did not answer, or the part is damaged.
        """
        return next(iter(Journal(self.store).read([part], columns)))


@dataclass(frozen=True)
class ExportPlan:
    """Rows of an export, cut into shards.

    Attributes:
        published: Results that are exported.
        columns: Columns of the export.
        names: Names of the chosen columns of `columns.schema`.
        transcode: Format of the exported animations; None: as they are.
        shards: Shards, in order.
        formats: Number of exported animations by their format in the output.
        models: Number of exported animations by model.
        num_unknown: Number of ids of `--only` without an animation.
        texts: Names of the chosen columns that are exported as texts: they have times that Python lacks.
    """

    published: Published
    columns: DatasetColumns
    names: tuple[str, ...]
    transcode: Format | None
    shards: tuple[Shard, ...]
    formats: dict[str, int]
    models: dict[str, int]
    num_unknown: int
    texts: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Number of exported animations."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def exported_formats(self) -> dict[str, int]:
        """Number of exported animations by their format in the export."""
        return {self.transcode: self.num_rows} if self.transcode else self.formats

    @property
    def media(self) -> set[Media]:
        """Media of the exported animations."""
        return {media_of(name) for name in self.exported_formats}

    @property
    def schema(self) -> pa.Schema:
        """Chosen columns."""
        schema = pa.schema([self.columns.schema.field(name) for name in self.names])
        return far_times.schema_with_texts(schema, self.texts)


def chosen_columns(columns: DatasetColumns, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the columns to export, always with `request_id`.

    Args:
        columns: Columns that there are.
        wanted: Names as in the export or in the results; None: all.

    Raises:
        ConfigError: A name does not exist.
    """
    names = columns.schema.names
    if wanted is None:
        return tuple(names)
    renamed = [columns.renamed.get(name, name) if name not in names else name for name in wanted]
    unknown = [name for name in renamed if name not in names]
    if unknown:
        held = [
            f"{name}, whose type {columns.left_out[name]} is not exported"
            for name in unknown
            if name in columns.left_out
        ]
        msg = f"--columns: no column {', '.join(held or unknown)}; there are {', '.join(names)}"
        raise ConfigError(msg)
    return tuple(dict.fromkeys(["request_id", *renamed]))


def carried_times(columns: DatasetColumns, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of `names` that are carried columns with dates, times or durations."""
    carried = [name for name in names if columns.source_of(name) not in RESULT.names]
    return tuple(name for name in carried if far_times.can_have(columns.schema.field(name).type))


class Selection:
    """Rows of results that an export takes.

    Args:
        published: The results.
        where: Condition on the results' columns; None: all succeeded rows.
        only: Ids of requests, unique; None: all.
        columns: Columns of the export.
        times: Names of columns of the export; those with times that Python lacks are added to `far`.
    """

    def __init__(
        self,
        published: Published,
        where: RowFilter | None,
        only: pa.Array | None,
        columns: DatasetColumns,
        times: Sequence[str] = (),
    ) -> None:
        self._published, self._where, self._only = published, where, only
        self._columns, self._times = columns, times
        self.far = set[str]()
        if where is not None:
            where.bind(published.schema)  # unknown columns are refused before anything is read
        self.formats, self.models = Counter[str](), Counter[str]()
        self._found = np.zeros(0 if only is None else len(only), bool)

    @property
    def num_unknown(self) -> int:
        """Number of ids of `only` that no selected row has."""
        return int(len(self._found) - self._found.sum())

    def rows(self) -> Iterator[tuple[str, pa.Table]]:
        """Yield the name of each part, and its selected rows with the columns NEEDED and `row`, their number there.

        Raises:
            StorageError: The store refused or did not answer.
        """
        names = {*NEEDED, *(self._where.columns if self._where else ()), *map(self._columns.source_of, self._times)}
        names &= set(self._published.schema.names)
        for part in self._published.parts:
            table = self._published.read(part, [name for name in self._published.schema.names if name in names])
            table = table.append_column(_ROW, pa.array(np.arange(len(table), dtype=np.int32)))
            table = table.filter(pc.equal(table["status"], SUCCEEDED))
            if self._where is not None:
                table = self._where.keep(table)
            if self._only is not None:
                at = pc.index_in(table["request_id"], value_set=self._only)
                table = table.filter(pc.is_valid(at))
                self._found[at.drop_null().to_numpy()] = True
            self.formats.update(_counts(table["format"]))
            self.models.update(_counts(table["model"]))
            if self._times:
                self.far.update(far_times.columns_with(self._columns.rows(table, self._times)))
            yield part, table

    def shards(self, size: ShardSize) -> Iterator[Shard]:
        """Cut the rows, in their order, into shards.

        Raises:
            StorageError: The store refused or did not answer.
        """
        number, pieces, rows, num_bytes = 0, list[tuple[str, npt.NDArray[np.int32]]](), 0, 0
        for part, table in self.rows():
            numbers = table[_ROW].to_numpy().astype(np.int32)
            sizes = table["num_bytes"].to_numpy()
            start = 0
            while start < len(numbers):
                end = start + _fitting(sizes[start : start + size.rows - rows], size.num_bytes, num_bytes)
                if end == start and rows == 0:
                    end = start + 1  # a single animation that is larger than a shard
                if end > start:
                    pieces.append((part, numbers[start:end]))
                    rows, num_bytes = rows + end - start, num_bytes + int(sizes[start:end].sum())
                if end < len(numbers):
                    yield Shard(number, tuple(pieces), rows)
                    number, pieces, rows, num_bytes = number + 1, [], 0, 0
                start = end
        if rows:
            yield Shard(number, tuple(pieces), rows)


NEEDED = ("request_id", "key", "status", "animation_uri", "format", "model", "num_bytes", "sha256")
"""Columns of results without which no row can be exported."""

_ROW = "__row__"


def _fitting(sizes: npt.NDArray[np.int64], limit: int | None, used: int) -> int:
    """Return the number of the first rows that fit into what is left of a shard."""
    if limit is None:
        return len(sizes)
    return int(np.searchsorted(np.cumsum(sizes), limit - used, side="right"))


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"] or "": item["counts"] for item in pc.value_counts(column).to_pylist()}
