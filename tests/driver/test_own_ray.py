import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import users

from pia_batch.driver.own_ray import (
    _BELOW_BYTES,
    _SOCKET_BYTES,
    MIN_OPEN_FILES,
    MIN_PROCESSES,
    check_limits,
    check_memory_threshold,
    check_shared_memory,
    check_temp_folder,
    check_token_path,
    check_variables,
    explain_end,
    explain_start,
    explain_task,
    session_token,
    temp_folder,
    without_warning_filters,
)
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
def test_a_folder_too_long_for_sockets_is_refused_by_its_bytes(extra: int) -> None:
    folder = Path("/tmp") / ("x" * (LONGEST - 5))  # noqa: S108 - tmp_path is longer than a socket's path may be
    if extra:
        with pytest.raises(ConfigError, match=r"^TMPDIR: too long .*expected at most \d+\); set RAY_TMPDIR to a short"):
            check_temp_folder({"TMPDIR": f"{folder}{'y' * extra}"})
        return
    try:
        check_temp_folder({"TMPDIR": str(folder)})
    finally:
        (folder / "ray").rmdir()
        folder.rmdir()


@pytest.mark.parametrize("folder", ["/é", "/\udcff"])
def test_a_folder_that_is_not_ascii_is_refused(folder: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^TMPDIR: Ray needs a path without other characters than ASCII .*; set RAY_"
    ):
        check_temp_folder({"TMPDIR": folder})


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
        (Exception("The current node timed out during startup"), "if this machine is busy, start again when it has"),
        (Exception("The current node timed out during startup"), "a file's size or of processes (`ulimit -a`)"),
        (PermissionError("~/.ray"), "HOME"),
        (PermissionError(errno.EACCES, "Permission denied", sys.executable), "let this user run this Python"),
        (RuntimeError("can't start new thread"), "limits of memory and processes"),
        (KeyError("x"), "RAY_ variables"),
    ],
)
def test_a_start_that_fails_is_one_line_with_its_cause_and_a_remedy(raised: Exception, remedy: str) -> None:
    explained = str(explain_start(raised))

    assert explained.startswith(f"Ray cannot start on this machine: {type(raised).__name__}")
    assert remedy in explained
    assert "\n" not in explained


@pytest.mark.parametrize(
    ("last_line", "remedy"),
    [
        ("  what():  Resource temporarily unavailable", "limits of memory and processes"),
        ("  what():  std::bad_alloc", "limits of memory and processes"),
        ("OSError: [Errno 24] Too many open files", "ulimit -n"),
        ("Aborted (core dumped)", "session_latest/logs"),
    ],
)
def test_a_process_that_ray_ends_is_one_line_with_a_remedy(last_line: str, remedy: str) -> None:
    explained = str(explain_end(last_line))

    assert explained.startswith(f"Ray ended the process that started it: {last_line}; ")
    assert remedy in explained


@pytest.mark.parametrize("name", ["WorkerCrashedError", "LocalRayletDiedError", "GetTimeoutError"])
def test_a_ray_on_which_no_task_runs_is_one_line_with_a_remedy(name: str) -> None:
    explained = str(explain_task(type(name, (Exception,), {})("it died\nand more")))

    assert explained.startswith("Ray starts on this machine, and none of its workers does: ")
    assert "session_latest/logs" in explained
    assert "\n" not in explained


