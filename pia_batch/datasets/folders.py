"""Folders of images as sources: one row for each image, with its caption from a text file of the same name."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs

from pia_batch.datasets.archives import IMAGES
from pia_batch.datasets.json_columns import json_table
from pia_batch.datasets.sources import PART_BYTES, Piece, Place, ReadOptions, Rows, check_version, reading
from pia_batch.errors import ManifestError, message_of
from pia_batch.schema.keys import digest, keys_to_hex
from pia_batch.storage.concurrency import map_in_threads
from pia_batch.storage.filesystems import FoundFile

_EXTENSIONS = tuple(f".{extension}" for extension in IMAGES)

_FILES_PER_PIECE = 4096
_READ_THREADS = 16


@dataclass(frozen=True)
class _Image:
    """An image with the files next to it that describe it."""

    file: FoundFile
    name: str
    uri: str
    texts: tuple[FoundFile, ...]


def is_folder(place: Place) -> bool:
    """Return True if a place has images."""
    return bool(place.visible(*_EXTENSIONS))


@dataclass(frozen=True)
class FolderSource:
    """Images of a folder and its folders, by name; each piece some neighbours."""

    filesystem: pyarrow.fs.FileSystem
    pieces: Sequence[Piece]
    pinned: Mapping[str, str]
    with_bytes: bool
    options: ReadOptions
    schema: pa.Schema | None = None

    @classmethod
    def open(cls, place: Place, options: ReadOptions) -> FolderSource:
        """Find all images of a place, and the .txt and .json files with their names."""
        texts: dict[str, list[FoundFile]] = {}
        for file in place.visible(".txt", ".json"):
            texts.setdefault(posixpath.splitext(file.path)[0], []).append(file)
        with_bytes = options.images != "uris"
        images = [
            _Image(
                file,
                place.name_of(file.path),
                place.uri_of(file.path),
                tuple(texts.get(posixpath.splitext(file.path)[0], ())),
            )
            for file in place.visible(*_EXTENSIONS)
        ]
        pieces = tuple(_piece(some) for some in _neighbours(images, with_bytes=with_bytes))
        pinned = {"commit": place.commit} if place.commit else {}
        return cls(place.filesystem, pieces, pinned, with_bytes, options)

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the images of a piece as one table."""
        images: list[_Image] = piece.detail
        described = [_described(image) | each for image, each in zip(images, self._texts(images), strict=True)]
        table = json_table(described, len(images), self.options.text, self.options.paths)
        if self.with_bytes:
            data = list(map_in_threads(self._read, [image.file for image in images], _READ_THREADS))
            table = table.append_column("image_bytes", pa.array(data, pa.large_binary()))
        else:
            table = table.append_column("image", pa.array([image.uri for image in images], pa.string()))
        yield Rows(table, pa.array([image.name for image in images], pa.string()))

    def _texts(self, images: Sequence[_Image]) -> Iterator[dict[str, Any]]:
        """Yield the values of the files next to each image."""
        files = [file for image in images for file in image.texts]
        contents = dict(zip(files, map_in_threads(self._read, files, _READ_THREADS), strict=True))
        for image in images:
            found: dict[str, Any] = {}
            for file in image.texts:  # sorted: .json, then .txt
                if file.path.lower().endswith(".json"):
                    found |= _json_values(contents[file], file.path)
                else:
                    name = "txt" if "caption" in found else "caption"
                    found[name] = contents[file].decode("utf-8", "replace").strip()
            yield found

    def _read(self, file: FoundFile) -> bytes:
        """Return a file's bytes, after checking that it is the listed version."""
        with reading(file.path), self.filesystem.open_input_stream(file.path) as stream:
            data = bytes(stream.read())
        check_version(self.filesystem, file)
        return data


def _described(image: _Image) -> dict[str, Any]:
    folder, base = posixpath.split(image.name)
    return {"path": image.name, "folder": folder, "name": posixpath.splitext(base)[0]}


def _json_values(data: bytes, path: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise ManifestError(f"source {path}: not JSON: {message_of(err)}; correct it, or remove it") from None
    reserved = ("path", "folder", "name", "image", "image_bytes")
    return {k: v for k, v in values.items() if k not in reserved} if isinstance(values, dict) else {}


def _neighbours(images: Sequence[_Image], *, with_bytes: bool) -> Iterator[list[_Image]]:
    waiting: list[_Image] = []
    num_bytes = 0
    for image in images:
        if waiting and (
            len(waiting) == _FILES_PER_PIECE or (with_bytes and num_bytes + image.file.num_bytes > PART_BYTES)
        ):
            yield waiting
            waiting, num_bytes = [], 0
        waiting.append(image)
        num_bytes += image.file.num_bytes
    if waiting:
        yield waiting


def _piece(images: list[_Image]) -> Piece:
    versions = [f"{file.path} {file.version}" for image in images for file in (image.file, *image.texts)]
    version = keys_to_hex(digest(pa.array(["\n".join(versions)], pa.string())))[0].as_py()
    return Piece(f"{images[0].name} and {len(images) - 1} more" if len(images) > 1 else images[0].name, version, images)
