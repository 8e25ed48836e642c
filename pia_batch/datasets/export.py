"""Export: hands the animations of an output to others, as a Ray Data job that can be killed and started again.

The plan cuts the rows into shards, always in the same way; a Ray Data task writes one shard. Complete shards are
recorded below the destination, so that a later start of the same export writes the rest. `_SUCCESS.json` is the last
object that is written.
"""

from __future__ import annotations

import json
import logging
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data

from pia_batch.config import Format, PlacementConfig
from pia_batch.datasets.export_formats import PROGRESS, ExportFormat, Finish, ShardTarget, Written
from pia_batch.datasets.export_plan import (
    DEFAULT_SHARD_SIZE,
    ExportPlan,
    Published,
    Selection,
    Shard,
    ShardSize,
    carried_times,
    chosen_columns,
)
from pia_batch.datasets.export_rows import RowReader
from pia_batch.datasets.export_table import FORMATS
from pia_batch.driver import ray_cluster
from pia_batch.driver.job_batches import batches_of
from pia_batch.errors import AccountingError, ConfigError, ObjectExistsError
from pia_batch.journal.log import to_json
from pia_batch.manifest import id_tables
from pia_batch.pipeline.ray_data import configure
from pia_batch.schema.dataset_columns import DatasetColumns, Media
from pia_batch.schema.expressions import RowFilter
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)

TRANSCODED: tuple[Format, ...] = ("mp4", "gif", "webp", "webm")
"""Formats into which animations are transcoded."""

SUCCESS = "_SUCCESS.json"
_OPTIONS = f"{PROGRESS}options.json"


@dataclass(frozen=True)
class ExportSummary:
    """Complete export.

    Attributes:
        uri: Destination.
        format: Name of the format.
        run_id: Run whose results were exported.
        rows: Number of animations.
        num_bytes: Size of their files, in bytes.
        shards: Number of shards.
        written: Number of shards that this start wrote; the others were there.
        unknown: Number of ids of `only` without a succeeded result that `where` takes.
    """

    uri: str
    format: str
    run_id: str
    rows: int
    num_bytes: int
    shards: int
    written: int
    unknown: int

    def payload(self) -> dict[str, Any]:
        """Return the summary as a JSON object."""
        return asdict(self)


def export(  # noqa: PLR0913 - one for each option of the command
    output: str,
    to: str,
    format: str,  # noqa: A002 - the option's name
    *,
    where: str | None = None,
    columns: Sequence[str] | None = None,
    shard_size: str = DEFAULT_SHARD_SIZE,
    transcode: str | None = None,
    only: str | None = None,
    run_id: str | None = None,
    ray_address: str | None = None,
    on_shard: Callable[[int, int], None] = lambda _done, _total: None,
    stop: threading.Event | None = None,
) -> ExportSummary:
    """Write the succeeded animations of an output, with their columns, in a format that others read.

    Killed at any moment and started again, it writes what is left, and the same files. The SHA-256 of each animation is
    compared with its result.

    Args:
        output: URI of the output.
        to: URI of the destination: a folder or prefix without other objects.
        format: A name of FORMATS.
        where: Condition on the columns of the results, such as `motion > 2 and format == 'mp4'`; None: all.
        columns: Columns to write; None: all that say something of a succeeded request.
        shard_size: Largest size of a file: a number of animations, or bytes with a unit, such as `500MB`.
        transcode: Format of the exported animations; None: as they are.
        only: URI of a Parquet, CSV or JSONL table whose column `request_id` names the requests to export; None: all.
        run_id: Run whose results are exported; None: the newest.
        ray_address: Address of a Ray cluster; None: RAY_ADDRESS, or else a Ray of the export's own.
        on_shard: Called with the numbers of complete shards and of all shards.
        stop: Event that stops the export when it is set.

    Raises:
        ConfigError: An option is invalid, no row is left to export, a library is missing, or the destination has other
            objects.
        AccountingError: An animation is missing, or is not the one that was committed.
        StorageError: A store refused or did not answer.
        InterruptedRunError: `stop` was set; start again to continue.
    """
    chosen = FORMATS.get(format)
    if chosen is None:
        msg = f"--format: invalid value (got {format!r}, expected one of {', '.join(FORMATS)})"
        raise ConfigError(msg)
    chosen.require()
    target_format = next((each for each in TRANSCODED if each == transcode), None)
    if transcode is not None and target_format is None:
        msg = f"--transcode: invalid value (got {transcode!r}, expected one of {', '.join(TRANSCODED)})"
        raise ConfigError(msg)
    options = {"where": where, "columns": list(columns) if columns else None, "shard_size": shard_size}
    source, target = Store(output), Store(to)
    _refuse_overlap(source, target)
    ids = id_tables.read(only) if only is not None else None
    condition = RowFilter(where) if where is not None else None
    published = Published.find(source, run_id)
    options |= {
        "format": format,
        "transcode": transcode,
        "only": id_tables.digest_of(ids) if ids is not None else None,
    }
    identity = {"run_id": published.run_id, "digest": published.digest, **options}
    done = _read_json(target, SUCCESS)
    if done is not None:
        _refuse_other(target, done["export"], identity)
        _remove_progress(target)
        return ExportSummary(
            target.uri, format, published.run_id, done["rows"], done["num_bytes"], done["shards"], 0, done["unknown"]
        )
    size = ShardSize.parse(shard_size)
    plan = make_plan(published, condition, columns, ids, size, target_format, texts=chosen.times_as_texts)
    media = chosen.media_of(plan)
    chosen.check(plan)
    _claim(target, identity)
    return _Export(chosen, plan, media, target, identity, ray_address, on_shard, stop or threading.Event()).execute()


