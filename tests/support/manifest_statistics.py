"""Statistics of manifests, and manifests to count."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.manifest.validation import check
from pia_batch.planning.statistics import Statistics, WorkClasses
from pia_batch.planning.words import words_of

CELLS = {
    "seed": st.sampled_from([None, 1, 2, -1]),
    "num_inference_steps": st.sampled_from([None, 2, 9]),
    "strength": st.sampled_from([None, 0.5, 7.0]),
    "format": st.sampled_from([None, "gif", "mp4"]),
    "fps": st.sampled_from([None, 8.0, 12.0]),
    "size": st.sampled_from([None, "auto", "fixed"]),
    "prompt": st.sampled_from(["a cat", "a " * 76, ""]),
}
TYPES = {"seed": pa.int64(), "num_inference_steps": pa.int64(), "strength": pa.float64(), "fps": pa.float64()}
COLUMNS = st.sets(st.sampled_from(sorted(CELLS)), min_size=1)


@st.composite
def tables(draw: st.DrawFn, max_rows: int = 12) -> pa.Table:
    names, count = sorted(draw(COLUMNS)), draw(st.integers(1, max_rows))
    cells = {name: draw(st.lists(CELLS[name], min_size=count, max_size=count)) for name in names}
    return requests_table(
        count, **{name: pa.array(values, TYPES.get(name, pa.string())) for name, values in cells.items()}
    )


CONFIG = RunConfig.load(None, {"manifest": "m", "output": "o"})


def statistics_of(*batches: pa.Table, config: RunConfig = CONFIG) -> Statistics:
    """Count these rows; all valid ones are pending."""
    statistics = Statistics()
    for rows in batches:
        checked = check(rows, config, dict.fromkeys(config.all_models, "e" * 32))
        pending = np.ones(len(checked.keys), dtype=bool)
        statistics.add(WorkClasses.of(rows, checked.requests, words_of(config)), checked.id_hashes, pending)
    return statistics


def counts_of(statistics: Statistics) -> dict[str, Any]:
    """Return all counts of statistics."""
    return {
        "num_rows": statistics.num_rows,
        "num_given": +statistics.num_given,
        "num_pending": statistics.num_pending,
        "num_truncated": statistics.num_truncated,
        "gif_fps": statistics.gif_fps,
        "only_seed": statistics.only_seed,
        "work": Counter({tuple(row.values())[:-1]: row["num_rows"] for row in statistics.work.to_pylist()}),
    }
