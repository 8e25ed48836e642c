"""Measures for the page of a run: finds the evaluation that `pia-batch report` shows, and reads its rows."""

from __future__ import annotations

import pyarrow as pa

from pia_batch.errors import ConfigError
from pia_batch.evaluation import publication
from pia_batch.evaluation.measures import BY_NAME
from pia_batch.evaluation.work import RunResults, read_table
from pia_batch.journal.results import read_latest
from pia_batch.report import Measured, ShownMeasure
from pia_batch.storage.object_store import Store


def measured(store: Store, evaluation_id: str | None = None, run_id: str | None = None) -> Measured | None:
    """Return the measures of an evaluation: of this id, or the newest one of a run; None: that run has none.

    Args:
        store: Output.
        evaluation_id: Complete evaluation; None: the newest of the run.
        run_id: Run of the page; None: that of the evaluation, or the newest.

    Raises:
        ConfigError: There is no such evaluation, or it measures another run.
        StorageError: The store refused or did not answer.
    """
    if evaluation_id is not None:
        found = publication.find(store, evaluation_id)
        if run_id not in (None, found.run_id):
            msg = (
                f"--evaluation, --run-id: evaluation {evaluation_id} measures another run (got {run_id}, expected "
                f"{found.run_id}); leave out one of them"
            )
            raise ConfigError(msg)
    else:
        newest = read_latest(store) if run_id is None else {"run_id": run_id}
        shown = newest and str(newest["run_id"])
        candidate = next((each for each in publication.complete(store) if each.run_id == shown), None)
        if candidate is None:
            return None
        found = candidate
    parts = dict(publication.pairs_of_parts(RunResults.open(store, found.run_id), found))
    names = [name for name in found.measures if found.summary["measures"][name]["count"]]

    def read(part: str) -> pa.Table:
        return read_table(store, parts[part], ["request_id", "key", *names, "error_kind", "error"])

    about = [BY_NAME[name] for name in names]
    shown_measures = tuple(
        ShownMeasure(each.name, each.unit, each.better, each.formula.replace("\\|", "|")) for each in about
    )
    return Measured(found.evaluation_id, found.run_id, shown_measures, read)
