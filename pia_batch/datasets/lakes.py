"""Tables with a log of their own as sources: Lance, Delta and Iceberg, each in one version, by its own library."""

from __future__ import annotations

import importlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pia_batch.datasets.sources import PART_BYTES, PART_ROWS, Piece, Place, ReadOptions, Rows, reading
from pia_batch.errors import ConfigError, ManifestError, message_of
from pia_batch.storage import s3_config, schemes
from pia_batch.storage.store_uris import local_path
from pia_batch.storage.uris import redacted, redacted_uri

_ROWS_PER_BATCH = 1024


def _library(name: str, package: str, extra: str) -> Any:  # an optional library's module
    """Return an optional library.

    Raises:
        ConfigError: It is not installed; the message has the command.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        msg = f"this source needs the package {package}, which is not installed: pip install 'pia-batch[{extra}]'"
        raise ConfigError(msg) from None


def _table_uri(uri: str) -> str:
    """Return a URI as the libraries of tables take it: a path for local folders."""
    return local_path(uri) if uri.startswith("file://") else schemes.canonical(uri)


def _s3_options(uri: str) -> dict[str, str] | None:
    """Return the configuration of S3 for the libraries of tables; None for other stores."""
    if schemes.find(uri, "manifest").store != "s3":
        return None
    config = s3_config.resolve()
    options = {"aws_region": config.region or "us-east-1"}
    if config.endpoint:
        options |= {"aws_endpoint": config.endpoint, "allow_http": str(config.endpoint.startswith("http://")).lower()}
    if config.credentials is None:
        return options | {"aws_skip_signature": "true"}
    keys = config.provide()
    options |= {"aws_access_key_id": keys["access_key_id"], "aws_secret_access_key": keys["secret_access_key"]}
    return options | ({"aws_session_token": keys["token"]} if keys.get("token") else {})


def _rows(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[Rows]:
    """Yield batches in tables of about PART_BYTES, with their places."""
    waiting: list[pa.RecordBatch] = []
    first = 0

    def together() -> Rows:
        table = pa.Table.from_batches(waiting).combine_chunks()
        places = pa.array([f"{name}:{row}" for row in range(first, first + len(table))], pa.string())
        return Rows(table, places)

    for batch in batches:
        if waiting and (
            sum(each.nbytes for each in waiting) + batch.nbytes > PART_BYTES
            or sum(map(len, waiting)) + len(batch) > PART_ROWS
        ):
            yield together()
            first += sum(map(len, waiting))
            waiting = []
        if len(batch):
            waiting.append(batch)
    if waiting:
        yield together()


# --- Lance ----------------------------------------------------------------------------------------------------------


def is_lance(place: Place) -> bool:
    """Return True if a place has the versions of a Lance dataset."""
    return any(re.match(r"_versions/.*\.manifest$", place.name_of(file.path)) for file in place.files)


@dataclass(frozen=True)
class LanceSource:
    """One version of a Lance dataset, in its fragments."""

    uri: str
    version: int
    pieces: Sequence[Piece]
    schema: pa.Schema

    @classmethod
    def open(cls, place: Place, options: ReadOptions) -> LanceSource:
        """Open the newest version, or the one that the options name."""
        lance = _library("lance", "pylance", "lance")
        uri = _table_uri(place.uri)
        with reading(place.uri):
            dataset = lance.dataset(uri, version=_number(options.version), storage_options=_s3_options(place.uri))
            fragments = sorted(dataset.get_fragments(), key=lambda fragment: int(fragment.fragment_id))
        version = dataset.version
        pieces = [Piece(f"fragment {each.fragment_id}", str(version), int(each.fragment_id)) for each in fragments]
        return cls(place.uri, version, tuple(pieces), dataset.schema)

    @property
    def pinned(self) -> Mapping[str, str]:
        """Version of the dataset."""
        return {"lance_version": str(self.version)}

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the rows of a fragment."""
        lance = _library("lance", "pylance", "lance")
        with reading(f"{self.uri}, {piece.name}"):
            dataset = lance.dataset(_table_uri(self.uri), version=self.version, storage_options=_s3_options(self.uri))
            fragment = dataset.get_fragment(piece.detail)
            yield from _rows(fragment.to_batches(batch_size=_ROWS_PER_BATCH), piece.name)


