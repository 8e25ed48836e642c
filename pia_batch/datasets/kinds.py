"""Kinds of sources that `prepare` reads: the one table of them, and the kind of a place by its contents."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pia_batch.datasets import animatebench, archives, folders, lakes, table_files
from pia_batch.datasets.sources import Kind, Place, ReadOptions, Source
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest.foreign_formats import EXAMINED_FILES, refuse_known_format
from pia_batch.manifest.table_formats import refuse_part_of_table, refuse_table
from pia_batch.storage.file_kinds import HEAD_BYTES
from pia_batch.storage.uris import redacted_uri


def _open_img2dataset(place: Place, options: ReadOptions) -> Source:
    """Open img2dataset's output in any of its formats: webdataset, files, or parquet with the images in it."""
    if archives.is_webdataset(place):
        return archives.ArchiveSource.open(place, options, skips_failures=True)
    if folders.is_folder(place):
        return folders.FolderSource.open(place, options)
    return table_files.ParquetSource.open(place, options, status="status")


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Kind(
                "lance",
                "Lance dataset, in one version",
                lakes.is_lance,
                lakes.LanceSource.open,
                extra="lance",
            ),
            Kind(
                "delta",
                "Delta table, in one version",
                lakes.is_delta,
                lakes.DeltaSource.open,
                extra="delta",
            ),
            Kind(
                "iceberg",
                "Iceberg table: its folder or one metadata file, in one snapshot",
                lakes.is_iceberg,
                lakes.IcebergSource.open,
                extra="iceberg",
            ),
            Kind(
                "img2dataset",
                "output of img2dataset: webdataset, parquet or files; rows without an image are skipped",
                archives.is_img2dataset,
                _open_img2dataset,
                prompt="caption",
                ids="location",
            ),
            Kind(
                "webdataset",
                "WebDataset shards (.tar): an image, .txt and .json for each key",
                archives.is_webdataset,
                archives.ArchiveSource.open,
                prompt="caption",
                ids="location",
            ),
            Kind(
                "parquet",
                "Parquet files, also those of a Hugging Face dataset",
                table_files.is_parquet,
                table_files.ParquetSource.open,
            ),
            Kind(
                "jsonl",
                "JSONL files, also .gz and .zst",
                lambda place: bool(place.visible(*table_files.JSONL)),
                table_files.TextSource.open_jsonl,
            ),
            Kind(
                "csv",
                "CSV files with a header line, also .gz and .zst",
                lambda place: bool(place.visible(*table_files.CSV)),
                table_files.TextSource.open_csv,
            ),
            Kind(
                "animatebench",
                "AnimateBench, the benchmark of PIA's authors: its models, images and prompts",
                animatebench.is_animatebench,
                animatebench.AnimateBenchSource.open,
            ),
            Kind(
                "folder",
                "images in a folder and its folders, with a .txt or .json of the same name each",
                folders.is_folder,
                folders.FolderSource.open,
                prompt="caption",
                ids="location",
            ),
        )
    }
)
"""Every kind by name, in the order in which they are tried: the first that a place holds is its kind."""


_FILES = ("parquet", "jsonl", "csv", "img2dataset")
"""Kinds that read every row of their files: of a table with a log, also rows that were deleted or replaced."""


def kind_of(place: Place, name: str | None) -> Kind:
    """Return the kind called `name`, or the kind of a place by its contents.

    Raises:
        ConfigError: There is no such kind.
        ManifestError: The contents are of no kind, or of two, or files of a table whose log is not read.
    """
    if name is not None and name not in KINDS:
        raise ConfigError(f"--kind {name}: unknown; write one of {', '.join(KINDS)}")
    found = [KINDS[name]] if name is not None else [kind for kind in KINDS.values() if kind.detect(place)]
    if not found or found[0].name in _FILES:
        shown = redacted_uri(place.uri)
        refuse_table((file.path for file in place.files), place.root, shown, "source")
        refuse_part_of_table(place.filesystem, place.root, shown, "source", is_file=place.is_file)
    if not found:
        _refuse_other_formats(place)
        some = ", ".join(place.name_of(file.path) for file in place.files[:3])
        raise ManifestError(
            f"source {redacted_uri(place.uri)} holds none of {', '.join(KINDS)} (files: {some}); correct it, or "
            "choose by --kind"
        )
    plain = [kind.name for kind in found if kind.name in ("parquet", "jsonl", "csv")]
    if found[0].name in plain and len(plain) > 1:
        raise ManifestError(
            f"source {redacted_uri(place.uri)} has {' and '.join(plain)} files; choose one by --kind, or leave "
            "the others out"
        )
    return found[0]


def _refuse_other_formats(place: Place) -> None:
    """Refuse the first of a place's files that is of a known format, such as a workbook of Excel."""
    for file in place.visible("")[:EXAMINED_FILES]:
        refuse_known_format(place.head(file, HEAD_BYTES), f"source {redacted_uri(file.path)}")
