"""`prepare` killed at random moments, again and again: the manifest is the one of a call that nothing disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import foreign_datasets as foreign
import pyarrow.parquet as pq
import pytest

from pia_batch.datasets.part_files import SUCCESS

ROWS, FILES = 400, 12


def command(source: Path, to: Path) -> list[str]:
    options = ["--prompt", "{caption}, cinematic", "--column", "request_id=id", "--vary", "seed=1,2"]
    return [sys.executable, "-m", "pia_batch.cli", "prepare", str(source), "--to", str(to), *options]


def files_of(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        name: data for name, data in found.items() if "#" not in name
    }  # what a killed writer left, which no reader sees


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_at_any_moment_the_manifest_is_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for k in range(FILES):
        rows = foreign.image_table(ROWS, id=[f"{k}-{row}" for row in range(ROWS)])
        pq.write_table(rows, source / f"{k:02d}.parquet", row_group_size=50)
    subprocess.run(command(source, tmp_path / "whole"), check=True, capture_output=True)
    whole = files_of(tmp_path / "whole")
    rng = random.Random(15)
    kills = 0
    for attempt in range(40):
        begun = len(list((tmp_path / "dest").rglob("*.json"))) if (tmp_path / "dest").exists() else 0
        process = subprocess.Popen(
            command(source, tmp_path / "dest"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if attempt < 4:  # after some of its files were written, within what one file takes
            while len(list((tmp_path / "dest").rglob("*.json"))) <= begun and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.4))
        elif process.wait(timeout=300) == 0:
            break
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    assert (tmp_path / "dest" / SUCCESS).exists()
    assert files_of(tmp_path / "dest") == whole