@pytest.mark.parametrize("value", ["0", "0.01", "0.4", "-1"])
def test_a_threshold_of_memory_that_is_reached_already_is_refused_by_its_name(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^RAY_memory_usage_threshold: .*40% of this machine's memory .*; raise it"):
        check_memory_threshold({"RAY_memory_usage_threshold": value}, used=0.4)


@pytest.mark.parametrize(
    "environment", [{}, {"RAY_memory_usage_threshold": "0.95"}, {"RAY_memory_usage_threshold": ""}]
)
def test_a_threshold_of_memory_above_what_is_used_is_none(environment: dict[str, str]) -> None:
    check_memory_threshold(environment, used=0.4)


# --- limits and shared memory -----------------------------------------------------------------------------------------

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize("files", [MIN_OPEN_FILES, MIN_OPEN_FILES + 1, UNLIMITED])
def test_enough_open_files_are_accepted(files: int) -> None:
    check_limits(files, UNLIMITED)


@pytest.mark.parametrize("files", [64, MIN_OPEN_FILES - 1])
def test_too_few_open_files_are_refused_by_their_number(files: int) -> None:
    with pytest.raises(ConfigError, match=rf"\(got {files}, expected at least {MIN_OPEN_FILES}\); .*`ulimit -n 65536`"):
        check_limits(files, UNLIMITED)


GIB = 2**30


@pytest.mark.parametrize(("space", "store_mb"), [(5 * GIB, 1024), (17 * GIB, 8192), (2**50, None), (UNLIMITED, 2**30)])
def test_enough_address_space_for_the_objects_is_accepted(space: int, store_mb: int | None) -> None:
    check_limits(UNLIMITED, space, object_store_mb=store_mb)


@pytest.mark.parametrize(
    ("space", "store_mb", "least"), [(5 * GIB - 1, 1024, "5.0"), (17 * GIB - 1, 8192, "17.0"), (2 * GIB, None, "")]
)
def test_too_little_address_space_for_the_objects_is_refused(space: int, store_mb: int | None, least: str) -> None:
    words = rf"limit of address space is too low .* at least {least}.*`ulimit -v unlimited`, .*object_store_mb to less$"
    with pytest.raises(ConfigError, match=words):
        check_limits(UNLIMITED, space, object_store_mb=store_mb)


@pytest.mark.parametrize(("size", "store_mb"), [(2**50, None), (2**29, 512), (UNLIMITED, None), (UNLIMITED, 2**30)])
def test_enough_of_a_files_size_is_accepted(size: int, store_mb: int | None) -> None:
    check_limits(UNLIMITED, UNLIMITED, size, object_store_mb=store_mb)


@pytest.mark.parametrize(("size", "store_mb"), [(0, None), (2**28, None), (2**29 - 1, 512)])
def test_too_little_of_a_files_size_for_the_objects_is_refused(size: int, store_mb: int | None) -> None:
    remedy = r"remove it by `ulimit -f unlimited`, or set placement\.object_store_mb to less$"
    with pytest.raises(ConfigError, match=rf"limit of a file's size is too low .*; {remedy}"):
        check_limits(UNLIMITED, UNLIMITED, size, object_store_mb=store_mb)


@pytest.mark.parametrize("processes", [MIN_PROCESSES, UNLIMITED])
def test_enough_processes_are_accepted(processes: int) -> None:
    check_limits(UNLIMITED, UNLIMITED, UNLIMITED, processes)


@pytest.mark.parametrize("processes", [0, MIN_PROCESSES - 1])
def test_too_few_processes_are_refused(processes: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"\(got {processes}, expected at least {MIN_PROCESSES}\); .*`ulimit -u 4096`"
    ):
        check_limits(UNLIMITED, UNLIMITED, UNLIMITED, processes)


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (3, "RuntimeError: can't start new thread; raise the limits of memory and processes (`ulimit -a`), or use"),
        (2000, "None"),
    ],
)
def test_threads_that_a_user_may_not_start_are_an_error_with_a_remedy(tmp_path: Path, limit: int, found: str) -> None:
    program = (
        "import threading\n"
        "from pia_batch.driver.own_ray import check_threads\n"
        "from pia_batch.errors import environment_error\n"
        "error = None\n"
        "try: check_threads()\n"
        "except RuntimeError as err: error = environment_error(err)\n"
        "print(threading.active_count(), error)"
    )
    command = [
        "bash",
        "-c",
        f'ulimit -u {limit}; exec "$@"',
        "bash",
        *users.without_processes(tmp_path),
        sys.executable,
        "-c",
        program,
    ]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout.startswith(f"1 {found}"), done.stderr  # and the threads that were started have ended


def test_shared_memory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_shared_memory(tmp_path)
    check_shared_memory(tmp_path / "missing")  # Ray uses its temporary folder
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(ConfigError, match=r"where Ray keeps its objects: .*; free space there, .*--shm-size=2g"):
        check_shared_memory(tmp_path / "file")


