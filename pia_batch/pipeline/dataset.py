"""Requests in a Dataset of one's own, animated by the stages of a run: without manifest, journal or lease."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pia_batch.config import RunConfig
from pia_batch.errors import ManifestError
from pia_batch.journal import layout
from pia_batch.manifest import reader, unify
from pia_batch.pipeline import chain, stages
from pia_batch.pipeline.attempts import SoloAttempt
from pia_batch.pipeline.attempts_actor import RemoteAttemptControl, start_attempt_tracker
from pia_batch.pipeline.chain import LoadEngines
from pia_batch.planning import plan
from pia_batch.schema.columns import FAILED, RESULT, Row
from pia_batch.storage import object_store
from pia_batch.storage.object_store import Store

ANIMATION_BYTES = "animation_bytes"
"""The column of a result that holds the file itself, where nothing is stored."""


def animate(
    requests: ray.data.Dataset,
    config: RunConfig,
    *,
    store: bool = True,
    load_engines: LoadEngines | None = None,
) -> ray.data.Dataset:
    """One result row for each row of `requests`, lazily, with the row's own columns.

    A request that cannot be animated is a row too, whose `status` is `failed`, with `error_kind` and `error`; so is one
    that kills, hangs or starves its worker, after `limits.max_attempts`, and its neighbours are drawn. Rows come in
    another order than they went in.

    This is the middle of `run`, and what stands around it there is missing here. Nothing is journalled: what is
    executed again is drawn again, and a driver that dies loses what it had not written yet. Identical rows are each
    drawn, and a contradicting pair is not refused; no lease keeps two drivers apart, nobody is told of the end, and
    neither a budget nor `limits.max_failed` or `limits.max_crashes` stops anything.

    Animations are stored under the names that `run` would give them, and never overwritten: a second execution finds
    them there. Give them an output of their own all the same, for `pia-batch gc` removes from a run's output what its
    journal does not know.

    Args:
        requests: its columns are those of a manifest (docs/manifest.md): `request_id`, `image` or `image_bytes`,
            `prompt`, and any settings. Any other column is passed on, unless it bears the name of a result's.
        config: of a run. `manifest` is not read: its folder is where relative images start from, and where images may
            come from besides `images.allow`. `output` is where animations go, if they are stored. The engines are a
            pool of actors as `placement` has it, which Ray starts when the rows are asked for.
        store: whether animations are stored below `config.output`, with their URI in `animation_uri`. Otherwise
            nothing is written, and the files are in a further column, `animation_bytes` (large_binary; null where
            `status` is `failed`).
        load_engines: what gives each worker its engines; None: those of the config's models.

    Returns:
        The columns of `records.RESULT` (docs/results.md), `attempts` counting those of this execution and `run_id`
        that of the config or null; then `animation_bytes` if it is asked for; then the columns passed on.

    Raises:
        ConfigError: a model cannot be found, or a placeholder of the config stands for nothing.
        ManifestError: a required column is missing, or one bears the name of a result's. Where Ray does not know the
            columns yet, it is raised by the execution, inside of Ray's own error; so is what keeps an engine from
            starting.
        StorageError: `config.output` cannot be written, or its store ignores conditional creation.
    """
    config = config.filled()
    config = config.model_copy(
        update={"output": object_store.absolute(config.output)}
    )  # workers have folders of their own
    schema = requests.schema(fetch_if_missing=False)
    if schema is not None:
        unify.check_columns(schema.names, stages.DATASET)
        _check_place_of_files(schema.names, store=store)
    engine_ids = plan.engine_ids_of(config)
    if store:
        Store(config.output).check(layout.CREATE_ONLY_PROBE)
    if not ray.is_initialized():  # as Ray Data itself would, a moment later
        ray.init()
    folder = _folder(config.manifest)
    judged = requests.map_batches(stages.Judge(config, engine_ids), **chain.blocks(chain.VALIDATE_CPUS))
    arranged = judged.repartition(target_num_rows_per_block=chain.SMALL_WINDOW, strict=True).map_batches(
        stages.AroundRejected(stages.Arrange(config.images, folder)), **chain.blocks(chain.ARRANGE_CPUS)
    )
    arguments = {
        "load_engines": load_engines or chain.engine_loader(config),
        "engine_ids": engine_ids,
        "config": config,
        "run_id": config.run_id or "",
        "control": _Redrawing(start_attempt_tracker(config.limits.max_attempts).tracker),
        "store": store,
    }
    fetch = stages.AroundRejected(stages.FetchImages(config.images, folder))
    return chain.draw_in_pool(arranged, config, fetch, AnimateRows, arguments)


def _check_place_of_files(names: list[str], *, store: bool) -> None:
    if not store and ANIMATION_BYTES in names:
        msg = f"{stages.DATASET}: column {ANIMATION_BYTES!r} has the name of a result column; rename it"
        raise ManifestError(msg)


def _folder(uri: str) -> str:
    """The folder that a manifest names, or that its file lies in, without a look at it."""
    uri = object_store.absolute(uri).rstrip("/")
    return uri.rsplit("/", 1)[0] if PurePosixPath(uri).suffix.lower() in reader.EXTENSIONS else uri


class _Redrawing(RemoteAttemptControl):
    """Has a request drawn again that was finished before its worker died: its result died with it."""

    def begin_alone(self, key: str) -> SoloAttempt | None:
        """As `AttemptTracker.begin_alone`, but no outcome is at hand."""
        turn = super().begin_alone(key)
        return turn if turn is None or turn.outcome is None else SoloAttempt(turn.attempt)


class AnimateRows(chain.Animate):
    """`worker.Animate` that hands the results on instead of committing them. Takes the rows of `stages.Judge`.

    Args:
        store: whether animations go below the config's output, or with their results.
        arguments: of `pipeline.Animate`.
    """

    def __init__(self, *, store: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._journal = self._results = _Results()
        self._held = None if store else _Held()
        if self._held is not None:
            self._store = self._held

    def __call__(self, requests: pa.Table) -> pa.Table:
        """A result for each of `requests`."""
        _check_place_of_files(requests.column_names, store=self._held is None)
        sound, rejected = stages.parted(requests)
        super().__call__(sound.drop_columns([stages.ERROR_KIND, stages.ERROR]))
        return pa.concat_tables([*self._results.take(), self._of_rejected(rejected)])

    def _of_rejected(self, requests: pa.Table) -> pa.Table:
        """The results of what no engine has to see."""
        always = {"status": FAILED, "attempts": 0, "run_id": self._run_id or None, "finished_at": datetime.now(UTC)}
        results = [
            {"key": row["key"], "error_kind": row[stages.ERROR_KIND], "error": row[stages.ERROR]} | always
            for row in requests.select(["key", stages.ERROR_KIND, stages.ERROR]).to_pylist()
        ]
        return self._table(requests.drop_columns([stages.ERROR_KIND, stages.ERROR]), results)

    def _commit(self, row: Row, clip: Any) -> Row:
        result = super()._commit(row | {"key": stages.content_key(row["key"])}, clip)
        held = None if self._held is None else self._held.take()
        return result | {"key": row["key"], "run_id": result["run_id"] or None, ANIMATION_BYTES: held}

    def _table(self, requests: pa.Table, results: list[Row]) -> pa.Table:
        files = pa.array([result.pop(ANIMATION_BYTES, None) for result in results], pa.large_binary())
        named = [result | {"key": stages.content_key(result["key"])} for result in results]
        table = super()._table(requests, named)
        return table if self._held is None else table.add_column(len(RESULT), ANIMATION_BYTES, files)


class _Results:
    """`worker.Commits` of results that go on through the Dataset: those of each thread's own call."""

    def __init__(self) -> None:
        self._mine = threading.local()

    def append(self, results: pa.Table) -> None:
        """Keep them until they are taken."""
        self._mine.tables = [*getattr(self._mine, "tables", []), results]

    def take(self) -> list[pa.Table]:
        """What was appended by this thread, once."""
        tables: list[pa.Table] = getattr(self._mine, "tables", [])
        self._mine.tables = []
        return tables


class _Held:
    """`worker.Objects` of animations that go on with their results: the last one of each thread."""

    def __init__(self) -> None:
        self._mine = threading.local()

    def create(self, name: str, data: bytes) -> None:  # noqa: ARG002 - as worker.Objects has it
        """Keep it until it is taken."""
        self._mine.data = data

    def read(self, name: str) -> bytes:
        """Nothing: `create` never finds anything there."""
        raise AssertionError(name)

    def uri_of(self, name: str) -> None:
        """It is nowhere yet."""

    def take(self) -> bytes | None:
        """What was kept by this thread, once."""
        data, self._mine.data = getattr(self._mine, "data", None), None
        return data
