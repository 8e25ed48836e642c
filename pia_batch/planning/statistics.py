"""Statistics of a manifest's pending requests: counts that stay small whatever the size of the manifest.

Few requests differ in what decides their work and their warnings. Rows that agree in all of CLASS form one *work
class*, and a row is stored as the number of its class, in about one byte. As soon as the pending rows are known, they
are counted by their numbers, without reading the rows again.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config.contexts import computed_frames
from pia_batch.config.finishing import INTERPOLATE_NS, MATCH_NS, SHARPEN_NS
from pia_batch.manifest.effective import seeds_of
from pia_batch.manifest.tokens import are_truncated
from pia_batch.planning.words import NO_WORDS, Words, count_words
from pia_batch.schema.columns import CALL_FRAMES, GROUPED

WORK = pa.schema(
    [
        ("model", pa.string()),
        ("format", pa.string()),
        ("num_frames", pa.int64()),
        ("size", pa.string()),
        ("long_side", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("num_inference_steps", pa.int64()),
        ("steps", pa.float64()),
        ("guided", pa.bool_()),
        ("computed_frames", pa.float64()),
        ("interpolate", pa.int64()),
        ("upscale", pa.int64()),
        ("finish_ns", pa.float64()),
        (CALL_FRAMES, pa.int64()),
    ]
)
"""Columns that decide the work and the bytes of a request. `steps` is the number of steps that are computed, with the
passes of FreeInit and `strength` taken into account. `width` and `height` are null if they come from the image.
`computed_frames` is the number of frames that the UNet computes at each step, more than `num_frames` where windows
overlap; `call_frames` is the number of frames of one of its calls. `interpolate` multiplies the stored frames,
and `upscale` their sides. `finish_ns` is the time that a core takes to finish a pixel of the generated frames, in
nanoseconds."""

CLASS = pa.schema([*WORK, ("gif_fps", pa.float64()), ("truncated", pa.bool_())])
"""Columns of a work class. `gif_fps` is the frame rate of a stored GIF, null for another format. `truncated` is true if
the prompt, or one of its prompts, certainly has more than `tokens.MAX_TOKENS` tokens."""

_HELD_TABLES = 64
_MAX_SEED = np.iinfo(np.int64).max


@dataclass(frozen=True)
class WorkClasses:
    """Work classes of neighbouring rows of a manifest.

    Attributes:
        num_rows: Number of rows, valid and rejected ones.
        num_given: Number of rows with a value of their own, by column.
        classes: Distinct classes, with the columns CLASS.
        class_of: Index into `classes` for each valid row; unsigned, shape (n,).
        seeds: Seeds of the valid rows, int64, shape (n,); None if no row has a seed of its own, so that all seeds are
            `seeds_of` the hashes of the request ids.
        num_using: Number of valid rows that use a word of a textual inversion, by `words.key_of` model and word.
    """

    num_rows: int
    num_given: Counter[str]
    classes: pa.Table
    class_of: npt.NDArray[np.unsignedinteger]
    seeds: npt.NDArray[np.int64] | None
    num_using: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, rows: pa.Table, requests: pa.Table, words: Words = NO_WORDS) -> WorkClasses:
        """Classify some rows.

        Args:
            rows: All of them, as they are in the manifest.
            requests: The valid ones, as `validation.check` returns them.
            words: Words of the textual inversions of each model.
        """
        num_given = Counter({name: len(rows) - rows[name].null_count for name in rows.column_names})
        seeds = np.asarray(requests["seed"], np.int64) if num_given["seed"] else None
        stored_fps = pc.multiply(requests["fps"], pc.cast(requests["interpolate"], pa.float64()))
        gif_fps = pc.if_else(pc.equal(requests["format"], "gif"), stored_fps, None)
        truncated = _truncated(requests)
        classified = pa.table([*work_of(requests).columns, gif_fps, truncated], schema=CLASS)
        return cls(len(rows), num_given, *_classified(classified), seeds, count_words(requests, words))

    @classmethod
    def joined(cls, parts: Sequence[WorkClasses], id_hashes: Sequence[npt.NDArray[np.uint64]]) -> WorkClasses:
        """Join the classes of consecutive rows; `id_hashes` are those of the valid rows of each part."""
        classes, renumbered = _classified(pa.concat_tables([part.classes for part in parts]))
        starts = np.cumsum([0, *(len(part.classes) for part in parts)])
        class_of = [renumbered[start:][part.class_of] for start, part in zip(starts, parts, strict=False)]
        seeds = None
        if any(part.seeds is not None for part in parts):
            pairs = zip(parts, id_hashes, strict=True)
            seeds = np.concatenate([seeds_of(ids) if part.seeds is None else part.seeds for part, ids in pairs])
        num_given = sum((part.num_given for part in parts), Counter[str]())
        num_using = sum((part.num_using for part in parts), Counter[str]())
        num_rows = sum(part.num_rows for part in parts)
        return cls(num_rows, num_given, classes, np.concatenate(class_of), seeds, num_using)

    @property
    def groups(self) -> pa.Table:
        """Table of GROUPED and `num_rows`: the number of valid rows that can share a batch."""
        counts = np.bincount(self.class_of, minlength=len(self.classes))
        return summed(self.classes.append_column("num_rows", pa.array(counts, pa.int64())), GROUPED)

    def packed(self) -> bytes:
        """Serialize: 2 kB for a million rows of one class, 0.3 to 1.3 MB for 3 to 250 classes in random order.

        Both were measured. Seeds of the rows' own add up to 8 MB per million rows; classes add 20 MB if every row has
        a class of its own.
        """
        counts = json.dumps({"num_rows": self.num_rows, "num_given": self.num_given, "num_using": self.num_using})
        rows = {"class": pa.array(self.class_of)} | ({} if self.seeds is None else {"seed": pa.array(self.seeds)})
        sink = pa.BufferOutputStream()
        for table in (self.classes.replace_schema_metadata({"counts": counts}), pa.table(rows)):
            with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
                stream.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def unpacked(cls, packed: bytes) -> WorkClasses:
        """Deserialize what `packed` returned."""
        source = pa.BufferReader(packed)
        classes, rows = (pa.ipc.open_stream(source).read_all() for _ in range(2))
        counts = json.loads(classes.schema.metadata[b"counts"])
        seeds = np.asarray(rows["seed"]) if "seed" in rows.column_names else None
        classes = classes.replace_schema_metadata()
        num_given, num_using = Counter[str](counts["num_given"]), Counter[str](counts["num_using"])
        return cls(counts["num_rows"], num_given, classes, np.asarray(rows["class"]), seeds, num_using)


class Statistics:
    """Counts over the rows of a manifest, added part by part."""

    def __init__(self) -> None:
        self._held: list[pa.Table] = []
        self.num_rows = 0
        """Number of rows of the manifest."""
        self.num_given: Counter[str] = Counter()
        """Number of rows with a value of their own, by column."""
        self.num_using: Counter[str] = Counter()
        """Number of valid rows that use a word of a textual inversion, by `words.key_of` model and word."""
        self.num_pending = 0
        """Number of pending rows; identical copies of a request are counted separately."""
        self.num_truncated = 0
        """Number of pending requests whose prompt certainly has more than `tokens.MAX_TOKENS` tokens."""
        self.gif_fps: Counter[float] = Counter()
        """Number of pending GIFs, by frame rate."""
        self._seeds: list[int] = []

    def add(self, rows: WorkClasses, id_hashes: npt.NDArray[np.uint64], pending: npt.NDArray[np.bool_]) -> None:
        """Count some rows.

        Args:
            rows: Work classes of all these rows.
            id_hashes: `validation.hashes_of` the ids of the valid rows; shape (n,).
            pending: Mask of the valid rows that are pending; shape (n,).
        """
        self.num_rows += rows.num_rows
        self.num_given += rows.num_given
        self.num_using += rows.num_using
        counts = np.bincount(rows.class_of[pending], minlength=len(rows.classes))
        if not counts.any():
            return
        counted = rows.classes.append_column("num_rows", pa.array(counts, pa.int64())).filter(pa.array(counts > 0))
        self.num_pending += int(counts.sum())
        self.num_truncated += pc.sum(counted.filter(counted["truncated"])["num_rows"]).as_py() or 0
        gifs = counted.filter(pc.is_valid(counted["gif_fps"])).select(["gif_fps", "num_rows"])
        for fps, count in zip(*gifs.to_pydict().values(), strict=True):
            self.gif_fps[fps] += count
        seeds = seeds_of(id_hashes) if rows.seeds is None else rows.seeds
        self._seeds += [int(seeds.min(where=pending, initial=_MAX_SEED)), int(seeds.max(where=pending, initial=0))]
        self._seeds = [min(self._seeds), max(self._seeds)]
        self._held.append(summed(counted, WORK.names))  # there may be many more classes than kinds of work
        if len(self._held) == _HELD_TABLES:
            self._held = [self.work]

    @property
    def work(self) -> pa.Table:
        """Table of WORK and `num_rows`, the number of pending rows with the same work; the most frequent first."""
        empty = WORK.append(pa.field("num_rows", pa.int64())).empty_table()
        counts = summed(pa.concat_tables([empty, *self._held]), WORK.names)
        return counts.sort_by([("num_rows", "descending"), *((name, "ascending") for name in WORK.names)])

    @property
    def only_seed(self) -> int | None:
        """Seed that all pending requests share; None if they have several, or if none is pending."""
        return self._seeds[0] if self._seeds and self._seeds[0] == self._seeds[1] else None


def _truncated(requests: pa.Table) -> pa.Array:
    """Return for each row if one of its prompts certainly has more than `tokens.MAX_TOKENS` tokens; bool."""
    prompts, keys = (requests[name].combine_chunks() for name in ("prompt", "prompts"))
    if not prompts.null_count:
        return are_truncated(prompts)
    texts = pc.struct_field(pc.list_flatten(keys), "prompt")
    rows = np.concatenate([np.flatnonzero(prompts.is_valid()), pc.list_parent_indices(keys)])
    found = np.asarray(are_truncated(pa.concat_arrays([prompts.drop_null(), texts])))
    truncated = np.zeros(len(requests), bool)
    truncated[rows[found]] = True
    return pa.array(truncated)


def work_of(requests: pa.Table) -> pa.Table:
    """Return the columns WORK, row by row, of requests or results that have `columns.SETTINGS` and `model`."""
    passes = pc.cast(pc.max_element_wise(pc.fill_null(requests["free_init_iters"], 0), 1), pa.float64())
    # FreeInit's fast passes have 1/n, 2/n, ... of the steps.
    fast = pc.fill_null(requests["free_init_fast"], False)
    passes = pc.if_else(fast, pc.divide(pc.add(passes, 1.0), 2.0), passes)
    computed = pc.floor(pc.multiply(pc.cast(requests["num_inference_steps"], pa.float64()), requests["strength"]))
    derived = {"steps": pc.multiply(computed, passes), "guided": pc.greater(requests["guidance_scale"], 1.0)}
    auto = pc.equal(requests["size"], "auto")
    for name in ("width", "height"):
        derived[name] = pc.if_else(auto, None, requests[name])
    derived["computed_frames"] = _computed_frames(requests)
    derived["interpolate"] = _given(requests, "interpolate", 1)
    between = pc.cast(pc.subtract(derived["interpolate"], 1), pa.float64())
    matched = pc.cast(pc.cast(_given(requests, "color_match", False), pa.int8()), pa.float64())
    sharpened = pc.cast(pc.cast(pc.greater(_given(requests, "sharpen", 0.0), 0.0), pa.int8()), pa.float64())
    derived["upscale"] = _given(requests, "upscale", 1)
    area = pc.cast(pc.multiply(derived["upscale"], derived["upscale"]), pa.float64())
    between, sharpened = pc.multiply(between, area), pc.multiply(sharpened, area)  # both follow the upscaler
    parts = ((between, INTERPOLATE_NS), (matched, MATCH_NS), (sharpened, SHARPEN_NS))
    derived["finish_ns"] = functools.reduce(pc.add, (pc.multiply(part, rate) for part, rate in parts))
    derived[CALL_FRAMES] = call_frames(requests)
    return pa.table({name: derived[name] if name in derived else requests[name] for name in WORK.names}).cast(WORK)


def _given(requests: pa.Table, name: str, off: object) -> pa.Array | pa.ChunkedArray:
    """Return a setting of requests or results; `off` where results of earlier releases do not have it."""
    if name not in requests.column_names:
        return pa.repeat(off, len(requests))
    return pc.fill_null(requests[name], off)


def call_frames(requests: pa.Table) -> pa.Array | pa.ChunkedArray:
    """Return the column CALL_FRAMES of requests or results: rows that agree in it share UNet calls."""
    if "context" not in requests.column_names:
        return requests["num_frames"]
    in_parts = pc.is_in(requests["context"], pa.array(["windows", "chain"]))
    return pc.if_else(in_parts, requests["context_length"], requests["num_frames"])


def _computed_frames(requests: pa.Table) -> pa.Array | pa.ChunkedArray:
    """Return `contexts.computed_frames` of each row; few rows differ in what decides it."""
    if "context" not in requests.column_names or requests["context"].null_count == len(requests):
        return requests["num_frames"].cast(pa.float64())
    classes, class_of = _classified(requests.select(_FRAMES))
    frames = pa.array([computed_frames(row) for row in classes.to_pylist()], pa.float64())
    return frames.take(pa.array(class_of))


_FRAMES = ("num_frames", "context", "context_length", "context_overlap", "context_stride", "loop")


def summed(counts: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return the columns `names` and the sum of `num_rows` over all rows that agree in them."""
    return counts.group_by(list(names)).aggregate([("num_rows", "sum")]).rename_columns([*names, "num_rows"])


def _classified(table: pa.Table) -> tuple[pa.Table, npt.NDArray[np.unsignedinteger]]:
    """Return the distinct rows of a table, and the index of each row among them in the smallest unsigned type."""
    varying = [name for name in table.column_names if not _is_constant(table[name].combine_chunks())]
    if not varying:  # not a slice: pickling a slice writes all rows
        return table.take(pa.array(np.arange(min(1, len(table))))), np.zeros(len(table), np.uint8)
    numbered = table.select(varying).append_column("row", pa.array(np.arange(len(table))))
    members = numbered.group_by(varying, use_threads=False).aggregate([("row", "list")])["row_list"].combine_chunks()
    lengths, rows = np.asarray(members.value_lengths()), np.asarray(members.flatten())
    numbers = np.empty(len(table), np.min_scalar_type(len(members) - 1))
    numbers[rows] = np.repeat(np.arange(len(members)), lengths)
    return table.take(pa.array(rows[np.cumsum(lengths) - lengths])), numbers


def _is_constant(column: pa.Array) -> bool:
    if column.null_count or len(column) <= 1:
        return len(column) <= 1 or column.null_count == len(column)
    return bool(pc.all(pc.equal(column, column[0])).as_py())