# --- Delta ----------------------------------------------------------------------------------------------------------


def is_delta(place: Place) -> bool:
    """Return True if a place has the log of a Delta table."""
    return any(place.name_of(file.path).startswith("_delta_log/") for file in place.files)


@dataclass(frozen=True)
class DeltaSource:
    """One version of a Delta table, in its current files."""

    uri: str
    version: int
    pieces: Sequence[Piece]
    schema: pa.Schema

    @classmethod
    def open(cls, place: Place, options: ReadOptions) -> DeltaSource:
        """Open the newest version, or the one that the options name."""
        dataset, version = cls._dataset(place.uri, _number(options.version))
        names = sorted(fragment.path for fragment in dataset.get_fragments())
        pieces = [Piece(name, str(version), name) for name in names]
        return cls(place.uri, version, tuple(pieces), dataset.schema)

    @staticmethod
    def _dataset(uri: str, version: int | None) -> tuple[Any, int]:
        deltalake = _library("deltalake", "deltalake", "delta")
        with reading(uri):
            try:
                table = deltalake.DeltaTable(_table_uri(uri), version=version, storage_options=_s3_options(uri))
                return table.to_pyarrow_dataset(), table.version()
            except deltalake.exceptions.DeltaError as err:
                msg = (
                    f"source {redacted_uri(uri)}: deltalake cannot read this table: {err}; write its current rows to "
                    "Parquet by Spark or DuckDB"
                )
                raise ManifestError(msg) from None

    @property
    def pinned(self) -> Mapping[str, str]:
        """Version of the table."""
        return {"delta_version": str(self.version)}

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the rows of a file, with the values of its partition."""
        dataset, _ = self._dataset(self.uri, self.version)
        with reading(f"{self.uri}, {piece.name}"):
            fragment = next(each for each in dataset.get_fragments() if each.path == piece.detail)
            batches = fragment.to_batches(schema=dataset.schema, batch_size=_ROWS_PER_BATCH, use_threads=False)
            yield from _rows(batches, piece.name)


# --- Iceberg --------------------------------------------------------------------------------------------------------


def of_catalog(uri: str) -> str:
    """Return the URI of the newest metadata of `iceberg://CATALOG/NAMESPACE.TABLE`; any other URI as it is.

    The catalog is one of pyiceberg's own configuration: `.pyiceberg.yaml`, or variables `PYICEBERG_CATALOG__...`.

    Raises:
        ConfigError: The URI has no table, or there is no such catalog.
        ManifestError: The catalog does not have the table, or does not answer.
    """
    if not uri.startswith("iceberg://"):
        return uri
    name, _, table = uri.removeprefix("iceberg://").partition("/")
    if not name or "." not in table:
        raise ConfigError(f"source {redacted_uri(uri)}: write iceberg://CATALOG/NAMESPACE.TABLE")
    catalogs = _library("pyiceberg.catalog", "pyiceberg", "iceberg")
    try:
        return str(catalogs.load_catalog(name).load_table(table).metadata_location)
    except Exception as err:  # noqa: BLE001 - each catalog has a client of its own, with its own classes
        raise ManifestError(
            f"source {redacted_uri(uri)}: the catalog cannot be read: {redacted(message_of(err))}; describe it in "
            ".pyiceberg.yaml or by PYICEBERG_CATALOG__..., or give the folder of the table"
        ) from None


_METADATA = re.compile(r"metadata/(?:v(\d+)|(\d+)-[^/]*)(?:\.gz)?\.metadata\.json(?:\.gz)?$")


def is_iceberg(place: Place) -> bool:
    """Return True if a place has the metadata of an Iceberg table."""
    return _newest_metadata(place) is not None


def _newest_metadata(place: Place) -> str | None:
    """Return the path of the newest metadata of the table that the place is, by the number in its name."""
    names = (
        f"metadata/{posixpath.basename(place.root)}" if place.is_file else place.name_of(file.path)
        for file in place.files
    )
    numbered = [(_METADATA.match(name), file.path) for name, file in zip(names, place.files, strict=True)]
    found = [(int(match[1] or match[2]), path) for match, path in numbered if match]
    return max(found)[1] if found else None


@dataclass(frozen=True)
class IcebergSource:
    """One snapshot of an Iceberg table, in its data files; rows that it deleted are left out."""

    metadata: str
    snapshot: int
    pieces: Sequence[Piece]
    schema: pa.Schema

    @classmethod
    def open(cls, place: Place, options: ReadOptions) -> IcebergSource:
        """Open the current snapshot, or the one that the options name, of the newest metadata in the folder."""
        path = _newest_metadata(place) or place.root
        metadata = place.uri_of(path)
        scan, tasks = cls._scan(metadata, _number(options.version))
        snapshot = scan.snapshot()
        if snapshot is None:
            raise ManifestError(f"source {redacted_uri(place.uri)}: the table has no snapshot; write rows to it first")
        pieces = [Piece(name, str(snapshot.snapshot_id), name) for name in sorted(tasks)]
        return cls(metadata, snapshot.snapshot_id, tuple(pieces), _plain_schema(scan))

    @staticmethod
    def _scan(metadata: str, snapshot: int | None) -> tuple[Any, dict[str, Any]]:
        tables = _library("pyiceberg.table", "pyiceberg", "iceberg")
        options = (_s3_options(metadata) or {}).items()
        properties = {f"s3.{_ICEBERG_NAMES[name]}": value for name, value in options if name in _ICEBERG_NAMES}
        invalid = _library("pyiceberg.exceptions", "pyiceberg", "iceberg").ValidationError
        with reading(metadata):
            try:
                table = tables.StaticTable.from_metadata(_table_uri(metadata), properties)
            except invalid as err:
                raise ManifestError(
                    f"source {redacted_uri(metadata)} is damaged, or of a format that pyiceberg does not read: "
                    f"{message_of(err)}; restore it, or upgrade pyiceberg"
                ) from None
            scan = table.scan(snapshot_id=snapshot)
            return scan, {task.file.file_path: task for task in scan.plan_files()}

    @property
    def pinned(self) -> Mapping[str, str]:
        """Snapshot of the table."""
        return {"iceberg_snapshot": str(self.snapshot)}

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the rows of a data file that are not deleted."""
        readers = _library("pyiceberg.io.pyarrow", "pyiceberg", "iceberg")
        scan, tasks = self._scan(self.metadata, self.snapshot)
        with reading(piece.name):
            reader = readers.ArrowScan(scan.table_metadata, scan.io, scan.projection(), scan.row_filter)
            batches = reader.to_record_batches([tasks[piece.detail]])
            cast = (pa.Table.from_batches([batch]).cast(self.schema).to_batches() for batch in batches if len(batch))
            yield from _rows((one for some in cast for one in some), posixpath.basename(piece.name))


_ICEBERG_NAMES = {
    "aws_region": "region",
    "aws_endpoint": "endpoint",
    "aws_access_key_id": "access-key-id",
    "aws_secret_access_key": "secret-access-key",
    "aws_session_token": "session-token",
}
"""Names of S3's options in pyiceberg, by those of the other libraries."""


def _plain_schema(scan: Any) -> pa.Schema:  # pyiceberg is untyped here
    arrow = _library("pyiceberg.io.pyarrow", "pyiceberg", "iceberg").schema_to_pyarrow(scan.projection())
    return pa.schema([pa.field(item.name, item.type) for item in arrow])


def _number(version: str | None) -> int | None:
    if version is None:
        return None
    if not version.isdecimal():
        raise ConfigError(f"--version {version}: not a whole number; give the table's version or snapshot id")
    return int(version)
