"""A job whose own Ray is killed: one line, exit code 4, and the same command continues."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import foreign_datasets as foreign
import psutil
import pyarrow.parquet as pq
import pytest
from evaluated import publish_output, shifted
from finished_outputs import make_output

from pia_batch.storage.object_store import Store

pytestmark = [pytest.mark.long, pytest.mark.slow]


def prepared(folder: Path) -> list[str]:
    (folder / "source").mkdir()
    rows = foreign.image_table(400)
    for k in range(12):
        own = rows.set_column(0, "id", [[f"{k}-{row}" for row in range(400)]])
        pq.write_table(own, folder / "source" / f"{k:02d}.parquet", row_group_size=50)
    options = ["--prompt", "{caption}, cinematic", "--column", "request_id=id"]
    return ["prepare", str(folder / "source"), "--to", str(folder / "to"), *options]


def exported(folder: Path) -> list[str]:
    make_output(Store(str(folder / "out")), ["gif"] * 60)
    return ["export", str(folder / "out"), "--to", str(folder / "to"), "--format", "webdataset", "--shard-size", "1"]


def evaluated(folder: Path) -> list[str]:
    clips = {f"{k:03d}": shifted(16, 128, (k % 3, 1), seed=k) for k in range(40)}
    publish_output(Store(str(folder / "out")), clips)
    return ["evaluate", str(folder / "out"), "--id", "one"]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def child(process: subprocess.Popen[str], program: str) -> psutil.Process | None:
    for each in psutil.Process(process.pid).children():
        with suppress(psutil.Error):  # it has ended meanwhile
            if f"/{program} " in " ".join(each.cmdline()):
                return each
    return None


@pytest.mark.parametrize(
    ("make", "program"),
    [(prepared, "raylet"), (exported, "raylet"), (evaluated, "gcs_server")],
)
def test_a_job_whose_ray_is_killed_ends_with_one_line_and_4(
    tmp_path: Path, make: Callable[[Path], list[str]], program: str
) -> None:
    arguments = make(tmp_path)
    before = files(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "pia_batch.cli", *arguments],
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while (found := child(process, program)) is None or len(files(tmp_path) - before) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)

    found.kill()
    _, printed = process.communicate(timeout=120)

    lines = [line for line in printed.splitlines() if " INFO " not in line]
    assert process.returncode == 4, printed
    assert lines[-1].startswith(f"pia-batch: Ray has ended on this machine: {program} (exit code -9)")
    assert lines[-1].endswith("start again to resume")
    assert "Traceback" not in printed
