"""WebDataset shards as sources: tar files whose members with one key are a row. Images stay encoded.

Ray's own reader forms blocks that do not end where a shard ends, so that no file of a manifest would belong to one.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs

from pia_batch.datasets.json_columns import json_table
from pia_batch.datasets.sources import (
    PART_BYTES,
    PART_ROWS,
    Piece,
    Place,
    ReadOptions,
    Rows,
    check_version,
    reading,
)
from pia_batch.errors import ConfigError, ManifestError, message_of

IMAGES = ("jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp")
"""Extensions of members and files that are images."""

_BYTES_REMEDY = "leave --images out: images inside of tar files have no URI of their own"

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
"""Key and extension of a member, by WebDataset's rule: the name ends at its first dot."""


@dataclass
class _Sample:
    key: str
    image: bytes | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(frozen=True)
class ArchiveSource:
    """WebDataset shards, one piece each."""

    filesystem: pyarrow.fs.FileSystem
    pieces: Sequence[Piece]
    pinned: Mapping[str, str]
    options: ReadOptions
    skips_failures: bool = False
    """True for img2dataset: samples whose `status` is not `success` are left out, and counted."""
    schema: pa.Schema | None = None

    @classmethod
    def open(cls, place: Place, options: ReadOptions, *, skips_failures: bool = False) -> ArchiveSource:
        """Open all shards of a place."""
        if options.images == "uris":
            raise ConfigError(f"--images uris: not possible for this kind; {_BYTES_REMEDY}")
        files = place.visible(".tar") or list(place.files[:1] if place.is_file else ())
        pieces = [Piece(place.name_of(file.path), file.version, (file, place.name_of(file.path))) for file in files]
        pinned = {"commit": place.commit} if place.commit else {}
        return cls(place.filesystem, tuple(pieces), pinned, options, skips_failures)

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the samples of a shard."""
        file, name = piece.detail
        check_version(self.filesystem, file)
        waiting: list[_Sample] = []
        num_bytes = skipped = 0
        for sample in self._samples(file.path):
            if self.skips_failures and sample.columns.get("status", "success") != "success":
                skipped += 1
                continue
            waiting.append(sample)
            num_bytes += sample.num_bytes
            if num_bytes >= PART_BYTES or len(waiting) == PART_ROWS:
                yield self._rows(waiting, name, skipped)
                waiting, num_bytes, skipped = [], 0, 0
        if waiting or skipped:
            yield self._rows(waiting, name, skipped)
        check_version(self.filesystem, file)

    def _rows(self, samples: list[_Sample], name: str, skipped: int) -> Rows:
        table = json_table((sample.columns for sample in samples), len(samples), self.options.text, self.options.paths)
        table = table.append_column("key", pa.array([sample.key for sample in samples], pa.string()))
        images = pa.array([sample.image for sample in samples], pa.large_binary())
        places = pa.array([f"{name}/{sample.key}" for sample in samples], pa.string())
        return Rows(table.append_column("image_bytes", images), places, skipped)

    def _samples(self, path: str) -> Iterator[_Sample]:
        """Yield the samples of a shard in order: neighbouring members with one key."""
        sample: _Sample | None = None
        seen: set[str] = set()
        with (
            reading(path),
            self.filesystem.open_input_stream(path) as stream,
            tarfile.open(fileobj=stream, mode="r|*") as archive,
        ):
            for member in archive:
                named = _KEY_AND_EXTENSION.fullmatch(member.name.removeprefix("./"))
                if not member.isreg() or named is None or named[1].rpartition("/")[2].startswith("_"):
                    continue
                key, extension = named[1], named[2].lower()
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    if key in seen:
                        raise ManifestError(
                            f"source {path}: members of the key {key!r} are not next to each other; write "
                            "the shard again, such as by `tar --sort=name`"
                        )
                    seen.add(key)
                    sample = _Sample(key)
                content = archive.extractfile(member)
                _add(sample, extension, content.read() if content else b"", f"source {path}, member {member.name!r}")
        if sample is not None:
            yield sample


def _add(sample: _Sample, extension: str, data: bytes, place: str) -> None:
    """Add a member to its sample: the image, a text, or the values of a JSON object."""
    sample.num_bytes += len(data)
    if extension in IMAGES:
        if sample.image is not None:
            raise ManifestError(f"{place}: a second image of its key; leave one image for each key")
        sample.image = data
    elif extension == "json":
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as err:
            raise ManifestError(f"{place}: not JSON: {message_of(err)}; write it again") from None
        if isinstance(values, dict):
            taken = {name: value for name, value in values.items() if name not in ("key", "image_bytes")}
            text = sample.columns.pop("caption", None) if "caption" in taken else None
            sample.columns |= taken | ({"txt": text} if text is not None else {})
    elif extension in ("txt", "caption", "cls"):
        name = {"txt": "caption"}.get(extension, extension)
        name = "txt" if name == "caption" and name in sample.columns else name
        sample.columns[name] = data.decode("utf-8", "replace").strip()


def is_webdataset(place: Place) -> bool:
    """Return True if a place has tar files."""
    return bool(place.visible(".tar"))


def is_img2dataset(place: Place) -> bool:
    """Return True if a place has the statistics that img2dataset writes for each shard."""
    statistics = place.visible("_stats.json")
    return bool(statistics) and any(re.search(r"/\d{5,}_stats\.json$", f"/{file.path}") for file in statistics)
