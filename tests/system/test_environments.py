"""Faults of the operator's environment, raised where a library raises them: one line, a remedy, and exit code 2.

What a process can be given for real is real: mounts, rights, limits, files. The others are the exceptions of the
libraries themselves, by the functions that raise them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mounts
import pyarrow.parquet as pq
import pytest
import torch
import users
from finished_outputs import make_output
from inputs import requests_table
from ray.exceptions import RayTaskError

from pia_batch import tiny
from pia_batch.config import ModelConfig
from pia_batch.driver import own_ray, ray_cluster
from pia_batch.driver.preflight import Finding
from pia_batch.driver.preflight.examination import guarded
from pia_batch.driver.preflight.storage import check_weights
from pia_batch.errors import ConfigError, PiaBatchError
from pia_batch.journal.layout import animation_name
from pia_batch.pipeline.worker_errors import explain, explain_loss
from pia_batch.storage import s3_config
from pia_batch.storage.object_store import Store
from pia_batch.weights.resolve import resolve

WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Beginning of a command that, even for root, may not open what the permissions of a file forbid."""


def _can_drop_rights() -> bool:
    if shutil.which("setpriv") is None:
        return False
    return subprocess.run([*WITHOUT_RIGHTS, "true"], capture_output=True, check=False).returncode == 0