def make_plan(
    published: Published,
    where: RowFilter | None,
    columns: Sequence[str] | None,
    only: pa.Array | None,
    size: ShardSize,
    transcode: Format | None,
    *,
    texts: bool = False,
) -> ExportPlan:
    """Select the rows and cut them into shards.

    Raises:
        ConfigError: A column does not exist, or no row is left.
        StorageError: The store refused or did not answer.
    """
    available = DatasetColumns(published.schema)
    names = chosen_columns(available, columns)
    selection = Selection(published, where, only, available, carried_times(available, names) if texts else ())
    shards = tuple(selection.shards(size))
    if not shards:
        reasons = [text for text, given in (("--where", where), ("--only", only)) if given is not None]
        left = f"{' and '.join(reasons)} leave no animation" if reasons else "there is no animation"
        msg = f"{left} to export from run {published.run_id} of {redacted_uri(published.store.uri)}"
        raise ConfigError(msg)
    formats, models = dict(selection.formats.most_common()), dict(selection.models.most_common())
    return ExportPlan(
        published,
        available,
        names,
        transcode,
        shards,
        formats,
        models,
        selection.num_unknown,
        tuple(sorted(selection.far)),
    )


@dataclass(frozen=True)
class _Export:
    """One start of an export."""

    format: ExportFormat
    plan: ExportPlan
    media: Media
    target: Store
    identity: dict[str, Any]
    ray_address: str | None
    on_shard: Callable[[int, int], None]
    stop: threading.Event

    def execute(self) -> ExportSummary:
        reader = RowReader.of(self.plan, posters=self.format.posters)
        written = _recorded(self.target)
        missing = [shard for shard in self.plan.shards if shard.number not in written]
        self.on_shard(len(written), len(self.plan.shards))
        if missing:
            task = WriteShard(self.format, reader, self.target, self.plan.schema, self.media, len(self.plan.shards))
            with ray_cluster.connect(PlacementConfig(ray_address=self.ray_address)):
                for shard in run_shards(task, missing, self.stop):
                    written[shard.number] = shard
                    self.on_shard(len(written), len(self.plan.shards))
        return self._finish(reader, [written[shard.number] for shard in self.plan.shards], len(missing))

    def _finish(self, reader: RowReader, written: list[Written], num_new: int) -> ExportSummary:
        published = self.plan.published
        if Published.find(published.store, published.run_id).digest != published.digest:
            msg = f"the results of run {published.run_id} were published again meanwhile; export to another folder"
            raise AccountingError(msg)
        with tempfile.TemporaryDirectory(prefix="pia-batch-export-") as folder:
            self.format.finish(Finish(self.target, self.plan, reader, written, self.media, Path(folder)))
        for unfinished in list(self.target.staged("")):  # left by workers that were killed
            self.target.delete(unfinished.name)
        rows, num_bytes = self.plan.num_rows, sum(shard.num_bytes for shard in written)
        files = [
            {"name": shard.name, "rows": shard.rows, "num_bytes": shard.num_bytes} for shard in written if shard.name
        ]
        state = {"export": self.identity, "rows": rows, "num_bytes": num_bytes, "shards": len(written)}
        state |= {"unknown": self.plan.num_unknown, "files": files}
        self.target.replace(SUCCESS, to_json(state))
        _remove_progress(self.target)
        return ExportSummary(
            uri=self.target.uri,
            format=self.format.name,
            run_id=self.plan.published.run_id,
            rows=rows,
            num_bytes=num_bytes,
            shards=len(written),
            written=num_new,
            unknown=self.plan.num_unknown,
        )


