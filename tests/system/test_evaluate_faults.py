"""`evaluate` killed at random moments, again and again: the parts are those of a call that nothing disturbed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from evaluated import publish_output, shifted
from kills import was_killed

from pia_batch.storage.object_store import Store

CLIPS = 40


def command(output: str, evaluation_id: str) -> list[str]:
    return [sys.executable, "-m", "pia_batch.cli", "evaluate", output, "--id", evaluation_id]


def parts_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


@pytest.mark.long
def test_killed_at_any_moment_the_rows_are_the_same(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    clips = {f"{k:03d}": shifted(16, 256, (k % 3, 1), seed=k) if k % 7 else None for k in range(CLIPS)}
    publish_output(store, clips)
    subprocess.run(command(store.uri, "whole"), check=True, capture_output=True)
    evaluations = tmp_path / "out" / "evaluations"
    killed, whole = evaluations / "killed", parts_of(evaluations / "whole")
    rng, measured = random.Random(17), [0]

    def count() -> int:
        return len(list(killed.glob("_pieces/*.parquet")))

    kills = int(
        was_killed(command(store.uri, "killed"), lambda: True, rng.uniform(1, 3))
    )  # before anything is measured
    for _ in range(2):
        measured.append(count())
        kills += was_killed(command(store.uri, "killed"), lambda: count() > measured[-1], rng.uniform(0, 0.3))
    measured.append(count())
    subprocess.run(command(store.uri, "killed"), check=True, capture_output=True)

    assert kills >= 2
    assert measured == sorted(measured)
    assert (killed / "_SUCCESS.json").exists()
    assert parts_of(killed) == whole
    rows = [row for path in sorted(killed.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert Counter(row["request_id"] for row in rows) == Counter(list(clips))
    assert {row["error_kind"] for row in rows} == {None, "not_animated"}
