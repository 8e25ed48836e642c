"""Ray actor that holds an `Evaluator`: measures pieces of an evaluation and commits each of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from pia_batch.errors import ObjectExistsError
from pia_batch.evaluation.clips import NOT_ANIMATED
from pia_batch.evaluation.evaluator import Evaluator
from pia_batch.journal import layout
from pia_batch.journal.log import to_parquet
from pia_batch.pipeline import worker_errors
from pia_batch.pipeline.attempts import AttemptControl, SoloAttempt
from pia_batch.pipeline.watchdog import Watchdog
from pia_batch.schema.columns import SUCCEEDED
from pia_batch.storage.object_store import Store

PIECE = pa.schema([("number", pa.int64()), ("rows", pa.large_binary())])
"""A piece on its way to a worker: its number, and its results as an Arrow stream."""

MEASURED = pa.schema([("number", pa.int64()), ("rows", pa.int64()), ("frames", pa.int64()), ("errors", pa.int64())])
"""A piece that is committed: its number, and its numbers of rows, frames and rows with an error."""


class EvaluateActor:
    """Holder of an `Evaluator` in a worker of Ray. An error in its start is raised, whole, by the first call.

    A worker that dies is replaced by Ray, and its pieces come again. Then their clips are measured one at a time, so
    that a clip which ends its worker every time becomes a row with the kind `worker_crash`. A worker that exceeds the
    time limit of its clips ends itself, and a clip that exceeds it every time is a row with the kind `timeout`.

    Args:
        driver_version: Version of this package on the driver.
        store: Output.
        evaluation_id: Evaluation.
        control: Counter of the attempts, for pieces and for clips.
        timeout_s: Time limit for each clip, in seconds; a piece has that of its clips together.
        exit_process: Function that ends this process.
        arguments: Arguments of `Evaluator`.
    """

    def __init__(
        self,
        driver_version: str,
        store: Store,
        evaluation_id: str,
        control: AttemptControl,
        timeout_s: float,
        exit_process: Callable[[], None] = lambda: os._exit(1),
        **arguments: Any,
    ) -> None:
        self._store, self._id, self._control, self._timeout_s = store, evaluation_id, control, timeout_s
        self._watchdog = Watchdog(control.give_up, exit_process)
        self._started: Evaluator | None = None
        self._start_error: Exception | None = None
        try:
            worker_errors.show_log()
            worker_errors.check_version(driver_version)
            self._started = Evaluator(**arguments)
        except Exception as err:  # noqa: BLE001 - every library has its own classes for a device that it cannot use
            self._start_error = worker_errors.explain(err)

    @property
    def _evaluator(self) -> Evaluator:
        if self._started is None:
            raise self._start_error or AssertionError
        return self._started

    def __call__(self, pieces: pa.Table) -> pa.Table:
        """Measure and commit pieces, and return rows of MEASURED."""
        done = [
            self._measure(piece["number"], pa.ipc.open_stream(piece["rows"]).read_all()) for piece in pieces.to_pylist()
        ]
        return pa.Table.from_pylist(done, schema=MEASURED)

    def _measure(self, number: int, results: pa.Table) -> dict[str, int]:
        with _attempt(self._control, f"piece {number}") as attempt:
            rows = self._watched(results, f"piece {number}") if attempt == 1 else self._one_by_one(results)
            with suppress(ObjectExistsError):  # an earlier attempt was faster, or another process; its rows count
                self._store.create(layout.evaluation_piece(self._id, number), to_parquet(rows))
        kinds = Counter(rows["error_kind"].to_pylist())
        frames = sum(value or 0 for value in results["num_frames"].to_pylist())
        return {
            "number": number,
            "rows": len(rows),
            "frames": frames,
            "errors": len(rows) - kinds[None] - kinds[NOT_ANIMATED],
        }

    def _watched(self, results: pa.Table, key: str) -> pa.Table:
        """Measure rows within their time limit."""
        evaluator = self._evaluator
        with self._watchdog.watch([key], self._timeout_s * len(results)):
            return evaluator(results)

    def _one_by_one(self, results: pa.Table) -> pa.Table:
        """Measure the rows of a piece whose worker has died, each for itself."""
        rows = []
        for at, key in enumerate(results["key"].to_pylist()):
            one = results.slice(at, 1)
            self._control.begin([key])
            solo = self._control.begin_alone(key)
            if solo is not None and solo.died_of is not None:
                rows.append(self._evaluator.failed(one, solo.died_of, self._reason(solo)))
            else:
                rows.append(self._watched(one, key))
            self._control.end([{"key": key, "status": SUCCEEDED, "animation_uri": None}])
        return pa.concat_tables(rows)

    def _reason(self, solo: SoloAttempt) -> str:
        if solo.died_of == "timeout":
            return (
                f"measuring this clip took over {self._timeout_s:g} s, {solo.attempt - 1} times; raise --clip-timeout"
            )
        return f"the worker died {solo.attempt - 1} times while it measured this clip; see its log"


@contextmanager
def _attempt(control: AttemptControl, key: str) -> Iterator[int]:
    """Count an attempt at a piece, which ends with the block unless its worker dies; yield its number."""
    attempts = control.begin([key])
    yield attempts[0] if attempts else 1
    control.end([{"key": key, "status": SUCCEEDED, "animation_uri": None}])


def piece_row(number: int, results: pa.Table) -> dict[str, Any]:
    """Return a piece as a row of PIECE."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, results.schema) as stream:
        stream.write_table(results)
    return {"number": number, "rows": sink.getvalue().to_pybytes()}
