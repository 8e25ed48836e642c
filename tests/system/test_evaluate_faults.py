"""`evaluate` killed at random moments, again and again: the parts are those of a call that nothing disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from evaluated import publish_output, shifted

from pia_batch.storage.object_store import Store

CLIPS = 40


def command(output: str, evaluation_id: str) -> list[str]:
    return [sys.executable, "-m", "pia_batch.cli", "evaluate", output, "--id", evaluation_id]


def parts_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_at_any_moment_the_rows_are_the_same(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    clips = {f"{k:03d}": shifted(16, 256, (k % 3, 1), seed=k) if k % 7 else None for k in range(CLIPS)}
    publish_output(store, clips)
    subprocess.run(command(store.uri, "whole"), check=True, capture_output=True)
    evaluations = tmp_path / "out" / "evaluations"
    killed, whole = evaluations / "killed", parts_of(evaluations / "whole")
    rng, kills, measured = random.Random(17), 0, [0]

    for attempt in range(30):
        process = subprocess.Popen(
            command(store.uri, "killed"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if attempt == 0:
            time.sleep(rng.uniform(1, 3))  # before anything is measured
        elif attempt < 3:
            while len(list(killed.glob("_pieces/*.parquet"))) <= measured[-1] and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
        else:
            assert process.wait(timeout=300) == 0
            break
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        measured.append(len(list(killed.glob("_pieces/*.parquet"))))

    assert kills >= 2
    assert measured == sorted(measured)
    assert (killed / "_SUCCESS.json").exists()
    assert parts_of(killed) == whole
    rows = [row for path in sorted(killed.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert Counter(row["request_id"] for row in rows) == Counter(list(clips))
    assert {row["error_kind"] for row in rows} == {None, "not_animated"}
