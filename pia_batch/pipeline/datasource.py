"""Ray Data source of a manifest, read in pieces by the workers, with the same checks as during planning.

Ray's own readers end their worker where a footer is corrupt, and decompress without a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pia_batch.manifest.files import BATCH_ROWS
from pia_batch.manifest.pieces import PIECE_BYTES, Piece
from pia_batch.manifest.reader import Manifest

_PIECES_PER_TASK = 32
"""Maximum number of small files that one task reads in sequence, each with a few round trips to the store."""


def dataset(manifest: Manifest) -> ray.data.Dataset:
    """Return the rows of a manifest as a lazy Dataset of blocks in its schema; the driver releases those it holds.

    Reading raises ManifestError and InterruptedRunError as `Piece.tables` does; either ends the run.
    """
    manifest.release()
    source = ManifestDatasource(manifest)
    return ray.data.read_datasource(source, override_num_blocks=len(source.bundles))


class ManifestDatasource(Datasource):  # type: ignore[misc] # Ray is untyped here
    """Source of all pieces of an opened manifest. One task reads one large piece, or several small ones."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self._schema = manifest.schema
        self.bundles = list(_bundles(manifest.pieces()))

    def estimate_inmemory_data_size(self) -> int:
        """Return the number of bytes of all rows."""
        return sum(piece.num_bytes for bundle in self.bundles for piece in bundle)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Return one task for each bundle, whatever number Ray asks for."""
        del parallelism, data_context
        return [
            ReadTask(_reader(bundle, self._schema), _metadata(bundle), self._schema, per_task_row_limit)
            for bundle in self.bundles
        ]


def _bundles(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Yield groups of neighbouring pieces, each group no larger than a single piece may be."""
    waiting: list[Piece] = []
    for piece in pieces:
        together = [*waiting, piece]
        rows, num_bytes = (sum(getattr(each, name) for each in together) for name in ("num_rows", "num_bytes"))
        if waiting and (rows > BATCH_ROWS or num_bytes > PIECE_BYTES or len(together) > _PIECES_PER_TASK):
            yield tuple(waiting)
            together = [piece]
        waiting = together
    if waiting:
        yield tuple(waiting)


def _reader(bundle: Sequence[Piece], schema: pa.Schema) -> Callable[[], Iterator[pa.Table]]:
    def read_manifest() -> Iterator[pa.Table]:
        for piece in bundle:
            yield from piece.tables(schema)

    return read_manifest


def _metadata(bundle: Sequence[Piece]) -> BlockMetadata:
    return BlockMetadata(
        num_rows=sum(piece.num_rows for piece in bundle),
        size_bytes=sum(piece.num_bytes for piece in bundle),
        input_files=sorted({piece.file.path for piece in bundle}),
        exec_stats=None,
    )
