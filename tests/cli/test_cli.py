"""The command line as a scheduler sees it: output, exit codes, imports, and the output after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_outputs import make_output
from inputs import png, requests_table

from pia_batch import cli, tiny
from pia_batch.config import EncodingConfig
from pia_batch.journal.layout import CREATE_ONLY_PROBE, animation_name
from pia_batch.journal.lease import Lease
from pia_batch.journal.log import Journal
from pia_batch.media import codecs
from pia_batch.schema.columns import results_table
from pia_batch.storage.object_store import Store

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


def test_a_plan_of_mixed_rows_lists_the_groups_that_share_batches(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = requests_table(14, num_frames=[8, 8, 4, *range(9, 20)], size=["auto"] * 2 + [None] * 12)

    code = pia_batch("plan", "--manifest", write_manifest(table), "--output", str(tmp_path / "out"))

    payload = capsys.readouterr().out
    assert code == 0
    assert "group       2 rows: default, 8 frames, up to 512 px; 1 batch\n" in payload
    assert "1 rows: default, 4 frames, 64 x 64; 1 batch\n" in payload
    assert "and 3 more groups" in payload


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


def test_help_imports_none_of_the_large_libraries() -> None:
    script = """
import sys
from pia_batch import cli
try:
    cli.main(["run", "--help"])
except SystemExit:
    pass
