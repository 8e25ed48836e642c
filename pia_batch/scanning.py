"""One pass over a manifest: what identifies its good rows, and what is wrong with the others."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import RunConfig
from pia_batch.manifest import Manifest, Piece
from pia_batch.manifest_files import Contents, ManifestFile
from pia_batch.records import EFFECTIVE, GROUPED, KEY_BYTES, REQUEST, Keys
from pia_batch.scan_cache import Chunk, ScanCache
from pia_batch.validation import Checked, check

CHUNK_ROWS = 500_000
"""Rows of a file in one entry of the cache: 12 MB."""

CHECKED_AT_ONCE = 16_384
"""Rows that `check` is given: their canonical JSON is what a scan needs of memory."""

Survey = Callable[[pa.Table, Checked], None]
"""Is shown every batch of a manifest once: its rows as they stand there, and what `validation.check` finds in them."""

READERS = 8
"""Pieces of a manifest that are asked for at a time, as far as READ_BYTES goes."""

READ_BYTES = 16 * 2**20
"""Unpacked, of the pieces that are read at a time; a larger one is read alone. Decoding takes several times as much."""

_CHECKERS = min(4, os.cpu_count() or 1)


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
    survey: Survey | None = None,
) -> Scan:
    """Judge every row of a manifest, and read only the files that `cache` does not know.

    Args:
        found: the manifest.
        run: gives the defaults, and what else decides a key.
        engine_ids: the identity of each model's engine, by its name.
        cache: made with the same config and engines; used up by this, but for `save`. None: every file is read.
        survey: where it is given, every file is read too.

    Raises:
        ManifestError: a file is corrupt, or went away.
        InterruptedRunError: a file was replaced meanwhile.
    """
    known = {
        file: chunks
        for file, contents in found.opened
        if cache and not survey and (chunks := cache.chunks(file, found.shape_of(file, REQUEST.names), contents))
    }
    fresh = _read(found, run, engine_ids, {file for file, _ in found.opened} - known.keys(), survey)
    chunks = [chunk for file, _ in found.opened for chunk in known.get(file) or fresh[file]]
    starts = np.cumsum([0, *(contents.num_rows for _, contents in found.opened)])
    start_of = {file: start for (file, _), start in zip(found.opened, starts[:-1].tolist(), strict=True)}
    rejected = [
        chunk.rejected.set_column(0, "row", pc.add(chunk.rejected["row"], start_of[chunk.file]))
        for chunk in chunks
        if len(chunk.rejected)
    ]
    if cache is not None:
        cache.release()
    groups = pa.concat_tables([chunk.groups for chunk in chunks])
    keys = np.concatenate([chunk.keys for chunk in chunks])
    id_hashes = np.concatenate([chunk.id_hashes for chunk in chunks])
    ends = np.cumsum([len(chunk.keys) for chunk in chunks]).tolist()
    return Scan(
        keys,
        id_hashes,
        pa.concat_tables([chunks[0].rejected.slice(0, 0), *rejected]),
        groups.group_by(list(GROUPED)).aggregate([("num_rows", "sum")]).rename_columns([*GROUPED, "num_rows"]),
        tuple(  # without copies of what is in `keys`
            replace(chunk, keys=keys[end - len(chunk.keys) : end], id_hashes=id_hashes[end - len(chunk.keys) : end])
            for chunk, end in zip(chunks, ends, strict=True)
            if chunk.file in fresh
        ),
    )


def _read(
    found: Manifest,
    run: RunConfig,
    engine_ids: Mapping[str, str],
    files: set[ManifestFile],
    survey: Survey | None,
) -> dict[ManifestFile, list[Chunk]]:
    """The chunks of these files, found by reading them."""
    pieces = [piece for piece in found.pieces() if piece.file in files]
    reader = _Reader(found, run, engine_ids, survey)
    gathered = {file: _Gathered(file, found.shape_of(file, REQUEST.names), contents) for file, contents in found.opened}
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(_CHECKERS) as reader.checkers:
        judged = map(reader.judge, pieces) if survey else readers.map(reader.judge, pieces)
        for piece, verdicts in zip(pieces, judged, strict=True):
            gathered[piece.file].add(verdicts)
    return {file: gathered[file].chunks() for file in files}


class _Reader:
    """Reads pieces in several threads, as many at a time as fit in memory, and has their rows checked in others."""

    checkers: ThreadPoolExecutor

    def __init__(self, found: Manifest, run: RunConfig, engine_ids: Mapping[str, str], survey: Survey | None) -> None:
        self._found, self._run, self._engine_ids, self._survey = found, run, engine_ids, survey
        self._free_bytes = READ_BYTES
        self._freed = threading.Condition()

    def judge(self, piece: Piece) -> list[_Judged]:
        """The verdicts on the rows of a piece, in order."""
        num_bytes = min(piece.num_bytes, READ_BYTES)
        with self._freed:
            self._freed.wait_for(lambda: self._free_bytes >= num_bytes)
            self._free_bytes -= num_bytes
        try:
            return list(self._judged(piece))
        finally:
            with self._freed:
                self._free_bytes += num_bytes
                self._freed.notify_all()

    def _judged(self, piece: Piece) -> Iterator[_Judged]:
        waiting: deque[Future[_Judged]] = deque()
        for table in self._found.read(piece, REQUEST.names):
            for start in range(0, len(table), CHECKED_AT_ONCE):
                rows = table.slice(start, CHECKED_AT_ONCE)
                if self._survey is not None:
                    yield self._check(rows)
                    continue
                waiting.append(self.checkers.submit(self._check, rows))
                if len(waiting) > _CHECKERS:
                    yield waiting.popleft().result()
        yield from (one.result() for one in waiting)

    def _check(self, rows: pa.Table) -> _Judged:
        checked = check(rows, self._run, self._engine_ids)
        if self._survey is not None:
            self._survey(rows, checked)
        return _Judged.of(checked, len(rows))


@dataclass(frozen=True)
class _Judged:
    """What is kept of `check`'s verdict on some rows."""

    num_rows: int
    keys: Keys
    id_hashes: npt.NDArray[np.uint64]
    rejected: pa.Table
    groups: pa.Table

    @classmethod
    def of(cls, checked: Checked, num_rows: int) -> _Judged:
        groups = checked.requests.group_by(list(GROUPED)).aggregate([([], "count_all")])
        groups = groups.rename_columns([*GROUPED, "num_rows"])
        return cls(num_rows, checked.keys, checked.id_hashes, checked.rejected, groups)


