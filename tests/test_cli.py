"""The command line as a scheduler sees it: output, exit codes, what is imported, and what a kill leaves behind."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import requests_table

from pia_batch import cli, video
from pia_batch.journal import Journal
from pia_batch.lease import Lease
from pia_batch.storage import Store

WriteManifest = Callable[..., str]


def pia_batch(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


def test_a_plan_counts_and_names_what_is_wrong(write_manifest: WriteManifest, tmp_path: Path, capsys) -> None:
    table = requests_table(3, motion_scale=pa.array([0, 9, 1]))

    code = pia_batch("plan", "--manifest", write_manifest(table), "--output", str(tmp_path / "out"))

    printed = capsys.readouterr().out
    assert code == 0
    assert "pending     2" in printed
    assert "rejected    1" in printed
    assert "requests.parquet row 1: column 'motion_scale': 9 is not allowed" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--manifest", "nowhere"], "does not exist"),
        (["--manifest", "EMPTY"], "has no rows"),
        (["--manifest", "NO_PROMPT"], "no column 'prompt'"),
        (["--manifest", "GOOD", "--set", "placement.batchsize=2"], "did you mean 'placement.batch_size'?"),
        (["--manifest", "GOOD", "--set", "nonsense"], "expected section.key=value"),
        (["--manifest", "GOOD", "--set", "model.base=/nowhere"], "model.base"),
        ([], "manifest: required"),
    ],
)
def test_an_operators_mistake_ends_with_exit_code_2_before_ray_starts(
    write_manifest: WriteManifest, tmp_path: Path, capsys, arguments: list[str], text: str
) -> None:
    manifests = {
        "GOOD": requests_table(),
        "EMPTY": requests_table().slice(0, 0),
        "NO_PROMPT": requests_table().drop_columns(["prompt"]),
    }
    arguments = [write_manifest(manifests[word]) if word in manifests else word for word in arguments]

    code = pia_batch("run", *arguments, "--output", str(tmp_path / "out"))

    assert code == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_held_lease_ends_with_exit_code_75(write_manifest: WriteManifest, tmp_path: Path, capsys) -> None:
    store = Store(str(tmp_path / "out"))

    with Lease(store, "the-other-run", ttl_s=3):
        code = pia_batch("run", "--manifest", write_manifest(), "--output", str(tmp_path / "out"))

    assert code == 75
    assert "the-other-run" in capsys.readouterr().err


def test_help_and_plan_import_neither_torch_nor_ray(write_manifest: WriteManifest, tmp_path: Path) -> None:
    script = """
import sys
from pia_batch import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
print(sorted({"torch", "ray", "diffusers", "transformers"} & set(sys.modules)))
"""
    for arguments in (["--help"], ["plan", "--manifest", write_manifest(), "--output", str(tmp_path / "out")]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", arguments


def test_every_command_has_help_with_an_example(capsys) -> None:
    for command in cli.app.registered_commands:
        assert pia_batch(command.callback.__name__, "--help") == 0
        assert f"pia-batch {command.callback.__name__}" in " ".join(capsys.readouterr().out.split())


def test_verify_finds_a_damaged_animation(store: Store, capsys) -> None:
    assert pia_batch("verify", store.uri) == 0
    assert "0 animations verified" in capsys.readouterr().out


# --- the real thing: Ray, the embedded model, processes that die ----------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pia_batch.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == code, printed
    return printed


def wait_for_fragments(output: str, count: int, process: subprocess.Popen[str]) -> None:
    journal = Journal(Store(output))
    while len(journal.fragments()) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def check_by_hand(output: str, request_ids: set[str]) -> None:
    """Count and read everything with pyarrow and hashlib alone."""
    from hashlib import sha256  # noqa: PLC0415

    rows = pq.read_table(next(path.parent for path in Path(output, "results").rglob("_SUCCESS.json"))).to_pylist()
    assert Counter(row["request_id"] for row in rows) == Counter(request_ids)
    assert {row["status"] for row in rows} == {"succeeded"}
    files = {path.as_uri(): path.read_bytes() for path in Path(output, "animations").rglob("*.mp4")}
    assert {row["animation_uri"]: row["sha256"] for row in rows} == {
        uri: sha256(data).hexdigest() for uri, data in files.items()
    }
    for row in rows:
        assert video.probe(files[row["animation_uri"]], "mp4").num_frames == row["num_frames"]


@pytest.mark.slow
def test_a_driver_killed_at_random_moments_loses_and_doubles_nothing(
    write_manifest: WriteManifest, tmp_path: Path
) -> None:
    count, batch = 20, 2
    output = str(tmp_path / "out")
    arguments = ["run", "--manifest", write_manifest(requests_table(count)), "--output", output]
    arguments += ["--set", "defaults.num_inference_steps=4", "--set", f"placement.batch_size={batch}"]
    committed = []
    for fragments in (1, 4):
        process = start(*arguments)
        wait_for_fragments(output, fragments, process)
        time.sleep(random.uniform(0, 0.5))  # any moment will do
        process.kill()
        process.communicate()
        committed.append(len(Journal(Store(output)).outcomes().keys))

    printed = finish(start(*arguments), 0)

    assert committed[0] < committed[1] <= count
    assert f"{count} requests: {count} succeeded, 0 failed" in printed
    computed = int(re.search(r"(\d+) computed", printed)[1])  # engines outlive a driver a little, and commit
    assert count - committed[1] - 2 * batch <= computed <= count - committed[1]
    check_by_hand(output, {f"r{k:03d}" for k in range(count)})
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(output).rglob("*"))
    assert "0 computed in this run" in finish(start(*arguments), 0)
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(output).rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_a_signal_commits_what_is_finished_and_exits_with_4(
    write_manifest: WriteManifest, tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    # Ctrl-C reaches every process of the terminal, a scheduler's SIGTERM the driver alone.
    output = str(tmp_path / "out")
    arguments = ["run", "--manifest", write_manifest(requests_table(30)), "--output", output]
    process = start(*arguments)
    wait_for_fragments(output, 1, process)

    asked = time.monotonic()
    send(process.pid, number)

    printed = finish(process, 4)
    assert time.monotonic() - asked < 55  # `limits.stop_grace_s` is 60, and only for engines that do not answer
    assert "Start again to resume" in printed
    committed = Journal(Store(output)).outcomes()
    assert len(list(Path(output, "animations").rglob("*.mp4"))) == len(committed.keys) < 30


@pytest.mark.slow
def test_the_demo_makes_twelve_animations_and_says_where(tmp_path: Path) -> None:
    printed = finish(start("demo", "--output", str(tmp_path / "demo")), 0)

    files = list((tmp_path / "demo" / "animations").rglob("*.gif"))
    assert len(files) == 12
    assert all(str(path) in printed for path in files)
    assert "12 requests: 12 succeeded, 0 failed; 12 computed" in printed
    assert "0 computed in this run" in finish(start("demo", "--output", str(tmp_path / "demo")), 0)
    assert "12 animations verified, 0 with a problem" in finish(start("verify", str(tmp_path / "demo")), 0)