print(sorted({"numpy", "pyarrow", "ruamel", "torch", "ray"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help_with_an_example(capsys) -> None:
    for command in cli.app.registered_commands:
        assert pia_batch(command.callback.__name__, "--help") == 0
        assert f"pia-batch {command.callback.__name__}" in " ".join(capsys.readouterr().out.split())


def test_the_version_is_the_packages(capsys) -> None:
    assert pia_batch("--version") == 0
    assert capsys.readouterr().out == f"pia-batch {version('pia-batch')}\n"


@pytest.mark.parametrize("command", ["status", "verify", "gc"])
def test_an_output_that_no_run_wrote_to_is_an_error_and_stays_absent(tmp_path: Path, capsys, command: str) -> None:
    assert pia_batch(command, str(tmp_path / "tpyo")) == 2
    assert "no run has ever written to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def finished_output(store: Store, count: int = 3) -> Journal:
    """Write an output with valid GIFs, as a run does, and one failure; return its journal."""
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    made = [f"{k:032x}" for k in range(count)]
    files = [codecs.encode(frames + 40 * k, "gif", 8.0, EncodingConfig()) for k in range(count)]
    for key, data in zip(made, files, strict=True):
        store.create(animation_name(key, "gif"), data)
    rows: dict[str, Any] = {
        "request_id": [f"r{k}" for k in range(count)],
        "key": made,
        "animation_uri": [store.uri_of(animation_name(key, "gif")) for key in made],
        "num_bytes": [len(data) for data in files],
        "sha256": [hashlib.sha256(data).hexdigest() for data in files],
    }
    same = {"status": "succeeded", "format": "gif", "width": 16, "height": 16, "num_frames": 2}
    columns = {name: pa.array(column) for name, column in rows.items()} | {n: pa.scalar(v) for n, v in same.items()}
    journal = Journal(store)
    journal.append(results_table(columns, pa.table({}), count))
    failed = {"key": pa.scalar("f" * 32), "status": pa.scalar("failed"), "error_kind": pa.scalar("timeout")}
    journal.append(results_table(failed, pa.table({}), 1))
    store.check(CREATE_ONLY_PROBE)
    return journal


def config_of(store: Store, tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(f"manifest: nowhere\noutput: {store.uri}\n")
    return str(tmp_path / "run.yaml")


def test_verify_finds_no_problem_in_valid_animations(store: Store, tmp_path: Path, capsys) -> None:
    finished_output(store)

    for place in (store.uri, config_of(store, tmp_path)):
        assert pia_batch("verify", place) == 0
        assert "3 animations verified, 0 with a problem" in capsys.readouterr().out
    assert pia_batch("verify", store.uri, "--repair") == 0
    assert len(list(store.list("animations/"))) == 3


def test_verify_groups_what_is_wrong_and_repairs_it(store: Store, capsys) -> None:
    journal = finished_output(store, 5)
    names = [animation_name(f"{k:032x}", "gif") for k in range(5)]
    store.delete(names[0])
    store.delete(names[1])
    data = store.read(names[2])
    store.replace(names[2], data[:-1] + b"?")
    store.replace(names[3], store.read(names[3])[:-1])

    assert pia_batch("verify", store.uri) == 3
    printed = capsys.readouterr().out
    assert re.search(r"missing  2 .*\n  r0: .*does not exist\n  r1: ", printed)
    assert re.search(r"size  1 .*\n  r3: ", printed)
    assert re.search(r"content  1 .*\n  r2: ", printed)
    assert "5 animations verified, 4 with a problem" in printed
    assert len(list(store.list("animations/"))) == 3  # looking changes nothing

    with Lease(store, "a-run", ttl_s=3):
        assert pia_batch("verify", store.uri, "--repair") == 75
    assert "a-run" in capsys.readouterr().err
    assert len(list(store.list("animations/"))) == 3

    assert pia_batch("verify", store.uri, "--repair") == 3
    assert "their requests need regeneration: `pia-batch run` generates them again" in capsys.readouterr().out
    assert [item.name for item in store.list("animations/")] == [names[4]]
    assert journal.outcomes().needs_regeneration == 4
    assert pia_batch("verify", store.uri) == 0
    assert pia_batch("status", store.uri) == 0
    assert "regenerate  4" in capsys.readouterr().out


def test_verify_finds_a_dataset_that_is_not_that_of_the_results_and_writes_it_again(store: Store, capsys) -> None:
    make_output(store, ["gif", "gif"])
    assert pia_batch("verify", store.uri) == 0
    store.delete("metadata.parquet")

    assert pia_batch("verify", store.uri) == 3
    assert "metadata.parquet does not exist: `--repair` writes the dataset again" in capsys.readouterr().out
    assert pia_batch("verify", store.uri, "--repair") == 3
    assert "metadata.parquet does not exist: written again" in capsys.readouterr().out
    assert pia_batch("verify", store.uri) == 0


def test_gc_lists_and_deletes_only_on_demand_and_never_during_a_run(store: Store, tmp_path: Path, capsys) -> None:
    finished_output(store)
    orphan = animation_name("e" * 32, "gif")
    store.create(orphan, b"orphan")

    assert pia_batch("gc", store.uri, "--delete") == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" MB")]
    assert re.search(r"animations and posters that no result names +0 objects", listed[0])
    assert len({line.index(" objects ") for line in listed}) == 1  # numbers end below each other
    assert max(map(len, listed)) <= 80
    assert pia_batch("gc", config_of(store, tmp_path), "--older-than", "0s") == 0
    printed = capsys.readouterr().out
    assert orphan in printed
    assert re.search(r"animations and posters that no result names +1 objects", printed)
    assert "nothing was changed" in printed
    assert store.stat(orphan).num_bytes == 6

    with Lease(store, "a-run", ttl_s=3):
        assert pia_batch("gc", store.uri, "--older-than", "0s", "--delete") == 75
    assert store.stat(orphan).num_bytes == 6

    capsys.readouterr()
    assert pia_batch("gc", store.uri, "--older-than", "0s", "--delete", "--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["garbage"]["animations"] == {"objects": 1, "bytes": 6}
    assert payload["deleted"] is True
    assert len(list(store.list("animations/"))) == 3
    assert pia_batch("verify", store.uri) == 0


@pytest.mark.parametrize("text", ["7", "d", "-1d", "1w", "7 d", "9" * 400 + "d"])
def test_an_age_without_a_unit_is_refused_with_an_example(store: Store, capsys, text: str) -> None:
    finished_output(store)

    assert pia_batch("gc", store.uri, f"--older-than={text}") == 2
    assert "such as 12h or 7d" in capsys.readouterr().err


def test_status_names_the_run_that_works_here_also_as_json(store: Store, capsys) -> None:
    finished_output(store)
    record = {"run_id": "night", "started_at": "2026-11-01T00:00:00+00:00", "pending": 9, "rejected": 1}
    record |= {"manifest": "m", "output": store.uri, "version": "0.1.0"}
    store.replace("_runs/night/run.json", json.dumps(record).encode())

    with Lease(store, "night", ttl_s=60):
        assert pia_batch("status", store.uri) == 0
        printed = capsys.readouterr().out
        assert pia_batch("status", store.uri, "--json") == 0
        payload = json.loads(capsys.readouterr().out)

    assert "last run   night  started 2026-11-01T00:00:00Z, 9 pending then, not finished" in printed
    assert re.search(r"lease      night on \S+ since 20\S+, renewed \d+ s ago", printed)
    assert "succeeded  3\nfailed     1\n  timeout  1" in printed
    assert payload["failures"] == {"timeout": 1}
    assert (payload["run"]["finished"], payload["lease"]["state"], payload["published"]) == (False, "held", None)
    assert pia_batch("status", store.uri) == 0
    assert "lease      free" in capsys.readouterr().out


def test_status_distinguishes_a_silent_run_from_a_working_one(store: Store, tmp_path: Path, capsys) -> None:
    finished_output(store)
    state = {"run_id": "gone", "released": False, "ttl_s": 60.0, "host": "elsewhere", "since": "2026-11-01"}
    store.create("_lease/000000000001.json", json.dumps(state).encode())
    long_ago = time.time() - 3600
    os.utime(tmp_path / "out" / "_lease" / "000000000001.json", (long_ago, long_ago))

    assert pia_batch("status", store.uri) == 0

    assert "gone on elsewhere since 2026-11-01, SILENT" in capsys.readouterr().out


def test_retrying_an_unknown_kind_ends_with_exit_code_2_and_the_kinds_there_are(
    write_manifest: WriteManifest, store: Store, capsys
) -> None:
    finished_output(store)

    code = pia_batch("retry", "--manifest", write_manifest(), "--output", store.uri, "--kind", "tiemout")

    assert code == 2
    assert "the kind tiemout; did you mean timeout?; this output's journal has: timeout (1)" in (
        capsys.readouterr().err
    )


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
        assert codecs.probe(files[row["animation_uri"]], "mp4").num_frames == row["num_frames"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_driver_killed_at_a_random_moment_loses_and_doubles_nothing(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, batch = 16, 2
    output = str(tmp_path / "out")
    arguments = ["run", "--manifest", write_manifest(requests_table(count)), "--output", output]
    arguments += ["--set", "defaults.num_inference_steps=2", "--set", f"placement.batch_size={batch}"]
    process = start(*arguments)
    wait_for_fragments(output, 2, process)
    time.sleep(random.Random(3).uniform(0, 0.5))  # any moment will do
    process.kill()
    process.communicate()
    committed = len(Journal(Store(output)).outcomes().keys)

    assert pia_batch(*arguments) == 0

    printed = capsys.readouterr().out
    assert 2 * batch <= committed < count
    assert f"{count} requests: {count} succeeded, 0 failed" in printed
    computed = int(re.search(r"(\d+) computed", printed)[1])  # engines outlive a driver a little, and commit
    assert count - committed - 2 * batch <= computed <= count - committed
    check_by_hand(output, {f"r{k:03d}" for k in range(count)})
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(output).rglob("*"))
    assert pia_batch(*arguments) == 0
    assert "0 computed in this run" in capsys.readouterr().out
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(output).rglob("*")) == before


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_requests_that_are_retried_or_repaired_are_processed_again_and_no_others(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed_by(*arguments: str, code: int) -> str:
        assert pia_batch(*arguments) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    output = str(tmp_path / "out")
    pictures = ["images/0.png", "images/1.png", "images/2.png", "images/late.png", "images/3.png"]
    manifest = write_manifest(requests_table(5, image=pictures, seed=[0, 1, 2, 3, -1]))
    where = ["--manifest", manifest, "--output", output, "--set", "defaults.num_inference_steps=2"]
    assert "`pia-batch retry` with the same options" in printed_by("run", *where, code=3)
    log = Journal(Store(output))
    rows = [row for table in log.winning_rows(log.outcomes()) for row in table.to_pylist()]
    (late,) = [row["error_kind"] for row in rows if row["image"] == "images/late.png"]
    (tmp_path / "manifest" / "images" / "late.png").write_bytes(png(9))

    printed = printed_by("retry", *where, "--kind", late, code=3)  # the rejected row stays failed

    assert "5 requests: 4 succeeded, 1 failed; 1 computed in this run" in printed
    assert "1 rows were rejected" in printed

    files = sorted(Path(output, "animations").rglob("*.mp4"))
    untouched = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files[2:]}
    files[0].unlink()
    files[1].write_bytes(files[2].read_bytes())
    printed_by("verify", output, "--repair", code=3)
    printed = printed_by("run", *where, code=3)
    assert "5 requests: 4 succeeded, 1 failed; 2 computed in this run" in printed
    assert "4 animations verified, 0 with a problem" in printed_by("verify", output, code=0)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files[2:]} == untouched
    newest = json.loads(Path(output, "results", "LATEST.json").read_bytes())["run_id"]
    shown = pq.read_table(Path(output, "results", newest)).to_pylist()
    assert {row["animation_uri"]: row["sha256"] for row in shown if row["status"] == "succeeded"} == {
        path.as_uri(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_a_signal_commits_what_is_finished_and_exits_with_4(
    write_manifest: WriteManifest, tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    # Ctrl-C reaches every process of the terminal, a scheduler's SIGTERM the driver alone.
    output = str(tmp_path / "out")
    arguments = ["run", "--manifest", write_manifest(requests_table(30)), "--output", output]
    process = start(*arguments, "--set", "defaults.num_inference_steps=2")
    wait_for_fragments(output, 1, process)

    asked = time.monotonic()
    send(process.pid, number)

    printed = finish(process, 4)
    assert time.monotonic() - asked < 55  # `limits.stop_grace_s` is 60, and only for engines that do not answer
    assert "Start again to resume" in printed
    committed = Journal(Store(output)).outcomes()
    assert len(list(Path(output, "animations").rglob("*.mp4"))) == len(committed.keys) < 30


@pytest.mark.long
@pytest.mark.slow
def test_the_demo_makes_every_sample_animation_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = pq.read_table(tiny.SAMPLE / "requests.parquet").num_rows
    printed = finish(start("demo", "--output", str(tmp_path / "demo")), 0)

    files = list((tmp_path / "demo" / "animations").rglob("*.gif"))
    assert len(files) == count
    assert all(f"{path.parent.name}/{path.name}" in printed for path in files)
    listed = printed[printed.index("animations in") : printed.index("report:")].splitlines()[1:]
    assert (len(listed), max(map(len, listed)) <= 80) == (count, True)
    assert f"{count} requests: {count} succeeded, 0 failed; {count} computed" in printed
    assert pia_batch("demo", "--output", str(tmp_path / "demo")) == 0
    assert "0 computed in this run" in capsys.readouterr().out
    assert pia_batch("verify", str(tmp_path / "demo")) == 0
    assert f"{count} animations verified, 0 with a problem" in capsys.readouterr().out


SIGNALLED_LATE = """
import os, signal
from pia_batch.driver import ray_cluster as cluster
from pia_batch.cli.signals import first_signal
from pia_batch.config import PlacementConfig
with first_signal() as stop:
    with cluster.connect(PlacementConfig()):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.wait(10)
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_has_left_ray_and_publishes_still_hears_a_signal() -> None:
    assert subprocess.run([sys.executable, "-c", SIGNALLED_LATE], check=False, timeout=120).returncode == 0
