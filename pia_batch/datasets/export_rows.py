"""Rows of one shard on a worker: read from the results, each animation fetched, checked and, on demand, transcoded."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pia_batch.config import EncodingConfig, Format
from pia_batch.datasets.export_plan import NEEDED, ExportPlan, Published, Shard
from pia_batch.errors import AccountingError, ConfigError, EncodingError, printable
from pia_batch.journal import layout
from pia_batch.media import codecs
from pia_batch.media.provenance import Provenance
from pia_batch.schema import far_times
from pia_batch.schema.dataset_columns import DatasetColumns
from pia_batch.schema.key_prompts import described
from pia_batch.storage.object_store import Store

FETCH_THREADS = 16
"""Animations of one shard that are fetched and checked at a time."""

TRANSCODE_THREADS = 2
"""Animations of one shard that are transcoded at a time; codecs hold most of a CPU."""

BATCH_BYTES = 8 * 2**20
"""Size of the animations that are written together, in bytes; a row group of Parquet."""


@dataclass(frozen=True)
class Clip:
    """One animation as it is exported.

    Attributes:
        key: Content key of its request.
        format: Its format.
        data: Its bytes.
        poster: Its poster, a JPEG; None: it has none.
    """

    key: str
    format: Format
    data: bytes
    poster: bytes | None = None

    @property
    def name(self) -> str:
        """File name: the key and the extension."""
        return f"{self.key}.{codecs.CODECS[self.format].extension}"


@dataclass(frozen=True)
class Batch:
    """Neighbouring rows and their animations.

    Attributes:
        rows: Chosen columns; `format`, `num_bytes` and `sha256` are those of the exported files.
        prompts: Prompt of each row.
        clips: Animation of each row.
    """

    rows: pa.Table
    prompts: list[str]
    clips: list[Clip]


@dataclass(frozen=True)
class RowReader:
    """Reader of shards. It can be pickled.

    Attributes:
        published: Results that are exported.
        columns: Columns of the export.
        names: Names of the chosen columns.
        texts: Names of the chosen columns that are exported as texts.
        transcode: Format of the exported animations; None: as they are.
        posters: True to read the posters too.
    """

    published: Published
    columns: DatasetColumns
    names: tuple[str, ...]
    texts: tuple[str, ...]
    transcode: Format | None
    posters: bool = False

    @classmethod
    def of(cls, plan: ExportPlan, *, posters: bool = False) -> RowReader:
        """Return the reader of a plan's shards."""
        return cls(plan.published, plan.columns, plan.names, plan.texts, plan.transcode, posters)

    def results(self, shard: Shard) -> pa.Table:
        """Return the rows of a shard with the columns of the results."""
        pieces = [_part(self.published, name).take(pa.array(rows)) for name, rows in shard.rows]
        return pa.concat_tables(pieces).combine_chunks()

    def chosen(self, results: pa.Table) -> pa.Table:
        """Return the chosen columns of these rows of results."""
        return far_times.with_texts(self.columns.rows(results, self.names), self.texts)

    def batches(self, shard: Shard) -> Iterator[Batch]:
        """Yield the rows of a shard, in order, with their animations.

        Raises:
            AccountingError: An animation is missing, or its bytes are not those that were committed.
            ConfigError: An animation cannot be transcoded.
            StorageError: The store refused or did not answer.
        """
        results = self.results(shard)
        rows, prompts = self.chosen(results), _prompts(results)
        needed = [*NEEDED, "fps", "loop_count", "num_frames", "duration_s"]
        if self.posters and "poster_uri" in results.column_names:
            needed += ["poster_uri", "poster_sha256"]
        wanted = results.select(needed).to_pylist()
        threads = TRANSCODE_THREADS if self.transcode else FETCH_THREADS
        store, start, num_bytes, clips = self.published.store, 0, 0, list[Clip]()
        for clip in store.each(functools.partial(fetch, store, self.transcode), wanted, threads):
            clips.append(clip)
            num_bytes += len(clip.data)
            if num_bytes >= BATCH_BYTES:
                yield self._batch(rows, prompts, start, clips)
                start, num_bytes, clips = start + len(clips), 0, []
        if clips:
            yield self._batch(rows, prompts, start, clips)

    def _batch(self, rows: pa.Table, prompts: list[str], start: int, clips: list[Clip]) -> Batch:
        table = rows.slice(start, len(clips))
        if self.transcode is not None:
            actual: dict[str, list[Any]] = {
                "format": [clip.format for clip in clips],
                "num_bytes": [len(clip.data) for clip in clips],
                "sha256": [hashlib.sha256(clip.data).hexdigest() for clip in clips],
            }
            for name, values in actual.items():
                at = table.schema.get_field_index(name)
                if at >= 0:
                    item = table.schema.field(at)
                    table = table.set_column(at, item, pa.array(values, item.type))
        return Batch(table, prompts[start : start + len(clips)], clips)