# --- filters of warnings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{"PYTHONWARNINGS": "error"}, {"PYTHONWARNINGS": ""}, {}])
def test_a_ray_starts_without_filters_of_warnings_and_they_are_back_afterwards(variables: dict[str, str]) -> None:
    environment = {"HOME": "/x"} | variables
    with without_warning_filters(environment):
        assert environment == {"HOME": "/x"}

    assert environment == {"HOME": "/x"} | variables


def test_filters_of_warnings_are_back_after_a_start_that_fails() -> None:
    environment = {"PYTHONWARNINGS": "error"}
    with pytest.raises(RuntimeError), without_warning_filters(environment):
        raise RuntimeError

    assert environment == {"PYTHONWARNINGS": "error"}


# --- the token of a Ray of our own ------------------------------------------------------------------------------------


def given_token(environment: dict[str, str]) -> str | None:
    before = dict(environment)
    with session_token(environment):
        found = environment.get("RAY_AUTH_TOKEN")
    assert environment == before
    return found


@pytest.mark.parametrize("home", [None, "", "relative", "/proc/home", "/dev/null"])
def test_without_a_home_that_can_be_written_a_ray_gets_a_token(home: str | None) -> None:
    token = given_token({} if home is None else {"HOME": home})

    assert token is not None
    assert len(token) == 64
    assert token != given_token({})


def test_an_empty_token_is_none(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(" \n")

    assert given_token({"HOME": str(tmp_path)}) is not None


def test_a_token_or_a_place_for_one_is_left_to_ray(tmp_path: Path) -> None:
    assert given_token({"HOME": str(tmp_path)}) is None
    (tmp_path / ".ray" / "auth_token").write_text("token")
    assert given_token({"HOME": str(tmp_path)}) is None
    assert given_token({"RAY_AUTH_TOKEN": "own"}) == "own"
    assert given_token({"RAY_AUTH_TOKEN_PATH": "/secrets/token"}) is None
    assert given_token({"RAY_AUTH_MODE": "disabled"}) is None


# --- variables --------------------------------------------------------------------------------------------------------


def test_without_variables_of_its_configuration_ray_is_not_asked() -> None:
    check_variables({"RAY_ADDRESS": "auto", "RAY_TMPDIR": "/tmp"})  # noqa: S108 - a variable's value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RAY_gcs_server_request_timeout_seconds", "RAY_memory_usage_threshold"])
def test_a_variable_of_rays_configuration_that_it_cannot_read_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_enable_timeline", "false")
    monkeypatch.setenv(name, "garbage")

    with pytest.raises(ConfigError, match=rf"^{name}: Ray cannot read the value \(got 'garbage'\); correct"):
        check_variables(os.environ)


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", ValueError("Expecting value: line 1 column 1 (char 0)")),
        ("RAY_RUNTIME_ENV_HOOK", ModuleNotFoundError("No module named 'no_such_module'")),
        ("RAY_RUNTIME_ENV_HOOK", AttributeError("module 'json' has no attribute 'hook'")),
    ],
)
def test_a_variable_that_ray_follows_at_its_start_is_named(
    name: str, raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")

    assert str(explain_start(raised)).endswith(f"; correct or unset {name}")


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({}, None),
        ({"RAY_AUTH_TOKEN_PATH": "full"}, None),
        ({"RAY_AUTH_TOKEN_PATH": ""}, None),
        ({"RAY_AUTH_TOKEN_PATH": "missing", "RAY_AUTH_TOKEN": "t"}, None),
        ({"RAY_AUTH_TOKEN_PATH": "missing", "RAY_AUTH_MODE": "disabled"}, None),
        ({"RAY_AUTH_TOKEN_PATH": "missing"}, "No such file or directory"),
        ({"RAY_AUTH_TOKEN_PATH": "empty"}, "the file is empty"),
        ({"RAY_AUTH_TOKEN_PATH": "."}, "Is a directory"),
    ],
)
def test_a_file_of_a_token_that_cannot_be_read_is_named(
    variables: dict[str, str], problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").write_text("0" * 64)
    (tmp_path / "empty").write_text(" \n")
    monkeypatch.chdir(tmp_path)
    if problem is None:
        check_token_path(variables)
        return

    with pytest.raises(ConfigError, match=f"^RAY_AUTH_TOKEN_PATH: .*{problem}; correct or unset it$"):
        check_token_path(variables)
