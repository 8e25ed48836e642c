"""Standard output and standard error that are closed, full, a pipe without a reader, or without UTF-8; no folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from finished_outputs import make_output

from pia_batch.cli.console import Stream, err, out
from pia_batch.storage.object_store import Store

CLI = [sys.executable, "-m", "pia_batch.cli"]


def _command(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, check=False, timeout=120, **options)


@pytest.fixture
def plan(write_manifest: Callable[..., str], tmp_path: Path) -> list[str]:
    return [*CLI, "plan", "--manifest", write_manifest(), "--output", str(tmp_path / "out")]


def _pipe_without_reader() -> IO[str]:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_a_reader_that_leaves_early_changes_no_exit_code(plan: list[str]) -> None:
    with _pipe_without_reader() as nowhere:
        done = _command(plan, stdout=nowhere, stderr=subprocess.PIPE)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "code"),
    [("--help", 0), ("plan --help", 0), ("--version", 0), ("unknown", 2), ("plan --wrong", 2)],
)
def test_help_without_a_reader_ends_quietly_with_the_code_of_the_command(words: str, code: int) -> None:
    with _pipe_without_reader() as nowhere:
        done = _command([*CLI, *words.split()], stdout=nowhere, stderr=nowhere)

    assert done.returncode == code


def test_a_watch_ends_when_its_reader_leaves(tmp_path: Path) -> None:
    make_output(Store(str(tmp_path)), ["gif"])
    with _pipe_without_reader() as nowhere:
        done = _command(
            [*CLI, "status", str(tmp_path), "--watch", "--every", "1s"], stdout=nowhere, stderr=subprocess.PIPE
        )

    assert done.returncode == 0, done.stderr


def test_a_full_standard_output_is_one_line_that_names_it(plan: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = _command(plan, stdout=full, stderr=subprocess.PIPE)

    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("pia-batch: standard output cannot be written: [Errno 28] No space left on device; redirect")


def test_a_full_standard_error_keeps_the_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        done = _command([*CLI, "plan", "missing.yaml"], stdout=subprocess.PIPE, stderr=full)

    assert (done.returncode, done.stdout) == (2, "")


def test_closed_streams_keep_the_exit_code(plan: list[str]) -> None:
    done = _command(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *plan])

    assert done.returncode == 0


@pytest.mark.long
def test_text_that_the_encoding_lacks_is_escaped(plan: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    output = str(tmp_path / "é")

    refused = _command([*plan, "--set", "défaults=1"], env=environment, capture_output=True)
    planned = _command([*plan, "--output", output, "--json"], env=environment, capture_output=True)

    assert refused.returncode == 2
    assert "\\xe9" in refused.stderr
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["pending"] > 0


def test_a_name_that_the_file_system_encoding_lacks_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"manifest: {tmp_path}/é.parquet\noutput: {tmp_path}/out\n", encoding="utf-8")
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}

    done = _command([*CLI, "plan", str(tmp_path / "c.yaml")], env=environment, capture_output=True)

    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.endswith("set PYTHONUTF8=1, or LC_ALL to a locale such as C.UTF-8")


def test_a_python_without_docstrings_is_refused() -> None:
    done = _command([sys.executable, "-OO", "-m", "pia_batch.cli", "--version"], capture_output=True)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "pia-batch: PYTHONOPTIMIZE or -OO: Ray does not work without docstrings; use level 1 at most\n"
    )


def test_the_consoles_are_those_of_the_process() -> None:
    assert isinstance(out, Stream)
    assert (out.stderr, err.stderr) == (False, True)


@pytest.mark.parametrize("words", ["plan --manifest /m.parquet --output /o", "demo", "doctor", "status /o"])
def test_a_working_folder_that_was_removed_is_one_line_with_the_remedy(words: str, tmp_path: Path) -> None:
    script = "import os, sys; os.rmdir(os.getcwd()); from pia_batch.cli import main; main(sys.argv[1:])"
    (tmp_path / "gone").mkdir()

    done = _command([sys.executable, "-c", script, *words.split()], cwd=tmp_path / "gone", capture_output=True)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pia-batch: the working folder was removed: change to a folder that exists, and start again\n"
