"""`prepare`: makes a Parquet manifest of a dataset, as a Ray Data job that can be killed and started again."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray.data

import pia_batch
from pia_batch.config import PlacementConfig
from pia_batch.datasets import lakes
from pia_batch.datasets.dataset_source import DATASET, DatasetSource
from pia_batch.datasets.kinds import kind_of
from pia_batch.datasets.part_files import (
    PIECES,
    PLAN,
    REJECTED,
    SHUFFLED,
    SUCCESS,
    as_json,
    create_same,
    read_rejects,
    record_name,
    remove_unrecorded,
    write_rejects,
)
from pia_batch.datasets.prepare_job import PART, PrepareJob
from pia_batch.datasets.prepare_options import PrepareOptions
from pia_batch.datasets.request_table import RequestTable
from pia_batch.datasets.sources import Kind, Place, Source, changed
from pia_batch.datasets.variations import Variations
from pia_batch.driver import ray_cluster
from pia_batch.driver.job_batches import batches_of
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest import unify
from pia_batch.pipeline import ray_data
from pia_batch.storage import store_uris
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri

_PIECE_CPUS = 1.0
"""CPUs of a task that prepares one piece."""

_MOST_PARTITIONS = 200
"""Largest number of partitions of Ray's shuffle; each holds one or more groups of files."""

_MOST_BLOCKS = 2000
"""Largest number of Ray's tasks; of more pieces than these, each task prepares several."""


@dataclass(frozen=True)
class PrepareSummary:
    """Outcome of `prepare`.

    Attributes:
        manifest: URI of the manifest.
        kind: Kind of the source.
        requests: Number of rows of the manifest, variations included.
        files: Number of files of the manifest.
        num_bytes: Size of these files, in bytes.
        counts: Numbers of the source's rows: `read`, `failed_in_source`, `filtered`, `not_sampled`, `beyond_limit`,
            `dropped_missing`, `rejected`; without `requests`, these are all rows that did not become requests.
        rejects_uri: URI of a Parquet file with the rejected rows and the reasons; None if there are none.
        notes: Remarks for the operator.
    """

    manifest: str
    kind: str
    requests: int
    files: int
    num_bytes: int
    counts: Mapping[str, int]
    rejects_uri: str | None = None
    notes: Sequence[str] = ()