class _Gathered:
    """Puts what was found in a file's rows together in chunks."""

    def __init__(self, file: ManifestFile, shape: str, contents: Contents) -> None:
        self._file, self._shape, self._contents = file, shape, contents
        self._chunks: list[Chunk] = []
        self._waiting: list[_Judged] = []
        self._row = 0

    def add(self, judged: Sequence[_Judged]) -> None:
        """Take the verdicts on the next rows."""
        self._waiting += judged
        if sum(one.num_rows for one in self._waiting) >= CHUNK_ROWS:
            self._flush()

    def chunks(self) -> list[Chunk]:
        """All of them; a file without rows has one too."""
        if self._waiting or not self._chunks:
            self._flush()
        return self._chunks

    def _flush(self) -> None:
        nothing = _Judged.of(_NOTHING, 0)
        parts, self._waiting = [nothing, *self._waiting], []
        ends = np.cumsum([part.num_rows for part in parts])
        rejected = [
            part.rejected.set_column(0, "row", pc.add(part.rejected["row"], int(end) - part.num_rows + self._row))
            for part, end in zip(parts, ends, strict=True)
        ]
        groups = pa.concat_tables([part.groups for part in parts]).group_by(list(GROUPED))
        self._chunks.append(
            Chunk(
                self._file,
                self._shape,
                self._row,
                int(ends[-1]),
                self._contents,
                np.concatenate([part.keys for part in parts]),
                np.concatenate([part.id_hashes for part in parts]),
                pa.concat_tables(rejected).combine_chunks(),
                groups.aggregate([("num_rows", "sum")]).rename_columns([*GROUPED, "num_rows"]),
            )
        )
        self._row += int(ends[-1])


_NOTHING = Checked(
    EFFECTIVE.empty_table(),
    np.empty(0, np.int64),
    np.empty(0, f"V{KEY_BYTES}"),
    np.empty(0, np.uint64),
    pa.schema([("row", pa.int64()), ("error_kind", pa.string()), ("error", pa.string())]).empty_table(),
)
