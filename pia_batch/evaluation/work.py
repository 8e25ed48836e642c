"""Work of an evaluation: the results that it measures, in pieces of a few rows, and the pieces that are left."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pia_batch.config import ImagesConfig
from pia_batch.errors import ConfigError, ObjectExistsError, StorageError
from pia_batch.evaluation.clips import READ
from pia_batch.evaluation.measures import EvaluationRequest
from pia_batch.journal import layout
from pia_batch.journal.log import to_json
from pia_batch.journal.results import read_latest, read_success_marker
from pia_batch.schema.run_record import RunRecord
from pia_batch.storage.object_store import Store

PIECE_ROWS = 64
"""Largest number of rows of a piece: what a killed worker loses of its work."""

PIECES_PER_WORKER = 8
"""Number of pieces that each worker should get of a small output, so that all of them end at about the same time."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows of one part of the results, measured and committed together.

    Attributes:
        number: Number of the piece in its evaluation.
        part: Name of the part's object.
        start: First row in the part.
        num_rows: Number of rows.
    """

    number: int
    part: str
    start: int
    num_rows: int


@dataclass(frozen=True)
class RunResults:
    """Published results of one run.

    Attributes:
        store: Output.
        run_id: Run.
        digest: Digest of the results.
        parts: Names of the objects of the results, with their numbers of rows, in order.
        folder: URI of the folder of the manifest; empty: not known.
        images: Section `images` of the run's config.
    """

    store: Store
    run_id: str
    digest: str
    parts: tuple[tuple[str, int], ...]
    folder: str
    images: ImagesConfig

    @classmethod
    def open(cls, store: Store, run_id: str | None) -> RunResults:
        """Find the results of a run; None: the newest.

        Raises:
            ConfigError: There are none.
        """
        if run_id is None:
            newest = read_latest(store)
            if newest is None:
                msg = f"{store.uri} has no results yet; `pia-batch run` publishes them when every request is finished"
                raise ConfigError(msg)
            run_id = str(newest["run_id"])
        marker = read_success_marker(store, run_id)
        if marker is None:
            msg = f"run {run_id!r} has no published results in {store.uri}; correct --run-id"
            raise ConfigError(msg)
        parts = tuple((f"{layout.results_folder(run_id)}/{each['name']}", each["rows"]) for each in marker["parts"])
        record = _run_record(store, run_id)
        settings = (record.config or {}).get("images") if record else None
        try:
            images = ImagesConfig.model_validate(settings or {})
        except ValueError:  # of another version
            images = ImagesConfig()
        return cls(store, run_id, marker["digest"], parts, (record.folder if record else None) or "", images)

    @property
    def num_rows(self) -> int:
        """Number of requests."""
        return sum(rows for _, rows in self.parts)

    def read(self, part: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return one part, in those of `columns` that it has; None: all.

        Raises:
            StorageError: The part is missing or damaged.
        """
        return read_table(self.store, part, columns)

    def pieces(self, piece_rows: int) -> Iterator[Piece]:
        """Yield the pieces, in order."""
        number = 0
        for part, num_rows in self.parts:
            for start in range(0, num_rows, piece_rows):
                yield Piece(number, part, start, min(piece_rows, num_rows - start))
                number += 1


def tables_of(results: RunResults, part: str, pieces: Collection[Piece]) -> Iterator[tuple[Piece, pa.Table]]:
    """Yield the rows of each piece of one part, in the columns that are measured by."""
    table = results.read(part, READ)
    for piece in pieces:
        yield piece, table.slice(piece.start, piece.num_rows)


def begin(store: Store, evaluation_id: str, request: EvaluationRequest, num_rows: int, workers: int) -> int:
    """Record what an evaluation measures, or find that it does so already; return the number of rows of a piece.

    Raises:
        ConfigError: An evaluation of this id measures something else.
    """
    piece_rows = max(1, min(PIECE_ROWS, num_rows // (PIECES_PER_WORKER * workers)))
    name = layout.evaluation_record(evaluation_id)
    record = {**request.content(), "piece_rows": piece_rows}
    try:
        store.create(name, to_json(record))
    except ObjectExistsError:
        record = store.read_json(name, ("piece_rows",))
    found = {key: record.get(key) for key in request.content()}
    if found != request.content():
        differing = next(key for key, value in request.content().items() if found[key] != value)
        msg = (
            f"--id: evaluation {evaluation_id} measures something else: other {differing} (got "
            f"{_short(request.content()[differing])}, expected {_short(found[differing])}); choose another id, or none"
        )
        raise ConfigError(msg)
    return int(record["piece_rows"])


def finished_pieces(store: Store, evaluation_id: str) -> set[int]:
    """Return the numbers of the pieces that are committed."""
    found = (layout.evaluation_piece_number(item.name) for item in store.list(layout.evaluation_pieces(evaluation_id)))
    return {number for number in found if number is not None}


def read_table(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet object of the output, in those of `columns` that it has; None: all.

    Raises:
        StorageError: The object is missing or damaged.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(store.read(name)), page_checksum_verification=True)
        present = file.schema_arrow.names
        names = present if columns is None else [column for column in columns if column in present]
        return file.read(names).select(names)  # for a column `a.b`, Arrow also reads the field `b` of a struct `a`
    except (FileNotFoundError, pa.ArrowException, OSError, KeyError) as err:
        msg = f"{store.uri_of(name)} is missing or damaged: {err}; publish or evaluate again under a new id"
        raise StorageError(msg) from None


def _run_record(store: Store, run_id: str) -> RunRecord | None:
    name = layout.run_record_name(run_id)
    try:
        return RunRecord.parse(store.read(name), store.uri_of(name))
    except FileNotFoundError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"  # noqa: PLR2004 - one line of a message
