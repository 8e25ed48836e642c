"""What a manifest's pending requests have in common: counts that stay small whatever its size. Asks no tokenizer."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

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

MAX_TOKENS = 77
"""What CLIP's text encoder reads, its two markers included; of a longer prompt the end is lost."""

_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}\p{Z}\p{C}]+"
"""What CLIP's tokenizer cuts a text into before it looks into its vocabulary: each becomes one token or more. Marks and
the letters that they stand on count as one, as it puts them together first.

Source: openai/CLIP `simple_tokenizer.py`."""

_HELD_TABLES = 64


class Survey:
    """Sees a manifest go by, as a `judging.Survey`, and counts."""

    def __init__(self) -> None:
        self._held: list[pa.Table] = []
        self.num_rows = 0
        """Of the manifest."""
        self.num_given: Counter[str] = Counter()
        """How many rows have a value of their own, by column."""
        self.num_pending = 0
        """Pending requests; copies of one count as often as they stand there."""
        self.num_truncated = 0
        """Pending requests whose prompt has certainly more than MAX_TOKENS tokens."""
        self.gif_fps: Counter[float] = Counter()
        """Pending GIFs by their rate."""
        self._seeds: list[int] = []

    def empty(self) -> Survey:
        """One that has seen nothing."""
        return Survey()

    def add(self, other: Survey) -> None:
        """Count what `other` has seen."""
        self.num_rows += other.num_rows
        self.num_given += other.num_given
        self.num_pending += other.num_pending
        self.num_truncated += other.num_truncated
        self.gif_fps += other.gif_fps
        self._see_seeds(other._seeds)
        self._hold(other.work)

    def __call__(self, rows: pa.Table, pending: pa.Table) -> None:
        """Count one batch: its rows as they stand in the manifest, and those of its requests that are to be drawn."""
        self.num_rows += len(rows)
        for name in rows.column_names:
            self.num_given[name] += len(rows) - rows[name].null_count
        if not len(pending):
            return
        self.num_pending += len(pending)
        self._see_seeds([*pc.min_max(pending["seed"]).as_py().values()])
        prompts = pending["prompt"]
        # Each token but the markers takes a byte at least, and to count them is slow.
        long = prompts.filter(pc.greater(pc.binary_length(prompts), MAX_TOKENS - 2))
        self.num_truncated += pc.sum(pc.greater(least_tokens(long), MAX_TOKENS)).as_py() or 0
        gifs = pending.filter(pc.equal(pending["format"], "gif"))["fps"]
        self.gif_fps.update({pair["values"]: pair["counts"] for pair in gifs.value_counts().to_pylist()})
        self._hold(_counted(work_of(pending), ([], "count_all")))

    def _see_seeds(self, seeds: list[int]) -> None:
        if seeds:
            self._seeds = [min(self._seeds + seeds), max(self._seeds + seeds)]

    def _hold(self, counts: pa.Table) -> None:
        self._held.append(counts)
        if len(self._held) == _HELD_TABLES:
            self._held = [self.work]

    @property
    def work(self) -> pa.Table:
        """WORK and `num_rows`, how many pending requests have it in common; the most frequent first."""
        empty = WORK.append(pa.field("num_rows", pa.int64())).empty_table()
        counts = _counted(pa.concat_tables([empty, *self._held]), ("num_rows", "sum"))
        return counts.sort_by([("num_rows", "descending"), *((name, "ascending") for name in WORK.names)])

    @property
    def only_seed(self) -> int | None:
        """The seed that all pending requests share; None: there is more than one, or no request."""
        return self._seeds[0] if self._seeds and self._seeds[0] == self._seeds[1] else None


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


def least_tokens(prompts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A lower bound of the tokens of each prompt, markers included. int32."""
    return pc.add(pc.count_substring_regex(prompts, _WORDS), pa.scalar(2, pa.int32()))


def _counted(table: pa.Table, how: tuple[str | list[str], str]) -> pa.Table:
    counts = table.group_by(WORK.names).aggregate([how])
    return counts.rename_columns([*WORK.names, "num_rows"])
