"""`evaluate` killed at random moments, again and again: the parts are those of a call that nothing disturbed."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from evaluated import publish_output, shifted
from kills import was_killed

from pia_batch.evaluation import job
from pia_batch.storage.object_store import Store

CLIPS = 40


def command(output: str, evaluation_id: str) -> list[str]:
    return [sys.executable, "-m", "pia_batch.cli", "evaluate", output, "--id", evaluation_id]


def parts_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_killed_at_any_moment_the_rows_are_the_same(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    clips = {f"{k:03d}": shifted(8, 128, (k % 3, 1), seed=k) if k % 7 else None for k in range(CLIPS)}
    publish_output(store, clips)
    job.evaluate(store.uri, evaluation_id="whole")
    evaluations = tmp_path / "out" / "evaluations"
    killed, whole = evaluations / "killed", parts_of(evaluations / "whole")
    luck, measured = random.Random(17), [0]

    def count() -> int:
        return len(list(killed.glob("_pieces/*.parquet")))

    early = was_killed(command(store.uri, "killed"), lambda: True, luck.uniform(1, 3))  # before anything is measured
    measured.append(count())
    late = was_killed(command(store.uri, "killed"), lambda: count() > measured[-1], luck.uniform(0, 0.3))
    measured.append(count())
    assert (early, late) == (True, True)
    assert not (killed / "_SUCCESS.json").exists()

    job.evaluate(store.uri, evaluation_id="killed")

    assert measured == sorted(measured)
    assert (killed / "_SUCCESS.json").exists()
    assert parts_of(killed) == whole
    rows = [row for path in sorted(killed.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert Counter(row["request_id"] for row in rows) == Counter(list(clips))
    assert {row["error_kind"] for row in rows} == {None, "not_animated"}