_last_part: list[tuple[tuple[str, str], pa.Table]] = []
"""The part that this process has read last: neighbouring shards are mostly of one part."""


def _part(published: Published, name: str) -> pa.Table:
    identity = (published.store.uri, name)
    if not _last_part or _last_part[0][0] != identity:
        _last_part[:] = [(identity, published.read(name))]
    return _last_part[0][1]


def fetch(store: Store, transcode: Format | None, row: dict[str, Any]) -> Clip:
    """Return the animation of a result row.

    Args:
        store: Output.
        transcode: Format of the clip; None: the row's own.
        row: Result with the columns NEEDED, `fps`, `loop_count`, `num_frames` and `duration_s`, and with `poster_uri`
            and `poster_sha256` where its poster is wanted.

    Raises:
        AccountingError: The animation or its poster is missing, or its bytes are not those that were committed.
        ConfigError: It cannot be transcoded.
        StorageError: The store refused or did not answer.
    """
    data = _read(store, row, "animation", row["animation_uri"], row["sha256"])
    poster_uri = row.get("poster_uri")
    poster = None if poster_uri is None else _read(store, row, "poster", poster_uri, row["poster_sha256"])
    if transcode is None or transcode == row["format"]:
        return Clip(row["key"], row["format"], data, poster)
    try:
        return Clip(row["key"], transcode, _transcoded(data, row, transcode), poster)
    except EncodingError as err:
        uri = store.uri_of(layout.animation_name_in(row["animation_uri"]))
        shown = f"animation {uri} of request {printable(row['request_id'])!r}"
        raise ConfigError(f"--transcode {transcode}: {shown}: {err}; leave it out by --where") from None


def _transcoded(data: bytes, row: dict[str, Any], transcode: Format) -> bytes:
    """Return the same frames at the same rate in another format, with the file's provenance."""
    frames = codecs.decode(data, row["format"])
    fps = len(frames) / row["duration_s"] if row["duration_s"] else row["fps"]
    if row["fps"] and abs(fps - row["fps"]) < 0.1 * row["fps"]:
        fps = row["fps"]  # durations of a GIF are rounded to 10 ms
    try:
        found = Provenance.found_in(codecs.comments(data))
    except (EncodingError, ValueError):
        found = None
    metadata = found.metadata if found else None
    return codecs.encode(frames, transcode, fps, EncodingConfig(), metadata, loop_count=row["loop_count"] or 0)


def _read(store: Store, row: dict[str, Any], what: str, uri: str, sha256: str) -> bytes:
    """Return an object that a result names, and refuse any other bytes than were committed."""
    name = layout.animation_name_in(uri)
    try:
        data = store.read(name)
    except FileNotFoundError:
        problem = "does not exist"
    else:
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        problem = "has other bytes than its result states (sha256)"
    msg = (
        f"{what} {store.uri_of(name)} of request {printable(row['request_id'])!r} {problem}; `pia-batch verify "
        "--repair` finds all such animations, and the next run generates them again"
    )
    raise AccountingError(msg)


def _prompts(results: pa.Table) -> list[str]:
    """Return the prompt of each result; of several, all of them with their frames."""
    keys = results["prompts"].to_pylist() if "prompts" in results.column_names else [None] * len(results)
    prompts = zip(results["prompt"].to_pylist(), keys, strict=True)
    return [described(own or ()) if prompt is None else prompt for prompt, own in prompts]
