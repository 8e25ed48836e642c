"""Folder of files that are named by request id, with `metadata.parquet` and a dataset card next to them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pia_batch.datasets.export_formats import PROGRESS, ExportFormat, Finish, ShardTarget, write_card
from pia_batch.datasets.export_plan import ExportPlan
from pia_batch.datasets.export_rows import Batch, RowReader
from pia_batch.errors import ConfigError, printable
from pia_batch.journal import layout
from pia_batch.journal.dataset_table import ROW_GROUP_ROWS
from pia_batch.media.codecs import CODECS
from pia_batch.schema.dataset_columns import FILE_NAME
from pia_batch.schema.keys import digest
from pia_batch.storage.concurrency import map_in_threads

MAX_NAME_BYTES = 200
"""Longest file name without its extension, in bytes; file systems take 255."""

PUT_THREADS = 16
"""Files that one worker stores at a time."""

_UNSAFE = re.compile(r"[^\w.=,@+-]")
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names that Windows gives to devices, with any extension."""


def safe_name(request_id: str) -> str:
    """Return a file name for a request id: letters, digits and `. = , @ + - _` of it, all others as `_`.

    No name begins with a dot or a dash, is longer than MAX_NAME_BYTES, or is one of Windows' devices.
    """
    name = _UNSAFE.sub("_", unicodedata.normalize("NFC", request_id))
    if name[0] in ".-" or _DEVICES.fullmatch(name):
        name = f"_{name}"
    data = name.encode()
    return name if len(data) <= MAX_NAME_BYTES else data[:MAX_NAME_BYTES].decode(errors="ignore")


def folded_name(request_id: str) -> str:
    """Return the file name as file systems compare it that do not distinguish upper and lower case."""
    return safe_name(request_id).casefold()


def _hashes(names: Iterable[str]) -> npt.NDArray[np.uint64]:
    return digest(pa.array(names, pa.string()), 8).view(np.uint64)


def check(plan: ExportPlan) -> None:
    """Refuse requests whose file names are the same, upper and lower case not distinguished.

    Raises:
        ConfigError: There are such requests; the message names two of them.
    """
    reader = RowReader.of(plan)

    def ids() -> Iterator[list[str]]:
        for shard in plan.shards:
            yield reader.results(shard)["request_id"].to_pylist()

    values, counts = np.unique(np.concatenate([_hashes(map(folded_name, some)) for some in ids()]), return_counts=True)
    repeated = set(values[counts > 1].tolist())
    if not repeated:
        return
    by_name: dict[str, str] = {}
    for some in ids():
        names = [folded_name(name) for name in some]
        for request_id, name, value in zip(some, names, _hashes(names).tolist(), strict=True):
            if value in repeated and (first := by_name.setdefault(name, request_id)) != request_id:
                msg = (
                    f"--format folder: requests {printable(first)!r} and {printable(request_id)!r} have the same file "
                    f"name {safe_name(request_id)!r}; leave one out by --where, or choose another format"
                )
                raise ConfigError(msg)


def write(batches: Iterator[Batch], target: ShardTarget) -> int:
    """Write one object for each animation and each poster, then the shard's part of the table."""
    schema = pa.schema([pa.field(FILE_NAME, pa.string()), *target.schema])
    path, num_bytes = target.folder / "rows.parquet", 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            stems = [safe_name(request_id) for request_id in batch.rows["request_id"].to_pylist()]
            clips = list(zip(stems, batch.clips, strict=True))
            names = [f"{stem}.{CODECS[clip.format].extension}" for stem, clip in clips]
            files = [(name, clip.data) for name, clip in zip(names, batch.clips, strict=True)]
            files += [(f"{stem}.jpg", clip.poster) for stem, clip in clips if clip.poster is not None]
            for _ in map_in_threads(lambda file: target.store.replace(*file), files, PUT_THREADS):
                pass
            num_bytes += sum(len(data) for _, data in files)
            writer.write_table(pa.table([pa.array(names, pa.string()), *batch.rows.columns], schema=schema))
    target.store.replace_file(_table_part(target.shard.number), path)
    return num_bytes


def finish(finish: Finish) -> None:
    """Write the table of all files, then the dataset card, unless there is one: it is a person's to complete."""
    path = finish.folder / "metadata.parquet"
    schema = pa.schema([pa.field(FILE_NAME, pa.string()), *finish.plan.schema])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for shard in finish.written:
            part = finish.store.read(_table_part(shard.number))
            for batch in pq.ParquetFile(pa.BufferReader(part)).iter_batches(ROW_GROUP_ROWS):
                writer.write_batch(batch)
    finish.store.replace_file(layout.DATASET_TABLE, path)
    write_card(finish, [layout.DATASET_TABLE, *_patterns(finish)])


def _patterns(finish: Finish) -> list[str]:
    """Return the patterns of the files, if `datasets` decodes them."""
    if finish.media == "file":
        return []
    return sorted(f"*.{codec.extension}" for codec in CODECS.values() if codec.format in finish.plan.exported_formats)


def _table_part(number: int) -> str:
    return f"{PROGRESS}{number:05d}.parquet"


FOLDER: ExportFormat = ExportFormat(
    "folder",
    "files named by request id, `metadata.parquet` with their columns, and a dataset card `README.md`",
    write,
    None,
    one_media=False,
    posters=True,
    times_as_texts=True,
    check=check,
    finish=finish,
)
