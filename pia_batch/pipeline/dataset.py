"""`pia_batch.animate`: the stages of a run over a user's own Dataset, without manifest, journal or lease."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError, ManifestError, ObjectExistsError, message_of
from pia_batch.journal import layout
from pia_batch.manifest import formats, unify
from pia_batch.manifest.blocklist import with_blocklist
from pia_batch.manifest.column_map import ColumnMap
from pia_batch.pipeline import batching, ray_data, stages
from pia_batch.pipeline.actor import AnimateActor
from pia_batch.pipeline.attempts_actor import start_attempt_tracker
from pia_batch.pipeline.chain import fetched_and_animated
from pia_batch.pipeline.committer import results_of
from pia_batch.pipeline.engine_loader import EngineLoader, LoadEngines
from pia_batch.planning.model_limits import limits_of
from pia_batch.planning.plan import engine_ids_of
from pia_batch.schema.columns import RESULT
from pia_batch.storage import store_uris
from pia_batch.storage.object_store import Store
from pia_batch.weights.upscaler_files import with_upscaler

ANIMATION_BYTES, POSTER_BYTES = "animation_bytes", "poster_bytes"
"""Columns of a result that hold the files themselves, where nothing is stored."""


def animate(
    requests: ray.data.Dataset,
    config: RunConfig,
    *,
    store: bool = True,
    load_engines: LoadEngines | None = None,
) -> ray.data.Dataset:
    """Return one result row for each row of `requests`, lazily, with the row's own columns.

    A request that cannot be animated is a row too, whose `status` is `failed`, with `error_kind` and `error`; so is one
    that kills, hangs or starves its worker, after `limits.max_attempts`, and its neighbours are animated. Rows come in
    another order than they went in.

    This is the middle of `run`, without its surroundings. Nothing is journalled: what is executed again is generated
    again, and a driver that dies loses what it had not written yet. Identical rows are each animated, and a
    contradicting pair is not refused. No lease separates two drivers, no notification is sent at the end, and neither a
    budget nor `limits.max_failed` or `limits.max_crashes` stops anything.

    Animations are stored under the names that `run` would give them, and never overwritten: a second execution finds
    them there. Give them an output of their own all the same, because `pia-batch gc` removes from a run's output what
    its journal does not list.

    Args:
        requests: Dataset with the columns of a manifest (docs/manifest.md): `request_id`, `image` or `image_bytes`,
            `prompt`, and any settings, under these names or those of `config.columns`. Any other column is passed on,
            unless it has the name of a result's.
        config: Config of a run. `manifest` is not read: its folder is where relative images start from, and where
            images may come from besides `images.allow`. `output` is where animations are stored. The engines are a pool
            of actors according to `placement`, which Ray starts when the rows are consumed.
        store: Store animations under `config.output`, with their URI in `animation_uri`. Otherwise nothing is written,
            and the files are in further columns, `animation_bytes` and `poster_bytes` (large_binary; null where
            `status` is `failed`, and where a row has no poster).
        load_engines: Function that gives each worker its engines; None: those of the config's models.

    Returns:
        Dataset with the columns of `columns.RESULT` (docs/results.md), where `attempts` counts those of this execution
        and `run_id` is that of the config or null; then `animation_bytes` and `poster_bytes` if they are asked for;
        then the columns passed on.

    Raises:
        ConfigError: A model cannot be found, or a placeholder of the config has no value.
        ManifestError: A required column is missing, or one has the name of a result's, or a type that Parquet cannot
            store, such as a union or a struct without fields. Where Ray does not know the columns yet, the beginning of
            `requests` is computed for them, once more than the rows need. The execution raises, inside of Ray's own
            error, what only later blocks show, and whatever prevents an engine from starting.
        StorageError: `config.output` cannot be written, or its store ignores conditional creation.
    """
    config = with_upscaler(with_blocklist(config.filled()))
    if config.request_id_from == "location":
        msg = "request_id_from: location: rows of a Dataset are in no file; set content, or name a column"
        raise ConfigError(msg)
    config = config.model_copy(
        update={"output": store_uris.absolute(config.output)}
    )  # workers have working directories of their own
    if not ray.is_initialized():  # as Ray Data itself would, a moment later
        ray.init()
    schema = _schema(requests)
    if schema is not None:
        _check(schema, config, store=store)
    engine_ids = engine_ids_of(config)
    if store:
        Store(config.output).check(layout.CREATE_ONLY_PROBE)
    folder = _folder(config.manifest)
    validate = stages.Validate(config, engine_ids, limits_of(config), keep_rejected=True)
    original = config.original_models
    arrange = stages.Arrange(config.images, folder, original)
    fetch = stages.FetchImages(config.images, folder, original)
    arguments = {
        "load_engines": load_engines or EngineLoader.of(config),
        "engine_ids": engine_ids,
        "config": config,
        "run_id": config.run_id,
        "control": start_attempt_tracker(config.limits.max_attempts, returns_outcomes=False),
        "store": store,
    }
    requests = requests.map_batches(validate, **ray_data.blocks(ray_data.VALIDATE_CPUS))
    requests = requests.repartition(target_num_rows_per_block=batching.SMALL_WINDOW, strict=True)
    requests = requests.map_batches(arrange, **ray_data.blocks(ray_data.ARRANGE_CPUS))
    return fetched_and_animated(requests, config, fetch, ResultsActor, arguments)


def _schema(requests: ray.data.Dataset) -> ray.data.Schema | None:
    """Return the columns of a Dataset, or None if it has no blocks.

    Raises:
        ManifestError: A column has one type in some blocks and another in others.
    """
    try:
        return requests.schema()
    except (pa.ArrowTypeError, pa.ArrowInvalid) as err:
        msg = f"{stages.DATASET}: its blocks disagree: {message_of(err)}; write each column with one type"
        raise ManifestError(msg) from None


def _check(schema: ray.data.Schema, config: RunConfig, *, store: bool) -> None:
    """Check the columns of a Dataset, as far as they are known before its rows.

    Raises:
        ManifestError: They cannot be those of requests.
    """
    if isinstance(schema.base_schema, pa.Schema):
        names = stages.checked_layout(schema.base_schema, ColumnMap.of(config)).schema.names
        _check_bytes_column(names, store=store)
        return
    _refuse_types_of_pandas(schema)
    if not config.columns:
        unify.check_columns(schema.names, stages.DATASET, config.request_id_from)
        _check_bytes_column(schema.names, store=store)


def _refuse_types_of_pandas(schema: ray.data.Schema) -> None:
    """Refuse columns of types that numpy and pandas have and Arrow has not: sparse, complex, of foreign byte order.

    Raises:
        ManifestError: There is one; the message names the column and the remedy.
    """
    import pandas as pd  # type: ignore[import-untyped] # noqa: PLC0415 - a Dataset of pandas has loaded it

    for name, kind in zip(schema.names, schema.base_schema.types, strict=True):
        if not isinstance(kind, np.dtype | pd.SparseDtype | pd.CategoricalDtype):
            continue
        try:
            pa.array(pd.Series([], dtype=kind), from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError) as err:
            how = ".sparse.to_dense()" if isinstance(kind, pd.SparseDtype) else ".astype(str)"
            msg = (
                f"{stages.DATASET}: column {name!r} has the type {kind} of pandas, which Arrow lacks "
                f"({message_of(err)}); drop the column, or convert it, such as by {how}"
            )
            raise ManifestError(msg) from None


def _check_bytes_column(names: list[str], *, store: bool) -> None:
    for name in (ANIMATION_BYTES, POSTER_BYTES):
        if not store and name in names:
            msg = f"{stages.DATASET}: column {name!r} has the name of a result column; rename it"
            raise ManifestError(msg)


def _folder(uri: str) -> str:
    """Return the folder that a manifest names, or that its file is in, without reading it."""
    uri = store_uris.absolute(uri).rstrip("/")
    return uri.rsplit("/", 1)[0] if formats.names_file(uri) else uri


class ResultsActor:
    """Actor that returns the results of a batch instead of committing them.

    Args:
        store: Store animations under the config's output; otherwise return them with their results.
        config: Config of the run.
        arguments: Further arguments of `AnimateActor`.
    """

    def __init__(self, *, store: bool, config: RunConfig, **arguments: Any) -> None:
        self._files = None if store else HeldFiles()
        self._results = CollectedResults()
        objects = self._files or Store(config.output, layout.CREATE_ONLY_PROBE)
        self._actor = AnimateActor(config=config, objects=objects, commits=self._results, **arguments)

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Return a result for each of `requests`."""
        _check_bytes_column(requests.column_names, store=self._files is None)
        self._actor(requests)
        results = pa.concat_tables(self._results.take() or [results_of(requests, [])])
        return results if self._files is None else _with_files(results, self._files.take())