def prepare(
    source: str | os.PathLike[str] | ray.data.Dataset,
    to: str | os.PathLike[str],
    *,
    address: str | None = None,
    stop: threading.Event | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
    **options: Any,
) -> PrepareSummary:
    """Make a Parquet manifest of a dataset: a folder that `run` and `plan` take.

    The same call writes the same bytes. A call that was interrupted, by whatever, is finished by the same call.

    Args:
        source: URI or path of a folder of images, of WebDataset shards, of img2dataset's output, of Parquet, JSONL or
            CSV files, or of a Lance, Delta or Iceberg table; `hf://datasets/NAME[@REVISION]`; or a Ray Dataset, whose
            rows must come in the same order each time.
        to: URI or path of a folder that is empty or does not exist.
        address: Address of a Ray cluster; None: RAY_ADDRESS, or a Ray of its own on this machine.
        stop: Event that ends the call early.
        on_progress: Called with the number of finished pieces of the source, and of all.
        options: Fields of `PrepareOptions`: `kind`, `version`, `images`, `columns`, `text`, `prompt`,
            `negative_prompt`, `on_missing`, `request_id_from`, `vary`, `where`, `limit`, `sample`, `shuffle`, `probe`,
            `allow`.
            The options of the command `prepare` describe them.

    Raises:
        ConfigError: An option, or a combination of options and the source, cannot work.
        ManifestError: The source cannot be read, has changed meanwhile, or has a value that cannot be a request's; or
            the folder `to` belongs to something else.
        InterruptedRunError: `stop` was set, or a store failed under way; start again to continue.
        StorageError: The folder `to` cannot be written; raised before Ray starts.
    """
    try:
        chosen = PrepareOptions(**options)
    except TypeError as err:
        raise ConfigError(f"prepare: {err}") from None
    if not isinstance(source, str | os.PathLike):
        with _connected(address):
            return _Preparation(source, to, chosen, stop, on_progress).run(nullcontext())
    return _Preparation(os.fspath(source), to, chosen, stop, on_progress).run(_connected(address))


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connect to Ray, with Ray Data set up as in a run."""
    with ray_cluster.connect(PlacementConfig(ray_address=address)):
        ray_data.configure()
        yield


class _Preparation:
    """One call of `prepare`."""

    def __init__(
        self,
        source: str | ray.data.Dataset,
        to: str | os.PathLike[str],
        options: PrepareOptions,
        stop: threading.Event | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._given, self._options = source, options
        self._store = Store(os.fspath(to))
        self._stop, self._on_progress = stop or threading.Event(), on_progress
        self._notes: list[str] = []
        if isinstance(source, str) and not source.startswith("iceberg://"):
            uri = store_uris.absolute(source).rstrip("/")
            if f"{self._store.uri}/".startswith(f"{uri}/"):
                raise ConfigError(
                    f"--to {redacted_uri(self._store.uri)} is inside of the source, and would be read as a part of "
                    "it; choose a folder next to it"
                )

    def run(self, connected: AbstractContextManager[None]) -> PrepareSummary:
        """Prepare what is not prepared yet, and publish.

        Args:
            connected: Connection to Ray, which is made only if something is left to do.
        """
        variations = Variations.parse(self._options.vary)
        self._options.for_requests(DATASET)  # an error in a template is found before the source is read
        kind, source, base_uri = self._open()
        make = RequestTable(self._options.for_requests(kind), _schema_of(source), base_uri)
        self._begin(kind, source)
        job = PrepareJob(source, make, variations, self._store.uri)
        if next(iter(self._store.list(SUCCESS)), None) is not None:
            return self._publish(kind, source, make, self._records(range(len(source.pieces))))
        with connected:
            numbers = list(range(len(source.pieces)))
            if self._options.limit is not None:
                job, numbers = self._limited(job, numbers)
            if self._options.shuffle is None:
                self._prepare_pieces(job, numbers)
            else:
                self._shuffle_pieces(job, numbers)
        self._check_unchanged(source)
        return self._publish(kind, source, make, self._records(numbers))

    def _open(self) -> tuple[Kind, Source, str]:
        """Return the kind, the source, and the folder that relative URIs of images start from."""
        if not isinstance(self._given, str):
            return DATASET, DatasetSource.of(self._given), ""
        try:  # a table or a hub that has changed since is read in the version with which this folder was begun
            pinned = self._store.read_json(PLAN).get("pinned", {})
        except FileNotFoundError:
            pinned = {}
        place = Place.of(lakes.of_catalog(self._given), pinned.get("commit"))
        kind = kind_of(place, self._options.kind)
        if place.broken:
            self._notes.append(
                f"{len(place.broken)} files are left out: a writer of Spark did not commit them, or replaced them"
            )
        version = next((value for name, value in pinned.items() if name != "commit"), None)
        reading = self._options.for_reading()
        source = kind.open(place, reading if reading.version else replace(reading, version=version))
        if not source.pieces:
            raise ManifestError(
                f"source {redacted_uri(place.uri)} has no row of the kind {kind.name}; correct it, or --kind"
            )
        return kind, source, place.folder_uri

    def _begin(self, kind: Kind, source: Source) -> None:
        """Write the plan, or check that the one that is there is the same.

        Raises:
            ManifestError: The folder belongs to something else, other options, or an older source.
        """
        given = {name: value for name, value in asdict(self._options).items() if value not in (None, (), {}, False)}
        plan = {
            "source": redacted_uri(self._given) if isinstance(self._given, str) else "Ray Dataset",
            "kind": kind.name,
            "pinned": dict(source.pinned),
            "options": given,
            "pieces": [[piece.name, piece.version] for piece in source.pieces],
            "versions": {"pia_batch": pia_batch.__version__, "pyarrow": pa.__version__},
        }
        try:
            found = self._store.read_json(PLAN, ("pieces",))
        except FileNotFoundError:
            if next(iter(self._store.list("")), None) is not None:
                raise ManifestError(
                    f"--to {redacted_uri(self._store.uri)} has other files; choose a folder that is empty or does "
                    "not exist"
                ) from None
            create_same(self._store, PLAN, as_json(plan))
            return
        plan = json.loads(as_json(plan))
        for name, meaning in (("source", "the source"), ("kind", "--kind"), ("options", "the options")):
            if found.get(name) != plan[name]:
                raise ManifestError(
                    f"--to {redacted_uri(self._store.uri)} was begun with another value of {meaning} (there: "
                    f"{found.get(name)}, here: {plan[name]}); choose another folder, or the same value"
                )
        _check_same_pieces(found["pieces"], plan["pieces"])

    def _limited(self, job: PrepareJob, numbers: Sequence[int]) -> tuple[PrepareJob, list[int]]:
        """Return the job and its pieces, so that `limit` rows become requests."""
        limit = self._options.limit or 0
        if self._options.shuffle is not None:
            orders = sorted(order for _, some in self._over(job.orders, numbers) for order in some)
            most = orders[limit - 1] if limit <= len(orders) else None
            return replace(job, last_order=most), list(numbers)
        limits: dict[int, int] = {}
        left, start, wave = limit, 0, 8
        while left and start < len(numbers):
            counts = dict(self._over(job.count, numbers[start : start + wave]))
            for number in sorted(counts):
                limits[number] = min(left, counts[number])
                left -= limits[number]
            start, wave = start + wave, 2 * wave
        return replace(job, limits=limits), sorted(limits)

    def _prepare_pieces(self, job: PrepareJob, numbers: Sequence[int]) -> None:
        """Prepare the pieces whose records are not there, in any order."""
        done = set(numbers) & self._finished(PIECES)
        self._on_progress(len(done), len(numbers))
        for number, _ in self._over(job.prepare, [number for number in numbers if number not in done]):
            done.add(number)
            self._on_progress(len(done), len(numbers))

    def _shuffle_pieces(self, job: PrepareJob, numbers: Sequence[int]) -> None:
        """Write the requests of all pieces in another order, into as many groups of files as there are pieces."""
        done = self._finished(SHUFFLED)
        if len(done) == len(numbers):
            return
        rows = self._blocks(numbers).map_batches(
            lambda batch: job.scattered(batch["piece"].to_pylist(), len(numbers), done), **ray_data.blocks(_PIECE_CPUS)
        )
        written = rows.groupby(PART, num_partitions=min(len(numbers), _MOST_PARTITIONS)).map_groups(
            job.write_shuffled, batch_format="pyarrow"
        )
        for batch in self._batches(written):
            done = done | set(batch["piece"].to_pylist())
            self._on_progress(len(done), len(numbers))

    def _finished(self, prefix: str) -> set[int]:
        """Return the numbers of the records below a prefix."""
        names = (info.name for info in self._store.list(prefix))
        return {int(name.removeprefix(prefix).removesuffix(".json")) for name in names}

    def _records(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Return the records of pieces, with the files that each, or each group of shuffled rows, became."""
        found = sorted(self._finished(PIECES).intersection(numbers))
        records = dict(zip(found, self._read_records(found, PIECES), strict=True))
        shuffled = sorted(self._finished(SHUFFLED))
        for number, record in zip(shuffled, self._read_records(shuffled, SHUFFLED), strict=True):
            records[number]["files"] = record["files"]
        return records

    def _read_records(self, numbers: Sequence[int], prefix: str) -> list[dict[str, Any]]:
        return list(self._store.each(self._store.read_json, [record_name(n, prefix) for n in numbers]))

    def _over(self, function: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yield what a function returns for each piece, as Ray Data's tasks finish it."""
        if not numbers:
            return

        def each(rows: pa.Table) -> pa.Table:
            found = [json.dumps(function(number)) for number in rows["piece"].to_pylist()]
            return pa.table({"piece": rows["piece"], "result": pa.array(found, pa.string())})

        results = self._blocks(numbers).map_batches(each, batch_format="pyarrow", batch_size=1, num_cpus=_PIECE_CPUS)
        for batch in self._batches(results):
            for number, result in zip(batch["piece"].to_pylist(), batch["result"].to_pylist(), strict=True):
                yield number, json.loads(result)

    def _blocks(self, numbers: Sequence[int]) -> ray.data.Dataset:
        """Return the numbers of pieces, in as many blocks as there will be tasks."""
        per_block = -(-len(numbers) // _MOST_BLOCKS)
        blocks = [pa.table({"piece": numbers[at : at + per_block]}) for at in range(0, len(numbers), per_block)]
        return ray.data.from_arrow(blocks)

    def _batches(self, results: ray.data.Dataset) -> Iterator[pa.Table]:
        """Yield the results of tasks as they finish."""
        return batches_of(results, self._stop, "stopped; what was prepared is kept. Start again to continue")

    def _check_unchanged(self, source: Source) -> None:
        """Check that the source is what it was when this call began.

        Raises:
            ManifestError: It is not.
        """
        if isinstance(self._given, str):
            _, now, _ = self._open()
            _check_same_pieces(
                [[piece.name, piece.version] for piece in source.pieces],
                [[piece.name, piece.version] for piece in now.pieces],
            )

    def _publish(
        self, kind: Kind, source: Source, make: RequestTable, records: Mapping[int, dict[str, Any]]
    ) -> PrepareSummary:
        """Check the manifest as a whole, and write `_SUCCESS.json`."""
        files = [file for number in sorted(records) for file in records[number]["files"]]
        counts: Counter[str] = Counter()
        for record in records.values():
            counts += Counter(record["counts"])
        counts.pop("requests", None)
        requests = sum(file["rows"] for file in files)
        if not requests:
            words = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))
            raise ManifestError(f"no row becomes a request ({words}); {self._remedy(records)}")
        _check_types(files)
        rejected = [record["rejects"] for _, record in sorted(records.items()) if record["rejects"]]
        if make.reads_images:
            remove_unrecorded(self._store, {*rejected, *(file["name"] for file in files)})
        if rejected:
            write_rejects(self._store, rejected)
        success = {
            "kind": kind.name,
            "pinned": dict(source.pinned),
            "requests": requests,
            "counts": dict(sorted(counts.items())),
            "files": [{name: file[name] for name in ("name", "rows", "bytes", "sha256")} for file in files],
            "versions": {"pia_batch": pia_batch.__version__, "pyarrow": pa.__version__},
        }
        create_same(self._store, SUCCESS, as_json(success))
        return PrepareSummary(
            manifest=self._store.uri,
            kind=kind.name,
            requests=requests,
            files=len(files),
            num_bytes=sum(file["bytes"] for file in files),
            counts=counts,
            rejects_uri=self._store.uri_of(REJECTED) if rejected else None,
            notes=[*self._notes, *make.notes],
        )

    def _remedy(self, records: Mapping[int, dict[str, Any]]) -> str:
        """Return what to do if no row becomes a request: the reason of the first rejected row, if there is one."""
        name = next((records[number]["rejects"] for number in sorted(records) if records[number]["rejects"]), None)
        if name is None:
            return "relax --where, --on-missing or --sample"
        (data,) = self._store.read_all([name])
        first = read_rejects(data).slice(0, 1).to_pylist()[0]
        return f"the first rejected row is {first['place']}: {first['reason']}"


