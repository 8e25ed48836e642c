"""Publication of an evaluation: its pieces become parts in the order of the results, then summary and `_SUCCESS.json`.

Repeating it writes the same files, so it may be killed at any moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.errors import AccountingError, ConfigError
from pia_batch.evaluation.clips import NOT_ANIMATED
from pia_batch.evaluation.measures import BY_NAME, EvaluationRequest
from pia_batch.evaluation.work import Piece, RunResults, read_table
from pia_batch.journal import layout
from pia_batch.journal.log import to_json, to_parquet
from pia_batch.storage.object_store import Store

_READ_AHEAD = 16
"""Number of pieces, or parts, that are read at a time."""

_QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95}


@dataclass(frozen=True)
class Evaluation:
    """A complete evaluation.

    Attributes:
        evaluation_id: Its id.
        run_id: Run whose results it measures.
        uri: URI of its folder.
        parts: Names of its objects, with their numbers of rows, in the order of the results.
        summary: Content of its summary.json.
    """

    evaluation_id: str
    run_id: str
    uri: str
    parts: tuple[tuple[str, int], ...]
    summary: dict[str, Any]

    @property
    def measures(self) -> list[str]:
        """Names of its measures."""
        return [name for name in BY_NAME if name in self.summary["measures"]]


def publish(
    results: RunResults, evaluation_id: str, request: EvaluationRequest, pieces: Sequence[Piece], about: dict[str, Any]
) -> Evaluation:
    """Write the parts, summary.json and `_SUCCESS.json`.

    Args:
        results: Results that were measured.
        evaluation_id: Name of the folder.
        request: Request of the evaluation.
        pieces: All pieces, each of which is committed.
        about: Further fields of the summary.

    Raises:
        AccountingError: A piece does not have one row for each of its requests.
    """
    store = results.store
    parts = []
    kinds: Counter[str] = Counter()
    for number, (part, _) in enumerate(results.parts):
        mine = [piece for piece in pieces if piece.part == part]
        names = [layout.evaluation_piece(evaluation_id, piece.number) for piece in mine]
        tables = list(store.each(lambda name: read_table(store, name), names, _READ_AHEAD))
        table = pa.concat_tables(tables).combine_chunks()
        wanted = results.read(part, ["request_id", "key"])
        if not table.select(wanted.column_names).equals(wanted):
            msg = (
                f"evaluation {evaluation_id} does not have one row for each request of {part}; delete "
                f"{store.uri_of(layout.evaluation_folder(evaluation_id))} and start it again"
            )
            raise AccountingError(msg)
        name = layout.evaluation_part(evaluation_id, number)
        store.replace(name, to_parquet(table))
        parts.append({"name": name.rpartition("/")[2], "rows": len(table)})
        kinds.update(kind for kind in table["error_kind"].to_pylist() if kind is not None)
    names = [layout.evaluation_part(evaluation_id, number) for number in range(len(parts))]
    summary = {
        "evaluation_id": evaluation_id,
        "run_id": results.run_id,
        "requests": results.num_rows,
        "animations": results.num_rows - kinds[NOT_ANIMATED],
        "errors": dict(sorted(kinds.items())),
        "measures": {name: _figures(store, names, name) for name in request.names},
        "networks": request.content()["networks"],
        "version": request.content()["version"],
        **about,
    }
    store.replace(layout.evaluation_summary(evaluation_id), to_json(summary))
    success = {"evaluation_id": evaluation_id, "run_id": results.run_id, "results": results.digest, "parts": parts}
    success["published_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    store.replace(layout.evaluation_success(evaluation_id), to_json(success))
    return _evaluation(store, success, summary)


def read(store: Store, evaluation_id: str) -> Evaluation | None:
    """Return a complete evaluation, or None if there is none of this id."""
    try:
        success = store.read_json(layout.evaluation_success(evaluation_id), ("evaluation_id", "run_id", "parts"))
        summary = store.read_json(layout.evaluation_summary(evaluation_id), ("measures",))
    except FileNotFoundError:
        return None
    return _evaluation(store, success, summary)


def find(store: Store, evaluation_id: str | None, run_id: str | None = None) -> Evaluation:
    """Return a complete evaluation: of this id, or the newest one, if given of this run.

    Raises:
        ConfigError: There is none.
    """
    if evaluation_id is not None:
        found = read(store, evaluation_id)
        if found is None:
            known = ", ".join(sorted(each.evaluation_id for each in complete(store))) or "none"
            msg = f"--evaluation: {evaluation_id} is not complete in {store.uri}; complete evaluations: {known}"
            raise ConfigError(msg)
        return found
    newest = next((each for each in complete(store) if run_id in (None, each.run_id)), None)
    if newest is None:
        which = "" if run_id is None else f" of run {run_id}"
        msg = f"{store.uri} has no complete evaluation{which}; `pia-batch evaluate` makes one"
        raise ConfigError(msg)
    return newest


def complete(store: Store) -> Iterator[Evaluation]:
    """Yield the complete evaluations of an output, the newest first."""
    found = []
    for item in store.list(layout.EVALUATIONS):
        evaluation_id = layout.evaluation_id(item.name)
        if evaluation_id and item.name == layout.evaluation_success(evaluation_id):
            found.append((item.modified_s or 0.0, evaluation_id))
    evaluations = (read(store, evaluation_id) for _, evaluation_id in sorted(found, reverse=True))
    yield from (each for each in evaluations if each is not None)


def _evaluation(store: Store, success: dict[str, Any], summary: dict[str, Any]) -> Evaluation:
    evaluation_id = success["evaluation_id"]
    folder = layout.evaluation_folder(evaluation_id)
    parts = tuple((f"{folder}/{part['name']}", part["rows"]) for part in success["parts"])
    return Evaluation(evaluation_id, success["run_id"], store.uri_of(folder), parts, summary)


def _figures(store: Store, parts: Sequence[str], name: str) -> dict[str, Any]:
    """Return the figures of one measure over all parts, from that column alone: 8 bytes for each request."""
    columns = store.each(lambda part: read_table(store, part, [name])[name], parts, _READ_AHEAD)
    values = np.concatenate([pc.drop_null(column).to_numpy() for column in columns])
    figures: dict[str, Any] = {"count": len(values), "unit": BY_NAME[name].unit, "better": BY_NAME[name].better}
    if len(values):
        figures |= {"mean": float(values.mean()), "std": float(values.std())}
        figures |= {"min": float(values.min()), "max": float(values.max())}
        figures |= {label: float(np.quantile(values, share)) for label, share in _QUANTILES.items()}
    return figures


def pairs_of_parts(results: RunResults, evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """Yield the parts of the results with the part of the evaluation that has the same requests in the same order."""
    yield from zip((part for part, _ in results.parts), (part for part, _ in evaluation.parts), strict=True)