def one_line(command: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """What a command prints on standard error, which must be one line, and its exit code."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    (line,) = done.stderr.strip().splitlines() or [""]
    return line, done.returncode


# --- homes, credentials, files: `plan` in a process of its own --------------------------------------------------------


def _unreadable_credentials(folder: Path) -> dict[str, str]:
    (folder / ".aws").mkdir()
    (folder / ".aws" / "credentials").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    (folder / ".aws" / "credentials").chmod(0)
    return {"HOME": str(folder), "output": "s3://bucket/out", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}


def _unreadable_weights(folder: Path) -> dict[str, str]:
    shutil.copytree(tiny.PATH, folder / "base")
    (folder / "base" / "unet" / "diffusion_pytorch_model.safetensors").chmod(0)
    return {"model.base": str(folder / "base")}


def _unreadable_folder_of_weights(folder: Path) -> dict[str, str]:
    shutil.copytree(tiny.PATH, folder / "base")
    (folder / "base" / "unet").chmod(0)
    return {"model.base": str(folder / "base")}


def _unreadable_manifest(folder: Path) -> dict[str, str]:
    (folder / "m.parquet").chmod(0)
    return {}


def _unreadable_output(folder: Path) -> dict[str, str]:
    (folder / "out").mkdir(mode=0)
    return {"output": str(folder / "out" / "here")}


DENIED = {
    "credentials": (_unreadable_credentials, r"/.aws/credentials cannot be read: Permission denied; give this user"),
    "weights": (_unreadable_weights, "model.safetensors: Permission denied"),
    "folder of weights": (_unreadable_folder_of_weights, "Permission denied"),
    "manifest": (_unreadable_manifest, "cannot read manifest"),
    "output": (_unreadable_output, "Permission denied"),
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not _can_drop_rights(), reason="needs setpriv")
@pytest.mark.parametrize("case", DENIED)
def test_what_may_not_be_read_is_one_line_in_a_plan(tmp_path: Path, case: str) -> None:
    pq.write_table(requests_table(1), tmp_path / "m.parquet")
    prepare, message = DENIED[case]
    settings = {"manifest": str(tmp_path / "m.parquet"), "output": str(tmp_path / "out")} | prepare(tmp_path)
    environment = {name: settings.pop(name) for name in list(settings) if name.isupper()}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]

    line, code = one_line(
        [*WITHOUT_RIGHTS, sys.executable, "-m", "pia_batch.cli", "plan", *words], dict(os.environ) | environment
    )

    assert (code, message in line) == (2, True), line
    assert "give this user access to it" in line
    for path in tmp_path.rglob("*"):  # so that the folder can be removed
        path.chmod(0o700)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("home", ["file", "missing/home", None])
def test_a_home_that_is_missing_or_no_folder_keeps_nobody_from_planning(tmp_path: Path, home: str | None) -> None:
    pq.write_table(requests_table(1), tmp_path / "m.parquet")
    (tmp_path / "file").write_text("no folder")
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment |= {} if home is None else {"HOME": str(tmp_path / home)}

    line, code = one_line(
        [
            *(sys.executable, "-m", "pia_batch.cli", "plan"),
            *("--manifest", str(tmp_path / "m.parquet"), "--output", str(tmp_path / "out")),
        ],
        environment,
    )

    assert (line, code) == ("", 0)


# --- limits, folders and addresses: `run` and `doctor`, which end alike -----------------------------------------------


@dataclass(frozen=True)
class Situation:
    """Environment in which no Ray of our own starts, or none answers.

    Attributes:
        words: What the commands print.
        limits: Options of `ulimit`.
        environment: Variables; `{}` stands for a folder of the test.
        commands: Commands that are tried; `doctor` takes the longest, and has one check for all of these.
    """

    words: str
    limits: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ("run",)


BOTH = ("run", "doctor")

SITUATIONS = {
    "files of 2 KiB": Situation("File too large; raise the limit of a file's size", "-f 2"),
    "files of 1 GB": Situation("limit of a file's size is too low for the objects of a Ray", "-f 100000"),
    "64 open files": Situation("limit of open files is too low for a Ray", "-n 64"),
    "address space of 6 GB": Situation("limit of address space is too low for a Ray", "-v 6000000", commands=BOTH),
    "100 processes": Situation("limit of processes and threads is too low for a Ray", "-u 100", commands=BOTH),
    "Ray's folder is a file": Situation("RAY_TMPDIR: cannot write to", environment={"RAY_TMPDIR": "/dev/null"}),
    "Ray's folder is long": Situation("RAY_TMPDIR: too long", environment={"RAY_TMPDIR": "{}/" + "x" * 85}),
    "nobody at the address": Situation("at 127.0.0.1:1", environment={"RAY_ADDRESS": "127.0.0.1:1"}),
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_what_keeps_a_run_from_ray_ends_run_and_doctor_with_2_and_a_remedy(tmp_path: Path, name: str) -> None:
    case = SITUATIONS[name]
    pq.write_table(requests_table(1), tmp_path / "m.parquet")
    variables = {key: value.replace("{}", str(tmp_path)) for key, value in case.environment.items()}
    user = users.without_processes(tmp_path) if "-u" in case.limits else []
    for command in case.commands:
        done = subprocess.run(
            [
                *("bash", "-c", f'{case.limits and "ulimit"} {case.limits}\nexec "$@"', "bash", *user),
                *(sys.executable, "-m", "pia_batch.cli", command),
                *("--manifest", str(tmp_path / "m.parquet"), "--output", str(tmp_path / command)),
                *("--set", "placement.num_gpus=0"),
            ],
            env=os.environ | {"RAY_ADDRESS": "local"} | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

        problems = [line for line in done.stderr.splitlines() if not re.search(" (INFO|WARNING) ", line)]
        assert done.returncode == 2, done.stderr
        if command == "doctor":
            assert case.words in done.stdout
        else:
            (line,) = problems
            assert line.startswith("pia-batch: ")
            assert case.words in line
            assert "; " in line


# --- what `doctor` meets ---------------------------------------------------------------------------------------------


def _raising(err: Exception) -> Iterator[Finding]:
    yield Finding("ok", "disk", "first")
    raise err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EIO, errno.EMFILE, errno.ENOSPC])
def test_doctor_reports_a_fault_within_a_check_and_goes_on(number: int) -> None:
    first, failure = guarded("disk", _raising(OSError(number, os.strerror(number), "/home/x")))

    assert (first.state, failure.state, failure.subject) == ("ok", "fail", "disk")
    assert os.strerror(number) in failure.message
    assert failure.remedy


def test_doctor_does_not_take_a_bug_for_a_fault_of_the_environment() -> None:
    with pytest.raises(FileNotFoundError):
        list(guarded("disk", _raising(FileNotFoundError(2, "x"))))


# --- weights ---------------------------------------------------------------------------------------------------------


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _without_end_of_header(path: Path) -> None:
    os.truncate(path, 40)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _too_long_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * 7 + b"\x7f")


def _no_json(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\0" * 64)


def _a_pointer_of_git(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438167540\n")


def _a_page(path: Path) -> None:
    path.write_text("<!doctype html><title>401 Unauthorized</title>")


@pytest.mark.parametrize(
    "damage", [_truncated, _without_end_of_header, _empty, _too_long_header, _no_json, _a_pointer_of_git, _a_page]
)
def test_damaged_weights_are_one_line_where_they_are_resolved_and_in_doctor(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(tiny.PATH, tmp_path / "base")
    damage(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    model = ModelConfig(base=str(tmp_path / "base"))

    with pytest.raises(ConfigError) as refused:
        resolve(model)
    (finding,) = check_weights({"default": model})

    assert "\n" not in str(refused.value)
    assert "diffusion_pytorch_model.safetensors" in str(refused.value)
    assert (finding.state, bool(finding.remedy)) == ("fail", True)


def _allocate_too_much() -> None:
    torch.empty(2**45, dtype=torch.uint8)


def _device_overflow() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")


@pytest.mark.parametrize("fault", [_allocate_too_much, _device_overflow])
def test_memory_that_runs_out_at_load_is_a_config_error_with_what_to_change(fault: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError) as raised:
        fault()

    explained = explain(raised.value)

    assert isinstance(explained, ConfigError)
    assert "larger device or machine, `model.memory: low`, fewer engines" in str(explained)
    assert "\n" not in str(explained)


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_line_where_ray_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="in use") as raised, socket.socket() as second:
            second.bind(taken.getsockname())

    assert "free the ports that RAY_ variables or other programs take" in str(own_ray.explain_start(raised.value))


OF_RAY = [
    ("Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: 3.11.9", "3.11.9; install"),
    ("Ray Client version mismatch", "same versions"),
    ("Package size 630MB exceeds the maximum size of 500MB", "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0"),
    ("Could not connect to GCS at 10.0.0.1:6379", "start the cluster"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "remedy"), OF_RAY)
def test_what_ray_raises_of_a_cluster_is_one_line_with_a_remedy(text: str, remedy: str) -> None:
    explained = str(ray_cluster._unreachable("10.0.0.1:6379", RuntimeError(text)))

    assert explained.startswith("cannot reach Ray at 10.0.0.1:6379: RuntimeError: ")
    assert remedy in explained
    assert "\n" not in explained


OF_STARTS = [
    (ValueError("The configured object store size (2.0GB) exceeds /dev/shm size (0.06GB)."), "--shm-size=2g"),
    (ValueError("Attempting to cap object store memory usage at 10 bytes, but the minimum allowed"), "--shm-size=2g"),
    (ValueError("Ray component metrics_export is trying to use a port number 8080 that is used"), "free the ports"),
    (RuntimeError("Failed to bind to 0.0.0.0:6379: Address already in use"), "free the ports"),
    (PermissionError(errno.EACCES, "Permission denied", "/home/ray/.ray"), "RAY_TMPDIR"),
]


@pytest.mark.parametrize(("raised", "remedy"), OF_STARTS)
def test_what_ray_raises_at_its_start_is_one_line_with_a_remedy(raised: Exception, remedy: str) -> None:
    explained = str(own_ray.explain_start(raised))

    assert remedy in explained
    assert "\n" not in explained


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not mounts.are_possible(), reason="needs the right to mount")
@pytest.mark.parametrize(
    ("options", "before", "reason"),
    [
        ("size=64k", "head -c 64K /dev/zero > full", "No space left on device"),
        ("size=1m", "mount -o remount,ro .", "Read-only file system"),
    ],
)
def test_a_folder_of_ray_on_a_disk_that_cannot_be_written_is_one_line(options: str, before: str, reason: str) -> None:
    short = Path(f"/tmp/pb{os.getpid()}")  # noqa: S108 - tmp_path is longer than a socket's path may be
    short.mkdir()
    program = "from pia_batch.driver.own_ray import check_temp_folder as c\ntry: c()\nexcept Exception as e: print(e)"
    try:
        done = mounts.run_on(
            short, options, [sys.executable, "-c", program], os.environ | {"RAY_TMPDIR": str(short)}, before
        )
    finally:
        short.rmdir()

    (line,) = done.stdout.splitlines()
    assert line.startswith(f"RAY_TMPDIR: cannot write to {short}, where Ray keeps its session:")
    assert reason in line
    assert line.endswith("set RAY_TMPDIR to a short path on a local disk, such as /tmp")


@pytest.mark.long
@pytest.mark.skipif(not mounts.are_possible(), reason="needs the right to mount")
@pytest.mark.parametrize("orphans", [1, 0])
def test_gc_frees_a_disk_that_is_too_full_for_its_lease(tmp_path: Path, orphans: int) -> None:
    made = Store(str(tmp_path / "made"))
    make_output(made, ["gif"])
    for number in range(orphans):
        made.create(animation_name(f"{number:032x}", "gif"), bytes(2**16))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "pia_batch.cli", "gc", str(disk), "--older-than", "0s", "--delete"]
    fill = f"cp -r {tmp_path}/made/. . && (cat /dev/zero > filled 2>/dev/null; true)"

    done = mounts.run_on(disk, "size=1m", command, os.environ, fill)

    if orphans:
        assert (done.stderr, done.returncode) == ("", 0)
        assert re.search("animations and posters that no result names +1 objects", done.stdout)
    else:
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.endswith(
            "is full, and no more garbage is old enough; delete other files there, or lower --older-than"
        )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOMEM])
def test_a_fault_in_a_worker_interrupts_with_its_remedy(number: int) -> None:
    raised = RayTaskError("fetch()", "Traceback", OSError(number, os.strerror(number), "/spool"))

    explained = explain_loss(raised)

    assert isinstance(explained, PiaBatchError)
    assert explained.exit_code == 4  # what was finished is committed; started again, it goes on
    assert os.strerror(number) in str(explained)


def test_unreadable_credentials_are_no_missing_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "credentials").mkdir()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    s3_config.forget()

    with pytest.raises(ConfigError, match=r"credentials is no regular file.* unset AWS_SHARED_CREDENTIALS_FILE"):
        s3_config.resolve()
