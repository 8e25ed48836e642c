"""Selection of requests by their measures, such as the best of several seeds, as a table of request ids."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pia_batch.errors import ConfigError, message_of
from pia_batch.evaluation import publication
from pia_batch.evaluation.publication import Evaluation
from pia_batch.evaluation.work import RunResults, read_table
from pia_batch.manifest.arrow_types import plain_column
from pia_batch.schema import python_values
from pia_batch.schema.columns import SUCCEEDED
from pia_batch.schema.dataset_columns import free_name
from pia_batch.schema.expressions import RowFilter, RowNumber
from pia_batch.storage import local_disk
from pia_batch.storage.object_store import Store
from pia_batch.storage.store_uris import absolute, local_path

SCORE, RANK = "score", "rank"

_IDENTITY = ("request_id", "key", "status")


@dataclass(frozen=True)
class Choice:
    """Conditions by which requests are chosen.

    Attributes:
        by: Score; the highest are chosen. None: all that `where` accepts.
        where: Condition; None: every animation.
        group_by: Columns whose equal values make a group.
        top: Number of requests chosen of each group; None: 1 with `group_by`, else all.
    """

    by: RowNumber | None = None
    where: RowFilter | None = None
    group_by: tuple[str, ...] = ()
    top: int | None = None

    def __post_init__(self) -> None:
        """Check that the conditions fit together.

        Raises:
            ConfigError: They do not.
        """
        if self.by is None and self.where is None:
            msg = "--by, --where: nothing to select by; give a score, a condition, or both"
            raise ConfigError(msg)
        if self.by is None and (self.group_by or self.top is not None):
            msg = "--group-by, --top: they choose the highest scores; give the score with --by"
            raise ConfigError(msg)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are read."""
        read = set(self.group_by)
        read |= self.by.columns if self.by else set()
        read |= self.where.columns if self.where else set()
        return sorted(read - set(_IDENTITY))

    @property
    def renamed(self) -> dict[str, str]:
        """New name of each column that is read whose name a column of the selection has."""
        return {name: free_name(name, set(self.columns)) for name in (SCORE, RANK) if name in self.columns}

    @property
    def limit(self) -> int | None:
        """Number of requests chosen of each group, or None for all."""
        return 1 if self.top is None and self.group_by else self.top


@dataclass(frozen=True)
class Selection:
    """Requests that were chosen.

    Attributes:
        table: `request_id`, `key`, the columns that were read, `score` and `rank` (from 1, in its group). One that was
            read as `score` or `rank` has an underscore after its name.
        evaluation: Evaluation that was read.
        num_requests: Number of requests of its run.
        num_accepted: Number of animations that `where` accepts.
        num_unscored: Number of those without a score, which are not chosen.
        num_groups: Number of groups with a chosen request.
    """

    table: pa.Table
    evaluation: Evaluation
    num_requests: int
    num_accepted: int
    num_unscored: int
    num_groups: int


def select(output: str, choice: Choice, evaluation_id: str | None = None) -> Selection:
    """Choose requests of the run that an evaluation measures.

    Conditions may name measures of the evaluation, and columns of the results, carried ones included; of two columns
    with one name, the measure counts.

    Args:
        output: URI of the output.
        choice: Conditions.
        evaluation_id: Complete evaluation; None: the newest.

    Raises:
        ConfigError: There is no such evaluation or column, or a condition does not fit a column.
        StorageError: The store refused or did not answer, or results are damaged.
    """
    store = Store(output)
    evaluation = publication.find(store, evaluation_id)
    results = RunResults.open(store, evaluation.run_id)
    accepted = []
    for part, measured in publication.pairs_of_parts(results, evaluation):
        rows = joined(store, part, measured, choice.columns)
        rows = rows.filter(pc.equal(rows["status"], SUCCEEDED))
        rows = rows if choice.where is None else choice.where.keep(rows)
        scores = None if choice.by is None else choice.by.of(rows)
        accepted.append(rows if scores is None else rows.rename_columns(choice.renamed).append_column(SCORE, scores))
    table = pa.concat_tables(accepted).combine_chunks()
    num_accepted, num_groups = len(table), len(table)
    if choice.by is not None:
        table = table.filter(pc.is_finite(table[SCORE]))  # a null score is no score either
        num_scored = len(table)
        table, num_groups = _best(table, choice)
    else:
        num_scored = num_accepted
    table = table.drop_columns(["status"])
    return Selection(table, evaluation, results.num_rows, num_accepted, num_accepted - num_scored, num_groups)


