"""Published outputs with real animation files, made without an engine."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from journals import key, keyset

from pia_batch.config import EncodingConfig
from pia_batch.datasets.export import WriteShard, make_plan
from pia_batch.datasets.export_formats import Finish
from pia_batch.datasets.export_plan import Published, ShardSize
from pia_batch.datasets.export_rows import RowReader
from pia_batch.datasets.export_table import FORMATS
from pia_batch.journal.layout import animation_name, poster_name
from pia_batch.journal.log import Journal
from pia_batch.journal.results import publish
from pia_batch.media import codecs
from pia_batch.media.posters import make_poster
from pia_batch.schema.columns import results_table
from pia_batch.storage.object_store import Store

FRAMES, SIDE, FPS = 3, 16, 8


@functools.cache
def animation(number: int, file_format: str) -> bytes:
    """Return the animation of a numbered request: a real file of FRAMES frames of SIDE x SIDE pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    return codecs.encode(pixels, file_format, FPS, EncodingConfig())


def poster(number: int) -> bytes:
    """Return the poster of a numbered request: a real JPEG of the first frame of its MP4."""
    return make_poster(codecs.decode(animation(number, "mp4"), "mp4")[0])


def make_output(
    store: Store,
    formats: Sequence[str],
    *,
    carried: pa.Table | None = None,
    failed: int = 0,
    run_id: str = "run-1",
    first: int = 0,
    request_ids: Sequence[str] | None = None,
    posters: Sequence[int] = (),
) -> Journal:
    """Publish results: one request for each format, numbered from `first`, then some that failed.

    Args:
        store: Output.
        formats: Format of each succeeded request.
        carried: Carried columns, with a row for each request.
        failed: Number of failed requests.
        run_id: Name of the results.
        first: Number of the first request.
        request_ids: Ids; None: `r000` and so on.
        posters: Numbers of the succeeded requests that have a poster.
    """
    record, total = Journal(store), len(formats) + failed
    numbers = range(first, first + total)
    data = [animation(number, name) for number, name in zip(numbers, formats, strict=False)]
    names = [animation_name(key(n), codecs.CODECS[name].extension) for n, name in zip(numbers, formats, strict=False)]
    for name, content in zip(names, data, strict=True):
        store.replace(name, content)
    missing = [None] * failed
    done = len(data)

    def each(value: Any) -> list[Any]:
        return [value] * done + missing

    columns = {
        "request_id": request_ids or [f"r{number:03d}" for number in numbers],
        "key": [key(number) for number in numbers],
        "status": ["succeeded"] * done + ["failed"] * failed,
        "error_kind": [None] * done + ["non_finite"] * failed,
        "animation_uri": [*map(store.uri_of, names), *missing],
        "image": [f"images/{number}.png" for number in numbers],
        "prompt": [f"prompt {number}" for number in numbers],
        "model": ["default"] * total,
        "format": [*formats, *missing],
        "width": each(SIDE),
        "height": each(SIDE),
        "num_frames": each(FRAMES),
        "fps": each(FPS),
        "loop_count": each(0),
        "duration_s": each(FRAMES / FPS),
        "motion": [float(number) for number in range(done)] + missing,
        "seed": list(numbers),
        "num_bytes": [*map(len, data), *missing],
        "sha256": [*(hashlib.sha256(content).hexdigest() for content in data), *missing],
        "run_id": [run_id] * total,
    }
    made: dict[str, list[Any]] = {name: [None] * total for name in ("poster_uri", "poster_num_bytes", "poster_sha256")}
    for number in posters:
        content, name = poster(number), poster_name(key(number))
        store.replace(name, content)
        facts = (store.uri_of(name), len(content), hashlib.sha256(content).hexdigest())
        for column, fact in zip(made.values(), facts, strict=True):
            column[number - first] = fact
    columns |= made
    extra = pa.table({}) if carried is None else carried
    table = results_table({name: pa.array(values) for name, values in columns.items()}, extra, total)
    record.append(table)
    publish(
        record, record.outcomes(), keyset(*numbers), extra.schema, run_id, {"models": {"default": {"base": "embedded"}}}
    )
    return record


def export_here(output: str, folder: Path, file_format: str) -> None:
    """Export an output to `folder / "to"` in this process, without Ray."""
    chosen, target = FORMATS[file_format], Store(str(folder / "to"))
    published = Published.find(Store(output), None)
    plan = make_plan(published, None, None, None, ShardSize(rows=2), None, texts=chosen.times_as_texts)
    media, reader = chosen.media_of(plan), RowReader.of(plan)
    chosen.check(plan)
    task = WriteShard(chosen, reader, target, plan.schema, media, len(plan.shards))
    (folder / "finish").mkdir()
    written = [task.write(shard) for shard in plan.shards]
    chosen.finish(Finish(target, plan, reader, written, media, folder / "finish"))
