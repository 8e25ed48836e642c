import errno
import os
from pathlib import Path

import pytest

from pia_batch.driver.own_ray import _BELOW_BYTES, _SOCKET_BYTES, check_temp_folder, explain_start, temp_folder
from pia_batch.errors import ConfigError

LONGEST = _SOCKET_BYTES - _BELOW_BYTES


@pytest.mark.parametrize(
    ("environment", "folder", "variable"),
    [
        ({}, "/tmp", "RAY_TMPDIR"),  # noqa: S108 - Ray's default
        ({"TMPDIR": "/scratch"}, "/scratch", "TMPDIR"),
        ({"TMPDIR": "/scratch", "RAY_TMPDIR": "/fast"}, "/fast", "RAY_TMPDIR"),
        ({"TMPDIR": "/scratch", "RAY_TMPDIR": ""}, "", "RAY_TMPDIR"),
    ],
)
def test_the_folder_is_the_one_that_ray_takes(environment: dict[str, str], folder: str, variable: str) -> None:
    assert temp_folder(environment) == (folder, variable)


@pytest.mark.parametrize("extra", [0, 1, 40])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_folder_too_long_for_sockets_is_refused_by_its_bytes(extra: int, letter: str) -> None:
    size = len(letter.encode())
    name = letter * ((LONGEST - 5) // size) + "y" * ((LONGEST - 5) % size)
    folder = Path("/tmp") / name  # noqa: S108 - tmp_path is longer than a socket's path may be
    if extra:
        with pytest.raises(ConfigError, match=r"^TMPDIR: too long .*expected at most \d+\); set RAY_TMPDIR to a short"):
            check_temp_folder({"TMPDIR": f"{folder}{'y' * extra}"})
        return
    try:
        check_temp_folder({"TMPDIR": str(folder)})
    finally:
        (folder / "ray").rmdir()
        folder.rmdir()


@pytest.mark.parametrize("folder", ["", "tmp", "./tmp", "~/tmp"])
def test_a_relative_folder_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR: not the absolute path"):
        check_temp_folder({"RAY_TMPDIR": folder})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    link = Path(f"/tmp/pb-{os.getpid()}")  # noqa: S108 - tmp_path is longer than a socket's path may be
    link.symlink_to(tmp_path)
    (tmp_path / "file").write_text("no folder")
    try:
        with pytest.raises(
            ConfigError, match=r"^TMPDIR: cannot write to .*/file, where .*Not a directory.*; set RAY_TMPDIR to"
        ):
            check_temp_folder({"TMPDIR": f"{link}/file"})
    finally:
        link.unlink()


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/scratch/ray")


@pytest.mark.parametrize(
    ("raised", "remedy"),
    [
        (os_error(errno.ENOSPC), "set RAY_TMPDIR to a short path on a local disk that can be written and has room"),
        (os_error(errno.EDQUOT), "has room"),
        (os_error(errno.EROFS), "can be written"),
        (os_error(errno.EACCES), "can be written"),
        (os_error(errno.ENAMETOOLONG), "short path"),
        (os_error(errno.EMFILE), "ulimit -n"),
        (os_error(errno.ENFILE), "ulimit -n"),
        (os_error(errno.ENOMEM), "limits of memory"),
        (os_error(errno.EAGAIN), "limits of memory and processes"),
        (MemoryError(), "limits of memory"),
        (os_error(errno.EADDRINUSE), "free the ports"),
        (ValueError("Ray component dashboard is trying to use a port number 6379 that is used"), "free the ports"),
        (ValueError("Attempting to cap object store memory usage at 10 bytes, but the minimum"), "--shm-size"),
        (RuntimeError("Failed to start the raylet"), "session_latest/logs"),
        (TimeoutError("Timed out while waiting for the GCS"), "session_latest/logs"),
        (Exception("The current node timed out during startup"), "session_latest/logs"),
        (PermissionError("~/.ray"), "HOME"),
        (KeyError("x"), "RAY_ variables"),
    ],
)
def test_a_start_that_fails_is_one_line_with_its_cause_and_a_remedy(raised: Exception, remedy: str) -> None:
    explained = str(explain_start(raised))

    assert explained.startswith(f"Ray cannot start on this machine: {type(raised).__name__}")
    assert remedy in explained
    assert "\n" not in explained
