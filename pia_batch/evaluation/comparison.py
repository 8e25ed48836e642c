"""Comparison of two outputs or runs: pairs of requests, differences of their measures, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.errors import ConfigError
from pia_batch.evaluation import publication
from pia_batch.evaluation.bootstrap import Interval, interval
from pia_batch.evaluation.publication import Evaluation
from pia_batch.evaluation.selection import joined
from pia_batch.evaluation.work import RunResults
from pia_batch.schema import python_values
from pia_batch.schema.columns import SUCCEEDED
from pia_batch.storage.object_store import Store

OF_RESULTS = ("motion", "frame_mean", "frame_std", "first_frame_psnr_db", "num_bytes", "gpu_seconds")
"""Columns of results that are compared, besides the measures of evaluations."""

SHOWN = ("format", "fps", "width", "height", "num_frames", "prompt", "seed", "model")
"""Columns of results that the page needs for each clip."""

ALL = "all"
"""Name of the group of all pairs."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        results: Its results.
        evaluation: Its evaluation, or None.
        table: One row for each animation: keys of the pairs, measures, groups, and the columns SHOWN.
    """

    results: RunResults
    evaluation: Evaluation | None
    table: pa.Table


@dataclass(frozen=True)
class Comparison:
    """Pairs of two sides.

    Attributes:
        a: First side.
        b: Second side, whose differences from A are shown.
        pair_by: Columns that the two requests of a pair have in common.
        measures: Names of the compared measures.
        rows_a: Rows of A's pairs, in the order of the pairs.
        rows_b: Rows of B's pairs.
        groups: Intervals by group and measure; the first group is ALL.
    """

    a: Side
    b: Side
    pair_by: tuple[str, ...]
    measures: tuple[str, ...]
    rows_a: pa.Table
    rows_b: pa.Table
    groups: dict[str, dict[str, Interval]]

    def record(self) -> dict[str, Any]:
        """Return the figures as a JSON value."""
        return {
            "a": _named(self.a),
            "b": _named(self.b),
            "pairs": len(self.rows_a),
            "only_a": len(self.a.table) - len(self.rows_a),
            "only_b": len(self.b.table) - len(self.rows_b),
            "groups": {
                group: {name: asdict(each) for name, each in found.items()} for group, found in self.groups.items()
            },
        }


def open_side(
    output: str, run_id: str | None, evaluation_id: str | None, pair_by: Sequence[str], group_by: Sequence[str]
) -> Side:
    """Read one side: the newest results, or those of a run or of an evaluation.

    Raises:
        ConfigError: There are no such results, or a column does not exist.
    """
    store = Store(output)
    evaluation = publication.find(store, evaluation_id, run_id) if evaluation_id is not None else None
    results = RunResults.open(store, evaluation.run_id if evaluation else run_id)
    if evaluation is None:
        evaluation = next((each for each in publication.complete(store) if each.run_id == results.run_id), None)
    measures = [] if evaluation is None else evaluation.measures
    columns = list(dict.fromkeys([*measures, *OF_RESULTS, *SHOWN, *pair_by, *group_by]))
    columns = [name for name in columns if name not in ("request_id", "key", "status")]
    parts = [part for part, _ in results.parts]
    measured = [None] * len(parts) if evaluation is None else [part for part, _ in evaluation.parts]
    tables = [joined(store, *pair, columns) for pair in zip(parts, measured, strict=True)]
    table = pa.concat_tables(tables)
    return Side(results, evaluation, table.filter(pc.equal(table["status"], SUCCEEDED)).combine_chunks())


def compare(a: Side, b: Side, pair_by: tuple[str, ...], group_by: tuple[str, ...], seed: int = 0) -> Comparison:
    """Pair the animations of two sides, and compare their measures, over all pairs and in each group of A's rows.

    Raises:
        ConfigError: Nothing pairs, or several rows of a side have the same values of `pair_by`.
    """
    at_a, at_b = _pairs(a, b, pair_by)
    rows_a, rows_b = a.table.take(pa.array(at_a)), b.table.take(pa.array(at_b))
    measures = tuple(name for name in _measures(a) if name in _measures(b))
    groups = {ALL: np.arange(len(rows_a))}
    if group_by:
        groups |= _groups(rows_a, group_by)
    columns = {name: (_values(rows_a, name), _values(rows_b, name)) for name in measures}
    intervals = {group: _intervals(columns, rows, seed) for group, rows in groups.items()}
    measures = tuple(name for name in measures if name in intervals[ALL])  # those that both clips of a pair have
    return Comparison(a, b, pair_by, measures, rows_a, rows_b, intervals)


def _groups(rows: pa.Table, columns: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
    """Return the rows of each group of equal values, by its name."""
    found: dict[Any, list[int]] = {}
    labels = list(zip(*(python_values.of_column(rows[name]) for name in columns), strict=True))
    for at, label in enumerate(labels):
        found.setdefault(python_values.group_key(label), []).append(at)
    named = {_name(columns, labels[places[0]]): np.array(places) for places in found.values()}
    return dict(sorted(named.items()))


def _name(columns: Sequence[str], label: tuple[Any, ...]) -> str:
    pairs = zip(columns, label, strict=True)
    return ", ".join(f"{column} is null" if value is None else f"{column} {value}" for column, value in pairs)


def _intervals(
    columns: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    rows: npt.NDArray[np.int64],
    seed: int,
) -> dict[str, Interval]:
    found = {}
    for name, (a, b) in columns.items():
        both = rows[np.isfinite(a[rows]) & np.isfinite(b[rows])]
        if len(both):
            found[name] = interval(a[both], b[both], seed)
    return found


def _pairs(a: Side, b: Side, pair_by: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Return the rows of A and B that are pairs, in A's order."""
    places = _places(b, pair_by, "B")
    own = _places(a, pair_by, "A")
    at_a = [at for key, at in own.items() if key in places]
    if not at_a:
        msg = (
            f"--pair-by: no animation of A has the {', '.join(pair_by)} of one of B; name columns that both have in "
            "common"
        )
        raise ConfigError(msg)
    return at_a, [places[key] for key in own if key in places]


def _places(side: Side, pair_by: tuple[str, ...], name: str) -> dict[Any, int]:
    """Return the row of each animation by its values of `pair_by`.

    Raises:
        ConfigError: Two rows have the same values.
    """
    places: dict[Any, int] = {}
    for at, values in enumerate(zip(*(python_values.of_column(side.table[each]) for each in pair_by), strict=True)):
        key = python_values.group_key(values)
        if key in places:
            shown = ", ".join(f"{column} {value!r:.200}" for column, value in zip(pair_by, values, strict=True))
            msg = f"--pair-by: several animations of {name} have {shown}; add a column in which they differ"
            raise ConfigError(msg)
        places[key] = at
    return places


def _measures(side: Side) -> list[str]:
    return [*(side.evaluation.measures if side.evaluation else []), *OF_RESULTS]


def _values(rows: pa.Table, name: str) -> npt.NDArray[np.float64]:
    """Return a measure of all rows; NaN where it is null."""
    filled = pc.fill_null(rows[name].cast(pa.float64()), float("nan"))
    values: npt.NDArray[np.float64] = filled.to_numpy()
    return values


def _named(side: Side) -> dict[str, str | None]:
    evaluation = side.evaluation.evaluation_id if side.evaluation else None
    return {"output": side.results.store.uri, "run_id": side.results.run_id, "evaluation_id": evaluation}
