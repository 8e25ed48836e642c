"""`prepare` killed at random moments, again and again: the manifest is the one of a call that nothing disturbed."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import foreign_datasets as foreign
import pyarrow.parquet as pq
import pytest
from kills import was_killed

from pia_batch import prepare
from pia_batch.datasets.part_files import SUCCESS

ROWS, FILES, KILLS = 400, 12, 2
OPTIONS: dict[str, Any] = {
    "prompt": "{caption}, cinematic",
    "columns": {"request_id": "id"},
    "vary": ["seed=1,2"],
}


def command(source: Path, to: Path) -> list[str]:
    options = ["--prompt", "{caption}, cinematic", "--column", "request_id=id", "--vary", "seed=1,2"]
    return [sys.executable, "-m", "pia_batch.cli", "prepare", str(source), "--to", str(to), *options]


def files_of(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        name: data for name, data in found.items() if "#" not in name
    }  # what a killed writer left, which no reader sees


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_killed_at_any_moment_the_manifest_is_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rows = foreign.image_table(ROWS)
    for k in range(FILES):
        own = rows.set_column(0, "id", [[f"{k}-{row}" for row in range(ROWS)]])
        pq.write_table(own, source / f"{k:02d}.parquet", row_group_size=50)
    prepare(source, tmp_path / "whole", **OPTIONS)
    whole = files_of(tmp_path / "whole")
    luck = random.Random(15)

    def count() -> int:
        return len(list((tmp_path / "dest").rglob("*.json")))

    kills = 0
    for _ in range(KILLS):  # after some of its files were written, within what one file takes
        begun = count()
        delay = luck.uniform(0, 0.4)
        kills += was_killed(command(source, tmp_path / "dest"), lambda begun=begun: count() > begun, delay)
    assert kills == KILLS
    assert not (tmp_path / "dest" / SUCCESS).exists()

    prepare(source, tmp_path / "dest", **OPTIONS)

    assert (tmp_path / "dest" / SUCCESS).exists()
    assert files_of(tmp_path / "dest") == whole
