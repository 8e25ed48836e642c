"""One pass over a manifest: what identifies its good rows, and what is wrong with the others."""

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
from pia_batch.manifest.files import Contents, ManifestFile
from pia_batch.manifest.reader import Manifest, Piece
from pia_batch.planning import scan_pool, scan_validate
from pia_batch.planning.scan_cache import Chunk, ScanCache
from pia_batch.planning.scan_validate import Judged, Task, Verdict
from pia_batch.planning.work_classes import Traits, summed
from pia_batch.schema.columns import GROUPED, REQUEST
from pia_batch.schema.keys import KEY_BYTES, Keys

CHUNK_ROWS = 500_000
"""Rows of a file in one entry of the cache: 12 MB."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a manifest finds."""

    keys: Keys
    """Of the good rows, in the manifest's order; shape (n,)."""
    id_hashes: npt.NDArray[np.uint64]
    """`validation.hashes_of` their request ids; shape (n,)."""
    rejected: pa.Table
    """`row` (the number inside the manifest, rising), `error_kind`, `error`."""
    groups: pa.Table
    """GROUPED and `num_rows`: how many good rows can be drawn together."""
    traits: tuple[bytes, ...] = field(repr=False)
    """`Traits.packed` of all rows, some in each, in the manifest's order."""
    fresh: tuple[Chunk, ...] = field(repr=False)
    """What was read and not known before."""

    def ordinals(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row numbers inside the manifest of these good rows."""
        bad = self._bad
        found: npt.NDArray[np.int64] = indices + np.searchsorted(bad - np.arange(len(bad)), indices, side="right")
        return found

    def indices(self, ordinals: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which of the good rows these row numbers are."""
        found: npt.NDArray[np.int64] = ordinals - np.searchsorted(self._bad, ordinals)
        return found

    @property
    def _bad(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.rejected["row"].to_numpy(), np.int64)


def scan(
    found: Manifest,
    run: RunConfig,
    engine_ids: Mapping[str, str],
    cache: ScanCache | None = None,
) -> Scan:
    """Judge every row of a manifest, and read only the files that `cache` does not know.

    Args:
        found: the manifest.
        run: gives the defaults, and what else decides a key.
        engine_ids: the identity of each model's engine, by its name.
        cache: made with the same config and engines; used up by this, but for `save`. None: every file is read.

    Raises:
        ManifestError: a file is corrupt, or went away.
        InterruptedRunError: a file was replaced meanwhile.
    """
    known = {} if cache is None else _known(found, cache)
    if cache is not None:
        cache.release()
    pieces = [piece for piece in found.pieces() if piece.file not in known]
    schema = pa.schema([item for item in found.schema if item.name in REQUEST.names])
    verdicts = _verdicts(found, Task(schema, run, engine_ids), pieces)
    num_pieces = Counter(piece.file for piece in pieces)
    gathered = _Gathered(found.num_rows)
    for file, contents in found.opened:
        if file in known:
            gathered.add(known.pop(file), contents)
            pa.default_memory_pool().release_unused()  # which the pool would keep for later
        else:
            parts = itertools.islice(verdicts, num_pieces[file])
            shape = found.shape_of(file, REQUEST.names)
            gathered.add(_chunks(file, shape, contents, parts), contents, fresh=True)
    return gathered.scan()


def _known(found: Manifest, cache: ScanCache) -> dict[ManifestFile, list[Chunk]]:
    chunks = {
        file: cache.chunks(file, found.shape_of(file, REQUEST.names), contents) for file, contents in found.opened
    }
    return {file: known for file, known in chunks.items() if known is not None}


def _verdicts(found: Manifest, task: Task, pieces: Sequence[Piece]) -> Iterator[Verdict]:
    """The verdict on each piece, in order."""
    num_rows = sum(piece.num_rows for piece in pieces)
    if found.format == "parquet" and num_rows >= scan_pool.WORTH_ROWS:
        return scan_pool.judge_all(task, pieces)
    return scan_validate.in_threads(task, [(piece, found.read(piece, task.schema.names)) for piece in pieces])


def _chunks(file: ManifestFile, shape: str, contents: Contents, parts: Iterable[Verdict]) -> Iterator[Chunk]:
    """What was found in a file's rows, put together in chunks; a file without rows has one too."""
    row, waiting = 0, [Judged.nothing()]
    for judged in parts:
        waiting += judged
        if sum(one.num_rows for one in waiting) >= CHUNK_ROWS:
            yield _chunk(file, shape, row, contents, waiting)
            row, waiting = row + sum(one.num_rows for one in waiting), [Judged.nothing()]
    if len(waiting) > 1 or not row:
        yield _chunk(file, shape, row, contents, waiting)


def _chunk(file: ManifestFile, shape: str, first_row: int, contents: Contents, parts: Sequence[Judged]) -> Chunk:
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
        Traits.joined([part.traits for part in parts], id_hashes).packed(),
    )


class _Gathered:
    """Puts the chunks of all files together, and holds the keys of each only once."""

    def __init__(self, num_rows: int) -> None:
        self._keys = np.empty(num_rows, f"V{KEY_BYTES}")
        self._id_hashes = np.empty(num_rows, np.uint64)
        self._end = self._num_rows = 0
        self._rejected = [Judged.nothing().rejected]
        self._groups: list[pa.Table] = []
        self._traits: list[bytes] = []
        self._fresh: list[Chunk] = []

    def add(self, chunks: Iterable[Chunk], contents: Contents, *, fresh: bool = False) -> None:
        """Take all chunks of the next file."""
        for chunk in chunks:
            start, self._end = self._end, self._end + len(chunk.keys)
            keys, id_hashes = self._keys[start : self._end], self._id_hashes[start : self._end]
            keys[:], id_hashes[:] = chunk.keys, chunk.id_hashes
            if len(chunk.rejected):
                rows = pc.add(chunk.rejected["row"], self._num_rows)
                self._rejected.append(chunk.rejected.set_column(0, "row", rows))
            self._groups.append(Traits.unpacked(chunk.traits).groups)
            self._traits.append(chunk.traits)
            if fresh:
                self._fresh.append(replace(chunk, keys=keys, id_hashes=id_hashes))
        self._num_rows += contents.num_rows

    def scan(self) -> Scan:
        """What was found."""
        return Scan(
            self._keys[: self._end],
            self._id_hashes[: self._end],
            pa.concat_tables(self._rejected),
            summed(pa.concat_tables(self._groups), GROUPED),
            tuple(self._traits),
            tuple(self._fresh),
        )