@dataclass(frozen=True)
class WriteShard:
    """Task of one worker: writes a shard, then the record that it is complete. It can be pickled."""

    format: ExportFormat
    reader: RowReader
    target: Store
    schema: pa.Schema
    media: Media
    num_shards: int

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the shards of a batch and return their records.

        Args:
            batch: Column `shard`, pickled Shards.
        """
        written = [self.write(pickle.loads(item.as_py())) for item in batch["shard"]]  # noqa: S301 - the driver's own
        return pa.table({"written": [json.dumps(asdict(each)) for each in written]})

    def write(self, shard: Shard) -> Written:
        """Write one shard."""
        name = self.format.object_name(shard.number, self.num_shards) if self.format.object_name else ""
        with tempfile.TemporaryDirectory(prefix="pia-batch-export-") as folder:
            target = ShardTarget(self.target, shard, name, self.schema, self.media, Path(folder))
            num_bytes = self.format.write(self.reader.batches(shard), target)
        written = Written(shard.number, name, shard.num_rows, num_bytes)
        self.target.replace(f"{PROGRESS}{shard.number:05d}.json", to_json(asdict(written)))
        return written


def run_shards(task: WriteShard, shards: Sequence[Shard], stop: threading.Event) -> Iterable[Written]:
    """Write shards by Ray Data, one task for each, and yield their records as they are complete.

    Raises:
        PiaBatchError: A task failed; its own error, without Ray's wrappers.
        InterruptedRunError: `stop` was set, Ray has ended or lost a worker for good, or a store failed.
    """
    configure()
    items = [pa.table({"shard": pa.array([pickle.dumps(shard)], pa.large_binary())}) for shard in shards]
    dataset = ray.data.from_arrow(items).map_batches(task, batch_format="pyarrow", batch_size=None, num_cpus=1)
    for batch in batches_of(dataset, stop, "the export was stopped; start it again to continue"):
        for text in batch["written"].to_pylist():
            yield Written(**json.loads(text))


def _refuse_overlap(source: Store, target: Store) -> None:
    if f"{target.uri}/".startswith(f"{source.uri}/") or f"{source.uri}/".startswith(f"{target.uri}/"):
        uris = redacted_uri(target.uri), redacted_uri(source.uri)
        msg = f"--to: {uris[0]} overlaps with the output {uris[1]}; choose another folder"
        raise ConfigError(msg)


def _claim(target: Store, identity: dict[str, Any]) -> None:
    """Record the options of the export at an empty destination, or compare them with those of an unfinished one."""
    found = _read_json(target, _OPTIONS)
    if found is None:
        other = next(iter(target.list("")), None)
        if other is not None:
            shown = redacted_uri(target.uri)
            msg = f"--to: {shown} is not empty: it has {other.name}; choose another folder, or delete it"
            raise ConfigError(msg)
        try:
            target.create(_OPTIONS, to_json(identity))
        except ObjectExistsError:
            found = _read_json(target, _OPTIONS)
    if found is not None:
        _refuse_other(target, found, identity)


def _refuse_other(target: Store, found: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse a destination that has an export with other options or of other results."""
    different = [name for name in identity if found.get(name) != identity[name]]
    if different:
        pairs = ", ".join(f"{name} is {found.get(name)!r} there and {identity[name]!r} now" for name in different)
        msg = f"--to: {redacted_uri(target.uri)} has another export: {pairs}; choose another folder, or delete that one"
        raise ConfigError(msg)


def _recorded(target: Store) -> dict[int, Written]:
    """Return the shards that are recorded as complete, by number."""
    names = sorted(item.name for item in target.list(PROGRESS) if item.name.endswith(".json") and item.name != _OPTIONS)
    return {each.number: each for each in (Written(**json.loads(data)) for data in target.read_all(names))}


def _remove_progress(target: Store) -> None:
    for item in list(target.list(PROGRESS)):
        target.delete(item.name)


def _read_json(target: Store, name: str) -> dict[str, Any] | None:
    try:
        return target.read_json(name)
    except FileNotFoundError:
        return None