def _schema_of(source: Source) -> pa.Schema:
    """Return the columns of a source; where only rows show them, those of its first rows."""
    if source.schema is not None:
        return source.schema
    for piece in source.pieces:
        for rows in source.read(piece):
            if len(rows.table):
                return rows.table.schema
    raise ManifestError("the source has no row; correct its path or URI")


def _check_same_pieces(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> None:
    """Refuse a source that is not what it was.

    Raises:
        ManifestError: A part was replaced, added or removed; the message names the first.
    """
    if list(map(list, before)) == list(map(list, now)):
        return
    others = {tuple(piece) for piece in before} ^ {tuple(piece) for piece in now}
    raise ManifestError(changed(min(others)[0]))


def _check_types(files: Sequence[Mapping[str, Any]]) -> None:
    """Refuse files whose columns contradict each other, as a run would.

    Raises:
        ManifestError: A column has texts in one file and numbers in another; the message has the remedy.
    """
    schemas = {file["schema"]: pa.ipc.read_schema(pa.py_buffer(base64.b64decode(file["schema"]))) for file in files}
    first = {file["schema"]: file["name"] for file in reversed(files)}
    try:
        unify.unify([*schemas.values()], tuple(first[text] for text in schemas))
    except ManifestError as err:
        msg = f"{err}; start again with --text COLUMN and another folder, so that its values are texts in all files"
        raise ManifestError(msg) from None
