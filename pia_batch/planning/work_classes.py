"""What decides the work and the warnings of each request of a manifest, kept in a byte or so a row.

Few requests differ in it: rows that have all of CLASS in common are a *class*, and a row is the number of its class.
Whoever knows which requests are pending counts the numbers, and needs no rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.manifest.tokens import are_truncated
from pia_batch.manifest.validation import seeds_of
from pia_batch.schema.columns import GROUPED

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
    ]
)
"""What decides the work and the bytes of a request. `steps` are those that are drawn, FreeInit's passes and `strength`
reckoned in; `width` and `height` are null where they come from the image."""

CLASS = pa.schema([*WORK, ("gif_fps", pa.float64()), ("truncated", pa.bool_())])
"""`gif_fps` is the frame rate of a GIF, null of another format; `truncated`, whether the prompt has certainly more than
`tokens.MAX_TOKENS`."""


@dataclass(frozen=True)
class Traits:
    """Of neighbouring rows of a manifest.

    Attributes:
        num_rows: good and bad ones.
        num_given: how many of them have a value of their own, by column.
        classes: CLASS, every row another.
        class_of: the row of `classes` that each good row is; unsigned, shape (n,).
        seeds: of the good rows, int64, shape (n,); None: no row has one of its own, so that they are `seeds_of` the
            hashes of their ids.
    """

    num_rows: int
    num_given: Counter[str]
    classes: pa.Table
    class_of: npt.NDArray[np.unsignedinteger]
    seeds: npt.NDArray[np.int64] | None

    @classmethod
    def of(cls, rows: pa.Table, requests: pa.Table) -> Traits:
        """Those of rows as they stand in the manifest, and of the good ones as `validation.check` gives them."""
        num_given = Counter({name: len(rows) - rows[name].null_count for name in rows.column_names})
        seeds = np.asarray(requests["seed"], np.int64) if num_given["seed"] else None
        gif_fps = pc.if_else(pc.equal(requests["format"], "gif"), requests["fps"], None)
        truncated = are_truncated(requests["prompt"].combine_chunks())
        told = pa.table([*work_of(requests).columns, gif_fps, truncated], schema=CLASS)
        return cls(len(rows), num_given, *_classified(told), seeds)

    @classmethod
    def joined(cls, parts: Sequence[Traits], id_hashes: Sequence[npt.NDArray[np.uint64]]) -> Traits:
        """Those of rows that follow each other; `id_hashes` are of the good rows of each part."""
        classes, renumbered = _classified(pa.concat_tables([part.classes for part in parts]))
        starts = np.cumsum([0, *(len(part.classes) for part in parts)])
        class_of = [renumbered[start:][part.class_of] for start, part in zip(starts, parts, strict=False)]
        seeds = None
        if any(part.seeds is not None for part in parts):
            pairs = zip(parts, id_hashes, strict=True)
            seeds = np.concatenate([seeds_of(ids) if part.seeds is None else part.seeds for part, ids in pairs])
        num_given = sum((part.num_given for part in parts), Counter[str]())
        return cls(sum(part.num_rows for part in parts), num_given, classes, np.concatenate(class_of), seeds)

    @property
    def groups(self) -> pa.Table:
        """GROUPED and `num_rows`: how many good rows can be drawn together."""
        counts = np.bincount(self.class_of, minlength=len(self.classes))
        return summed(self.classes.append_column("num_rows", pa.array(counts, pa.int64())), GROUPED)

    def packed(self) -> bytes:
        """As bytes: 2 kB for a million rows of one class, 0.3 to 1.3 MB for 3 to 250 classes in no order (measured).

        Seeds of their own add up to 8 MB; classes, where every row is another one, 20 MB.
        """
        told = json.dumps({"num_rows": self.num_rows, "num_given": self.num_given})
        rows = {"class": pa.array(self.class_of)} | ({} if self.seeds is None else {"seed": pa.array(self.seeds)})
        sink = pa.BufferOutputStream()
        for table in (self.classes.replace_schema_metadata({"told": told}), pa.table(rows)):
            with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
                stream.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def unpacked(cls, packed: bytes) -> Traits:
        """What `packed` was made of."""
        source = pa.BufferReader(packed)
        classes, rows = (pa.ipc.open_stream(source).read_all() for _ in range(2))
        told = json.loads(classes.schema.metadata[b"told"])
        seeds = np.asarray(rows["seed"]) if "seed" in rows.column_names else None
        classes = classes.replace_schema_metadata()
        return cls(told["num_rows"], Counter(told["num_given"]), classes, np.asarray(rows["class"]), seeds)


def work_of(requests: pa.Table) -> pa.Table:
    """WORK of requests or results that have `records.SETTINGS` and `model`, row by row."""
    passes = pc.cast(pc.max_element_wise(pc.fill_null(requests["free_init_iters"], 0), 1), pa.float64())
    # FreeInit's fast passes have 1/n, 2/n, ... of the steps.
    fast = pc.fill_null(requests["free_init_fast"], False)
    passes = pc.if_else(fast, pc.divide(pc.add(passes, 1.0), 2.0), passes)
    drawn = pc.floor(pc.multiply(pc.cast(requests["num_inference_steps"], pa.float64()), requests["strength"]))
    made = {"steps": pc.multiply(drawn, passes), "guided": pc.greater(requests["guidance_scale"], 1.0)}
    auto = pc.equal(requests["size"], "auto")
    for name in ("width", "height"):
        made[name] = pc.if_else(auto, None, requests[name])
    return pa.table({name: made[name] if name in made else requests[name] for name in WORK.names}).cast(WORK)


def summed(counts: pa.Table, names: Sequence[str]) -> pa.Table:
    """`num_rows` of all rows of `counts` that have the columns `names` in common, after these."""
    return counts.group_by(list(names)).aggregate([("num_rows", "sum")]).rename_columns([*names, "num_rows"])


def _classified(table: pa.Table) -> tuple[pa.Table, npt.NDArray[np.unsignedinteger]]:
    """The distinct rows of a table, and which of them each row is: the smallest unsigned type that can tell."""
    varying = [name for name in table.column_names if not _is_constant(table[name].combine_chunks())]
    if not varying:  # not a slice, which would be all of the rows where it is pickled
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
