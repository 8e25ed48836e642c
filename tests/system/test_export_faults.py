"""`export` killed at random moments, again and again: the files are those of an export that nothing disturbed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from finished_outputs import make_output
from kills import was_killed

from pia_batch import export
from pia_batch.errors import AccountingError, ConfigError
from pia_batch.storage.object_store import Store

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

SUCCESS = "_SUCCESS.json"
CHANGING = ("_transactions/", "_versions/")
"""Files into which Lance writes the time."""

ANIMATIONS, KILLS = 60, 2


def command(output: Path, to: Path, name: str) -> list[str]:
    options = ["--to", str(to), "--format", name, "--shard-size", "4"]
    return [sys.executable, "-m", "pia_batch.cli", "export", str(output), *options]


def files_of(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(CHANGING)}


@pytest.mark.parametrize("name", ["webdataset", "folder", "lance"])
def test_killed_at_any_moment_the_files_are_the_same(tmp_path: Path, name: str) -> None:
    output, dest = tmp_path / "out", tmp_path / "dest"
    make_output(Store(str(output)), ["gif"] * ANIMATIONS)
    export(str(output), str(tmp_path / "whole"), name, shard_size="4")
    luck = random.Random(15)

    def count() -> int:
        return sum(1 for _ in dest.rglob("*"))

    kills = 0
    for _ in range(KILLS):  # after some of its files were written, within what a few shards take
        begun = count()
        kills += was_killed(command(output, dest, name), lambda begun=begun: count() > begun, luck.uniform(0, 0.3))
    assert kills == KILLS
    assert not (dest / SUCCESS).exists()

    export(str(output), str(dest), name, shard_size="4")

    assert (dest / SUCCESS).exists()
    assert files_of(dest) == files_of(tmp_path / "whole")


def test_results_that_change_meanwhile_are_refused(tmp_path: Path) -> None:
    output, dest = tmp_path / "out", tmp_path / "dest"
    make_output(Store(str(output)), ["gif"] * 8)

    def replace(done: int, _: int) -> None:
        if done == 1:
            make_output(Store(str(output)), ["gif"] * 9)

    with pytest.raises(AccountingError, match="were published again meanwhile; export to another folder"):
        export(str(output), str(dest), "webdataset", shard_size="2", on_shard=replace)
    assert not (dest / SUCCESS).exists()
    with pytest.raises(ConfigError, match="has another export"):
        export(str(output), str(dest), "webdataset", shard_size="2")