def _with_files(results: pa.Table, files: dict[str, bytes]) -> pa.Table:
    """Move the files of the results, named by `animation_uri` and `poster_uri`, into columns of their own."""
    for number, (uri, column) in enumerate([("animation_uri", ANIMATION_BYTES), ("poster_uri", POSTER_BYTES)]):
        data = [None if name is None else files[name] for name in results[uri].to_pylist()]
        at = results.column_names.index(uri)
        results = results.set_column(at, RESULT.field(uri), pa.nulls(len(results), pa.string()))
        results = results.add_column(len(RESULT) + number, column, pa.array(data, pa.large_binary()))
    return results


class CollectedResults:
    """Commit log that keeps results until they are taken, those of each thread apart."""

    def __init__(self) -> None:
        self._mine = threading.local()

    def append(self, results: pa.Table) -> None:
        """Keep these rows."""
        self._mine.tables = [*getattr(self._mine, "tables", []), results]

    def take(self) -> list[pa.Table]:
        """Return what this thread has appended, and forget it."""
        tables: list[pa.Table] = getattr(self._mine, "tables", [])
        self._mine.tables = []
        return tables


class HeldFiles:
    """Object store that holds animations in memory until they are taken, those of each thread apart."""

    def __init__(self) -> None:
        self._mine = threading.local()

    def create(self, name: str, data: bytes) -> None:
        """Hold `data`, or raise ObjectExistsError: identical rows of a batch share one file."""
        files = self._files()
        if name in files:
            raise ObjectExistsError(name)
        files[name] = data

    def read(self, name: str) -> bytes:
        """Return the held bytes."""
        return self._files()[name]

    def uri_of(self, name: str) -> str:
        """Return the name, by which `take` gives the file."""
        return name

    def take(self) -> dict[str, bytes]:
        """Return the files of this thread by name, and forget them."""
        files, self._mine.files = self._files(), {}
        return files

    def _files(self) -> dict[str, bytes]:
        if not hasattr(self._mine, "files"):
            self._mine.files = {}
        files: dict[str, bytes] = self._mine.files
        return files
