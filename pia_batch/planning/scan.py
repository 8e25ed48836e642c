"""Scan of a manifest: one pass that finds the keys of the valid rows and the errors of the others."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import RunConfig
from pia_batch.config.model_limits import NO_LIMITS, Limits
from pia_batch.manifest.files import Contents, ManifestFile
from pia_batch.manifest.pieces import Piece
from pia_batch.manifest.reader import Manifest
from pia_batch.planning import scan_pool
from pia_batch.planning.scan_cache import Chunk, ScanCache
from pia_batch.planning.scan_validate import ScanTask, ValidatedPiece, ValidatedRows, validate_in_threads
from pia_batch.planning.statistics import WorkClasses, summed
from pia_batch.planning.words import words_of
from pia_batch.schema.columns import GROUPED, REQUEST
from pia_batch.schema.keys import KEY_BYTES, Keys

CHUNK_ROWS = 500_000
"""Rows of a file in one entry of the scan cache: 12 MB."""


@dataclass(frozen=True)
class Scan:
    """Result of one pass over a manifest."""

    keys: Keys
    """Keys of the valid rows, in the manifest's order; shape (n,)."""
    id_hashes: npt.NDArray[np.uint64]
    """`validation.hashes_of` the request ids of the valid rows; shape (n,)."""
    rejected: pa.Table
    """Table of `row` (the number inside the manifest, ascending), `error_kind` and `error`."""
    groups: pa.Table
    """Table of GROUPED and `num_rows`: the number of valid rows that can share a batch."""
    work_classes: tuple[bytes, ...] = field(repr=False)
    """`WorkClasses.packed` of all rows, in parts, in the manifest's order."""
    new_chunks: tuple[Chunk, ...] = field(repr=False)
    """Chunks that were read because the scan cache lacks them."""

    def ordinals(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Convert indices among the valid rows into row numbers inside the manifest."""
        bad = self._rejected_rows
        found: npt.NDArray[np.int64] = indices + np.searchsorted(bad - np.arange(len(bad)), indices, side="right")
        return found

    def indices(self, ordinals: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Convert row numbers of valid rows inside the manifest into indices among the valid rows."""
        found: npt.NDArray[np.int64] = ordinals - np.searchsorted(self._rejected_rows, ordinals)
        return found

    @property
    def _rejected_rows(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.rejected["row"].to_numpy(), np.int64)


def scan_manifest(
    found: Manifest,
    run: RunConfig,
    engine_ids: Mapping[str, str],
    cache: ScanCache | None = None,
    limits: Limits = NO_LIMITS,
) -> Scan:
    """Validate every row of a manifest; read only the files that `cache` does not have.

    Args:
        found: The manifest.
        run: Config with the defaults, and with everything else that decides a key.
        engine_ids: Identity of each model's engine, by the model's name.
        cache: Cache made with the same config and engines. This consumes it, except for `save`. None reads every file.
        limits: Limits of the models that their files decide.

    Raises:
        ManifestError: a file is corrupt, or went away.
        InterruptedRunError: a file was replaced meanwhile.
        ConfigError: a model cannot be found.
    """
    known = {} if cache is None else _cached_chunks(found, cache)
    if cache is not None:
        cache.release()
    pieces = [piece for piece in found.pieces() if piece.file not in known]
    schema = pa.schema([item for item in found.schema if item.name in REQUEST.names])
    validated = _validate(found, ScanTask(schema, run, engine_ids, words_of(run), limits), pieces)
    num_pieces = Counter(piece.file for piece in pieces)
    builder = _ScanBuilder(found.num_rows)
    for file, contents in found.opened:
        if file in known:
            builder.add(known.pop(file), contents)
            pa.default_memory_pool().release_unused()  # Arrow would keep this memory
        else:
            parts = itertools.islice(validated, num_pieces[file])
            shape = found.shape_of(file, REQUEST.names)
            builder.add(_chunks(file, shape, contents, parts), contents, new=True)
    return builder.build()


def _cached_chunks(found: Manifest, cache: ScanCache) -> dict[ManifestFile, list[Chunk]]:
    chunks = {
        file: cache.chunks(file, found.shape_of(file, REQUEST.names), contents) for file, contents in found.opened
    }
    return {file: known for file, known in chunks.items() if known is not None}


def _validate(found: Manifest, task: ScanTask, pieces: Sequence[Piece]) -> Iterator[ValidatedPiece]:
    """Validate each piece, in order; in processes if there are enough rows."""
    num_rows = sum(piece.num_rows for piece in pieces)
    if found.format == "parquet" and num_rows >= scan_pool.MIN_ROWS:
        return scan_pool.validate_in_processes(task, pieces)
    return validate_in_threads(task, [(piece, found.read(piece, task.schema.names)) for piece in pieces])


def _chunks(file: ManifestFile, shape: str, contents: Contents, parts: Iterable[ValidatedPiece]) -> Iterator[Chunk]:
    """Combine the results of a file's pieces into chunks; a file without rows has one chunk too."""
    row, waiting = 0, [ValidatedRows.empty()]
    for piece in parts:
        waiting += piece
        if sum(one.num_rows for one in waiting) >= CHUNK_ROWS:
            yield _chunk(file, shape, row, contents, waiting)
            row, waiting = row + sum(one.num_rows for one in waiting), [ValidatedRows.empty()]
    if len(waiting) > 1 or not row:
        yield _chunk(file, shape, row, contents, waiting)


def _chunk(file: ManifestFile, shape: str, first_row: int, contents: Contents, parts: Sequence[ValidatedRows]) -> Chunk:
    ends = np.cumsum([part.num_rows for part in parts])
    rejected = [
        part.rejected.set_column(0, "row", pc.add(part.rejected["row"], int(end) - part.num_rows + first_row))
        for part, end in zip(parts, ends, strict=True)
    ]
    id_hashes = [part.id_hashes for part in parts]
    return Chunk(
        file,
        shape,
        first_row,
        int(ends[-1]),
        contents,
        np.concatenate([part.keys for part in parts]),
        np.concatenate(id_hashes),
        pa.concat_tables(rejected).combine_chunks(),
        WorkClasses.joined([part.work_classes for part in parts], id_hashes).packed(),
    )


class _ScanBuilder:
    """Collects the chunks of all files, and holds each key only once."""

    def __init__(self, num_rows: int) -> None:
        self._keys = np.empty(num_rows, f"V{KEY_BYTES}")
        self._id_hashes = np.empty(num_rows, np.uint64)
        self._end = self._num_rows = 0
        self._rejected = [ValidatedRows.empty().rejected]
        self._groups: list[pa.Table] = []
        self._work_classes: list[bytes] = []
        self._new_chunks: list[Chunk] = []

    def add(self, chunks: Iterable[Chunk], contents: Contents, *, new: bool = False) -> None:
        """Add all chunks of the next file; `new` ones are kept for the scan cache."""
        for chunk in chunks:
            start, self._end = self._end, self._end + len(chunk.keys)
            keys, id_hashes = self._keys[start : self._end], self._id_hashes[start : self._end]
            keys[:], id_hashes[:] = chunk.keys, chunk.id_hashes
            if len(chunk.rejected):
                rows = pc.add(chunk.rejected["row"], self._num_rows)
                self._rejected.append(chunk.rejected.set_column(0, "row", rows))
            self._groups.append(WorkClasses.unpacked(chunk.work_classes).groups)
            self._work_classes.append(chunk.work_classes)
            if new:
                self._new_chunks.append(replace(chunk, keys=keys, id_hashes=id_hashes))
        self._num_rows += contents.num_rows

    def build(self) -> Scan:
        """Return the scan of everything that was added."""
        return Scan(
            self._keys[: self._end],
            self._id_hashes[: self._end],
            pa.concat_tables(self._rejected),
            summed(pa.concat_tables(self._groups), GROUPED),
            tuple(self._work_classes),
            tuple(self._new_chunks),
        )
