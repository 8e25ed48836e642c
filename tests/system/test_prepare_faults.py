"""`prepare` killed at random moments, again and again: the manifest is the one of a call that nothing disturbed."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import foreign_datasets as foreign
import pyarrow.parquet as pq
import pytest
from kills import was_killed

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
def test_killed_at_any_moment_the_manifest_is_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for k in range(FILES):
        rows = foreign.image_table(ROWS, id=[f"{k}-{row}" for row in range(ROWS)])
        pq.write_table(rows, source / f"{k:02d}.parquet", row_group_size=50)
    subprocess.run(command(source, tmp_path / "whole"), check=True, capture_output=True)
    whole = files_of(tmp_path / "whole")
    rng = random.Random(15)

    def count() -> int:
        return len(list((tmp_path / "dest").rglob("*.json")))

    kills = 0
    for _ in range(4):  # after some of its files were written, within what one file takes
        begun = count()
        delay = rng.uniform(0, 0.4)
        kills += was_killed(command(source, tmp_path / "dest"), lambda begun=begun: count() > begun, delay)
    subprocess.run(command(source, tmp_path / "dest"), check=True, capture_output=True)
    assert kills >= 2
    assert (tmp_path / "dest" / SUCCESS).exists()
    assert files_of(tmp_path / "dest") == whole