def joined(store: Store, part: str, measured: str | None, columns: Sequence[str]) -> pa.Table:
    """Return the rows of a part of results, and of the part of its evaluation, side by side.

    Args:
        store: Output.
        part: Name of the part of the results.
        measured: Name of the part of the evaluation, which has the same requests in the same order; None: results only.
        columns: Columns of either one.

    Raises:
        ConfigError: Neither has one of the columns.
    """
    theirs = pa.table({}) if measured is None else read_table(store, measured, columns)
    table = read_table(store, part, [*_IDENTITY, *(name for name in columns if name not in theirs.column_names)])
    for name in theirs.column_names:
        table = table.append_column(theirs.schema.field(name), theirs[name])
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        measures = [] if measured is None else read_table(store, measured).column_names
        known = [*measures, *read_table(store, part).column_names]
        shown = ", ".join(dict.fromkeys(name for name in known if name not in _IDENTITY))
        msg = f"no column {missing[0]!r} in the evaluation and its results; there are {shown}"
        raise ConfigError(msg)
    return table


def write(selection: Selection, uri: str) -> str:
    """Write the table of a selection as Parquet, or as CSV if the name ends in `.csv`; return its URI.

    Raises:
        ConfigError: The name has another ending, or a column cannot be written as CSV.
        StorageError: The store refused or did not answer.
    """
    parent, _, name = absolute(uri).rpartition("/")
    sink = io.BytesIO()
    ending = PurePosixPath(name).suffix.lower()
    if ending not in (".parquet", ".csv"):
        msg = f"--out: unknown ending of {name!r} (expected .parquet or .csv)"
        raise ConfigError(msg)
    try:
        if ending == ".csv":
            pyarrow.csv.write_csv(selection.table, sink)
        else:
            pq.write_table(selection.table, sink)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
        msg = f"--out: cannot write {name} as CSV: {message_of(err)}; name a .parquet file"
        raise ConfigError(msg) from None
    if parent.startswith("file://"):
        local_disk.write_file(Path(local_path(f"{parent}/{name}")), sink.getvalue(), "--out")
    else:
        Store(parent).replace(name, sink.getvalue())
    return f"{parent}/{name}"


def _best(table: pa.Table, choice: Choice) -> tuple[pa.Table, int]:
    """Return the highest scores of each group, in its order, with their ranks; and the number of groups."""
    names = [choice.renamed.get(name, name) for name in choice.group_by]
    groups = {str(number): group_numbers(table[name]) for number, name in enumerate(names)}
    keys = pa.table(groups | {SCORE: table[SCORE], "request_id": table["request_id"]})
    ways = [*((name, "ascending") for name in groups), (SCORE, "descending"), ("request_id", "ascending")]
    order = pc.sort_indices(keys, sort_keys=ways)
    table = table.take(order)
    starts = np.arange(len(table)) == 0
    for numbers in groups.values():
        starts[1:] |= np.diff(numbers[order.to_numpy()]) != 0
    places = np.arange(len(table))
    ranks = places - places[starts][np.cumsum(starts) - 1] + 1
    table = table.append_column(RANK, pa.array(ranks, pa.int64()))
    if choice.limit is not None:
        table = table.filter(pa.array(ranks <= choice.limit, pa.bool_()))
    return table, int(starts.sum())


def group_numbers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return the number of each row's group, rising with the values; of types without an order, with the first row.

    Null is a group, and so is NaN.
    """
    array = plain_column(column).combine_chunks()
    try:
        coded = array.dictionary_encode()
        order = pc.sort_indices(coded.dictionary).to_numpy()
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError):
        found: dict[Any, int] = {}
        keys = map(python_values.group_key, python_values.of_column(array))
        return np.array([found.setdefault(key, len(found)) for key in keys], np.int64)
    numbers = np.empty(len(order) + 1, np.int64)
    numbers[order], numbers[-1] = np.arange(len(order)), len(order)
    of_rows: npt.NDArray[np.int64] = numbers[pc.fill_null(coded.indices, len(order)).to_numpy()]
    return of_rows
