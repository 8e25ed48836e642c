"""The statistics of a manifest equal a count row by row, whatever is cached or finished."""

from __future__ import annotations

import os
from collections import Counter
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import requests_table
from manifest_statistics import counts_of, statistics_of, tables
from plans import commit, keys_of

from pia_batch.config import RunConfig
from pia_batch.manifest import files as manifest_files
from pia_batch.manifest.tokens import MAX_TOKENS, least_tokens
from pia_batch.manifest.validation import check
from pia_batch.planning import scan, scan_cache, scan_validate
from pia_batch.planning.plan import Plan, Retry, make_plan
from pia_batch.planning.statistics import WORK, Statistics, work_of


def test_requests_that_cost_alike_are_counted_together_over_all_batches() -> None:
    table = requests_table(6, num_inference_steps=[9, 9, 4, 9, 4, 9], size=[None] * 5 + ["auto"])

    statistics = statistics_of(*(table.slice(k, 1) for k in range(6)))

    assert [(row["steps"], row["width"], row["long_side"], row["num_rows"]) for row in statistics.work.to_pylist()] == [
        (9, 64, None, 3),
        (4, 64, None, 2),
        (9, None, 512, 1),
    ]
    assert (statistics.num_rows, statistics.num_pending, statistics.num_given["num_inference_steps"]) == (6, 6, 6)
    assert statistics.num_given["size"] == 1
    assert statistics.num_given["fps"] == 0


def test_counts_stay_small_over_many_batches() -> None:
    table = requests_table(70, num_inference_steps=[1 + k % 3 for k in range(70)])

    statistics = statistics_of(*(table.slice(k, 1) for k in range(70)))

    assert sum(statistics.work["num_rows"].to_pylist()) == 70
    assert len(statistics._held) < 64


def test_one_seed_for_all_is_seen_and_two_are_not() -> None:
    assert statistics_of(requests_table(3, seed=[7, 7, 7]), requests_table(1, seed=[7])).only_seed == 7
    assert statistics_of(requests_table(2, seed=[7, 7]), requests_table(1, seed=[8])).only_seed is None
    assert statistics_of(requests_table(2)).only_seed is None
    assert Statistics().only_seed is None


def test_gifs_are_counted_by_their_rate() -> None:
    statistics = statistics_of(requests_table(4, fps=[8.0, 12.0, 12.0, 12.0], format=["gif", "gif", "gif", "mp4"]))

    assert statistics.gif_fps == {8.0: 1, 12.0: 2}


def test_prompts_of_certainly_too_many_tokens_are_counted() -> None:
    statistics = statistics_of(
        requests_table(3, prompt=["a " * (MAX_TOKENS - 2), "a " * (MAX_TOKENS - 1), "1" * MAX_TOKENS])
    )

    assert statistics.num_truncated == 2


# --- of a manifest ---------------------------------------------------------------------------------------------------


def counted(plan: Plan, done: set[str]) -> dict[str, Any]:
    """Count row by row; `done` are the keys that are not animated again.

    An id is rejected as a whole where one of its rows is.
    """
    rejected = set(plan.rejected["request_id"].to_pylist())
    num_rows, num_given, truncated, fps, seeds = 0, Counter[str](), 0, Counter[float](), set()
    work = Counter[tuple[Any, ...]]()
    for batch in plan.manifest.batches():
        num_rows += len(batch.table)
        num_given += Counter({name: pa.compute.count(batch.table[name]).as_py() for name in batch.table.column_names})
        requests = check(batch.table, plan.config, plan.engine_ids).requests
        for row, work_row in zip(requests.to_pylist(), work_of(requests).to_pylist(), strict=True):
            if row["key"] in done or row["request_id"] in rejected:
                continue
            work[tuple(work_row[name] for name in WORK.names)] += 1
            truncated += least_tokens(pa.array([row["prompt"]]))[0].as_py() > MAX_TOKENS
            fps += Counter([row["fps"]] if row["format"] == "gif" else [])
            seeds.add(row["seed"])
    return {
        "num_rows": num_rows,
        "num_given": +num_given,
        "num_pending": work.total(),
        "num_truncated": truncated,
        "gif_fps": fps,
        "only_seed": seeds.pop() if len(seeds) == 1 else None,
        "work": work,
    }


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(
    files=st.lists(st.tuples(st.sampled_from(range(8)), tables()), min_size=1, max_size=3),
    finished=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=8),
    again=st.booleans(),
    rows=st.sampled_from([2, 5, 500_000]),
)
def test_the_statistics_of_a_scanned_manifest_are_those_of_its_rows(
    files: list[tuple[int, pa.Table]], finished: list[tuple[int, bool]], again: bool, rows: int
) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_cache, "MIN_ROWS", 0)
        for module, constant in (
            (scan, "CHUNK_ROWS"),
            (scan_validate, "CHECKED_ROWS"),
            (manifest_files, "BATCH_ROWS"),
        ):
            patch.setattr(module, constant, rows)
        config = RunConfig.load(None, {"manifest": f"{name}/manifest", "output": f"{name}/out"})
        (Path(name) / "manifest").mkdir()
        for number, (start, table), changed in zip(count(), files, count(1_700_000_000), strict=False):
            path = Path(name) / "manifest" / f"{number}.parquet"
            ids = pa.array([f"r{row:02d}" for row in range(start, start + len(table))])  # some stand in several files
            pq.write_table(table.set_column(0, "request_id", ids), path)
            os.utime(path, (changed, changed))
        first = make_plan(config)
        keys = sorted(set(keys_of(first)))
        done = {keys[at % len(keys)]: succeeded for at, succeeded in finished if keys}
        commit(config, [key for key, succeeded in done.items() if succeeded], "succeeded")
        commit(config, [key for key, succeeded in done.items() if not succeeded], "failed", "timeout")
        retry = Retry() if again else None
        truth = counted(first, {key for key, succeeded in done.items() if succeeded or not again})

        read, known = Statistics(), Statistics()
        plan = make_plan(config, retry=retry, statistics=read)
        plan.save_scan()
        again_planned = make_plan(config, retry=retry, statistics=known)

        assert (again_planned.new_chunks, counts_of(known)) == ((), truth)
        assert counts_of(read) == truth
        assert plan.num_pending <= read.num_pending  # copies count once there, and each time here


def test_the_statistics_of_a_scanned_manifest_open_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cache, "MIN_ROWS", 0)
    config = RunConfig.load(None, {"manifest": str(tmp_path / "manifest"), "output": str(tmp_path / "out")})
    path = tmp_path / "manifest" / "0.parquet"
    path.parent.mkdir()
    pq.write_table(requests_table(6, width=[64, 64, 128, 64, 64, 128]), path)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    read, known = Statistics(), Statistics()
    make_plan(config, statistics=read).save_scan()
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, (1_700_000_000, 1_700_000_000))

    make_plan(config, statistics=known)

    assert counts_of(known) == counts_of(read)
    assert known.num_pending == 6
