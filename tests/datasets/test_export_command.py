"""The command `export` on processes, signals and a bucket of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from finished_outputs import make_output

from pia_batch import cli
from pia_batch.datasets.export_table import FORMATS
from pia_batch.storage.object_store import Store

CHANGING = ("_transactions/", "_versions/", "_delta_log/")

pytestmark = pytest.mark.slow


@dataclass
class Export:
    """A started command, which prints into a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self, code: int) -> str:
        assert self.process.wait(120) == code, self.log.read_text()
        return self.log.read_text()


def start(folder: Path, *arguments: str) -> Export:
    path = folder / f"log-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "pia_batch.cli", "export", *arguments]
    with path.open("wb") as file:
        environment = os.environ | {"RAY_ADDRESS": "local"}
        return Export(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment), path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def steady(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.startswith(CHANGING)}


@pytest.mark.long
@pytest.mark.s3
def test_every_format_goes_from_a_bucket_to_a_bucket_and_to_a_disk(s3: str, tmp_path: Path) -> None:
    make_output(Store(f"{s3}/out"), ["mp4"] * 3)
    script = f"""
from pia_batch import export
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", object_store_memory=10**8)
for name in {list(FORMATS)}:
    export("{s3}/out", f"{s3}/{{name}}", name)
    export("{s3}/out", f"{tmp_path}/{{name}}", name)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"})

    for name in FORMATS:
        store = Store(f"{s3}/{name}")
        found = {item.name: store.read(item.name) for item in store.list("")}
        assert steady(found) == steady(files(tmp_path / name))
        assert "_SUCCESS.json" in found


@pytest.mark.long
def test_the_command_says_what_it_wrote_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_output(Store(str(tmp_path / "out")), ["gif"] * 3)
    arguments = [str(tmp_path / "out"), "--to", str(tmp_path / "to"), "--format", "folder", "--columns", "prompt, seed"]

    printed = start(tmp_path, *arguments).finish(0)

    assert "3 animations of run run-1, " in printed
    assert f"folder: file://{tmp_path}/to" in printed
    assert "lance is not fork-safe" not in printed
    assert "Traceback" not in printed
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *arguments, "--json"])
    assert end.value.code in (None, 0)
    payload = json.loads(capsys.readouterr().out)
    assert (payload["rows"], payload["written"], payload["format"]) == (3, 0, "folder")
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *arguments[:-1], "prompt,,seed"])
    assert end.value.code == 2
    assert "--columns: invalid value" in capsys.readouterr().err


@pytest.mark.long
def test_sigterm_stops_an_export_with_4_and_it_is_continued(tmp_path: Path) -> None:
    make_output(Store(str(tmp_path / "out")), ["mp4"] * 100)
    arguments = [str(tmp_path / "out"), "--to", str(tmp_path / "to"), "--format", "webdataset", "--shard-size", "1"]
    export = start(tmp_path, *arguments)
    while not list((tmp_path / "to").glob("part-*.tar")):
        time.sleep(0.01)
    export.process.send_signal(signal.SIGTERM)

    assert "the export was stopped; start it again to continue" in export.finish(4)
    assert not (tmp_path / "to" / "_SUCCESS.json").exists()
    assert "100 animations of run run-1" in start(tmp_path, *arguments).finish(0)
