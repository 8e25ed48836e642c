"""Ray of a run's own: checks where it keeps its session, and explains an error of its start. Does not import Ray."""

from __future__ import annotations

import errno
import os
import re
import resource
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from pia_batch.errors import MESSAGE_LENGTH, ConfigError, message_of, printable, problem_of
from pia_batch.planning.child_python import child_environment, module_command

_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a socket, in bytes; a limit of the operating system."""

_BELOW_BYTES = len("/ray/session_2026-11-28_09-15-56_900227_4194304/sockets/plasma_store")
"""Bytes of the path that Ray adds to its temporary folder, with the longest process id, for its longest socket."""


def temp_folder(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Return the folder in which Ray makes its session, by Ray's rule, and the variable that sets it."""
    if "RAY_TMPDIR" in environment:
        return environment["RAY_TMPDIR"], "RAY_TMPDIR"
    if sys.platform.startswith("linux") and "TMPDIR" in environment:
        return environment["TMPDIR"], "TMPDIR"
    return "/tmp", "RAY_TMPDIR"  # noqa: S108 - Ray's own default


def check_temp_folder(environment: Mapping[str, str] = os.environ) -> None:
    """Check that a Ray of our own can make its session: sockets have short paths, and the folder can be written.

    Raises:
        ConfigError: It cannot. The message names the variable that sets the folder.
    """
    check_temp_path(environment)
    folder, variable = temp_folder(environment)
    try:
        path = Path(folder, "ray")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
    except OSError as err:
        msg = (
            f"{variable}: cannot write to {printable(folder)}, where Ray keeps its session: {problem_of(err)}; {_MOVE}"
        )
        raise ConfigError(msg if folder != "/tmp" else msg.replace("such as /tmp", "such as /var/tmp")) from None  # noqa: S108


def check_temp_path(environment: Mapping[str, str] = os.environ) -> None:
    """Check the path alone, without touching the disk: it is absolute, and short enough for sockets.

    Raises:
        ConfigError: It is not. The message names the variable that sets the folder.
    """
    folder, variable = temp_folder(environment)
    shown = printable(folder)
    if not Path(folder).is_absolute():
        msg = f"{variable}: not the absolute path of a folder for Ray's session (got {shown!r}); {_MOVE}"
        raise ConfigError(msg)
    if not folder.isascii():
        msg = f"{variable}: Ray needs a path without other characters than ASCII (got {shown!r}); {_MOVE}"
        raise ConfigError(msg)
    longest = _SOCKET_BYTES - _BELOW_BYTES
    if (num_bytes := len(os.fsencode(folder))) > longest:
        msg = (
            f"{variable}: too long for the sockets of a Ray on this machine (got {num_bytes} bytes, {shown}, expected "
            f"at most {longest}); {_MOVE}"
        )
        raise ConfigError(msg)


def check_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Check the variables of Ray's own configuration, before Ray is imported. It is quick if there are none.

    Their names have small letters, such as RAY_memory_usage_threshold. Ray ends the process that imports it by a signal
    where such a value has another type.

    Raises:
        ConfigError: One has. The message names it.
    """
    names = sorted(name for name in environment if re.match("RAY_[a-z]", name))
    if not names or _is_readable(names):
        return
    for name in names:
        if not _is_readable([name]):
            msg = (
                f"{name}: Ray cannot read the value (got {printable(environment[name])!r}); correct it, or unset {name}"
            )
            raise ConfigError(msg)


def _is_readable(names: Collection[str]) -> bool:
    """Return True if Ray can be imported with these variables of its configuration, and no others."""
    inherited = child_environment()
    kept = {name: value for name, value in inherited.items() if name in names or not re.match("RAY_[a-z]", name)}
    command = module_command("pia_batch.driver.probes.ray_configuration")
    return subprocess.run(command, env=kept, capture_output=True, check=False).returncode >= 0  # noqa: S603 - ours


MIN_OPEN_FILES = 256
"""Smallest limit of open files with which a run of one engine was measured to work; with 64, Ray ends by itself."""


_RAYLET_BYTES, _WORKER_BYTES = 2**30, 4 * 2**30
"""Address space (`ulimit -v`) that Ray's raylet, and a worker with the embedded model, need besides the objects.

With 6.7 GiB of objects, 13.2 and 10.0 GiB were measured: the raylet has them twice, as the store and as a reader. With
less, it ends during the run, or Ray waits for ever.
"""

MIN_PROCESSES = 128
"""Smallest limit of a user's processes and threads (`ulimit -u`). With 100, Ray timed out; with 300, it starts."""

OBJECTS_SHARE = 0.3
"""Share of this machine's memory that Ray takes for its objects, in one file, if no size is set: Ray's own maximum.
With a limit of a file's size (`ulimit -f`) below that file, Ray timed out."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Ray's own path
"""Folder of Ray's objects on Linux. If it does not exist, Ray uses its temporary folder."""


def check_limits(
    open_files: int | None = None,
    address_bytes: int | None = None,
    file_bytes: int | None = None,
    processes: int | None = None,
    object_store_mb: int | None = None,
) -> None:
    """Check the limits of this process that end a Ray of our own without a message, or let it wait for ever.

    Args:
        open_files: Limit of open files up to which a process may raise its own; None: that of this process.
        address_bytes: Limit of the address space, in bytes; None: that of this process.
        file_bytes: Limit of a file's size, in bytes; None: that of this process.
        processes: Limit of the user's processes and threads; None: that of this process, which root ignores.
        object_store_mb: The config's `placement.object_store_mb`.

    Raises:
        ConfigError: One is too low.
    """
    # Ray raises the soft limit of open files to the hard one.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if open_files is None else open_files
    if _is_less(files, MIN_OPEN_FILES):
        msg = (
            f"the limit of open files is too low for a Ray on this machine (got {files}, expected at least "
            f"{MIN_OPEN_FILES}); {_FILES}"
        )
        raise ConfigError(msg)
    share = OBJECTS_SHARE * psutil.virtual_memory().total
    objects = share if object_store_mb is None else object_store_mb * 2**20
    space = resource.getrlimit(resource.RLIMIT_AS)[0] if address_bytes is None else address_bytes
    least = max(2 * objects + _RAYLET_BYTES, objects + _WORKER_BYTES)
    if _is_less(space, least):
        msg = (
            f"the limit of address space is too low for a Ray on this machine (got {space / 2**30:.1f} GiB, expected "
            f"at least {least / 2**30:.1f}); remove it by `ulimit -v unlimited`, and limit memory by a cgroup, or set "
            "placement.object_store_mb to less"
        )
        raise ConfigError(msg)
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if file_bytes is None else file_bytes
    if _is_less(size, objects):
        msg = (
            "the limit of a file's size is too low for the objects of a Ray on this machine "
            f"(got {size / 2**20:.1f} MiB, expected at least {objects / 2**20:.0f}); remove it by `ulimit -f "
            "unlimited`, or set placement.object_store_mb to less"
        )
        raise ConfigError(msg)
    if processes is None:
        processes = resource.RLIM_INFINITY if os.geteuid() == 0 else resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if _is_less(processes, MIN_PROCESSES):
        msg = (
            f"the limit of processes and threads is too low for a Ray on this machine (got {processes}, expected at "
            f"least {MIN_PROCESSES}); raise it, such as by `ulimit -u 4096`, or TasksMax in a service of systemd"
        )
        raise ConfigError(msg)


def _is_less(limit: int, least: float) -> bool:
    return limit != resource.RLIM_INFINITY and limit < least


def check_threads(limit: int | None = None) -> None:
    """Check that this user may start the threads of one command; without them, obstore ends with a panic of Rust.

    Args:
        limit: Limit of the user's processes and threads, which does not hold for root; None: that of this process.

    Raises:
        RuntimeError: A thread cannot be started; `errors.environment_error` has the remedy.
    """
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0] if limit is None else limit
    if os.geteuid() == 0 or most == resource.RLIM_INFINITY:
        return
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(min(2 * (os.cpu_count() or 1) + 4, most + 1))]
    try:
        for thread in threads:
            thread.start()
    finally:
        ended.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def check_memory_threshold(environment: Mapping[str, str] = os.environ, used: float | None = None) -> None:
    """Check that the threshold is a share, and above the memory in use: Ray would end every worker again and again.

    Args:
        environment: Variables of this process.
        used: Share of this machine's memory that is in use; None: that of this moment.

    Raises:
        ConfigError: It is not.
    """
    name = "RAY_memory_usage_threshold"
    try:
        threshold = float(environment[name])
    except (KeyError, ValueError):  # `check_variables` has refused what Ray cannot read
        return
    if threshold > 1:
        raise ConfigError(f"{name}: must be a share of the memory (got {threshold:g}, expected at most 1); correct it")
    share = psutil.virtual_memory().percent / 100 if used is None else used
    if threshold <= share:
        msg = (
            f"{name}: Ray would end every worker, as {share:.0%} of this machine's memory is in use (got "
            f"{threshold:g}); raise it, such as to Ray's own 0.95, or unset it"
        )
        raise ConfigError(msg)


def check_shared_memory(folder: Path = SHARED_MEMORY) -> None:
    """Check that Ray can write its objects, if this machine has a folder of shared memory.

    Raises:
        ConfigError: It cannot.
    """
    if not folder.exists():
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as err:
        msg = (
            f"cannot write to {folder}, where Ray keeps its objects: {problem_of(err)}; free space there, or give the "
            "container a shared memory that can be written (docker run --shm-size=2g)"
        )
        raise ConfigError(msg) from None


def check_token_path(environment: Mapping[str, str] = os.environ) -> None:
    """Check that the file with the token of a Ray of our own can be read, if a variable names one.

    Raises:
        ConfigError: It cannot. The message names the variable.
    """
    name, mode = "RAY_AUTH_TOKEN_PATH", environment.get("RAY_AUTH_MODE", "token").lower()
    path = environment.get(name)
    if not path or environment.get("RAY_AUTH_TOKEN") or mode != "token":
        return
    try:
        problem = None if Path(path).read_bytes().strip() else "the file is empty"
    except OSError as err:
        problem = problem_of(err)
    if problem is not None:
        raise ConfigError(f"{name}: cannot read Ray's token from {printable(path)}: {problem}; correct or unset it")


@contextmanager
def session_token(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Give a Ray of our own a token for as long as it lives, where it cannot keep one in the home folder.

    By default Ray asks for a token, and creates ~/.ray/auth_token. In a container, the home folder is often missing or
    read-only.
    """
    is_needed = _lacks_token(environment)
    if is_needed:
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        if is_needed:
            environment.pop("RAY_AUTH_TOKEN", None)


@contextmanager
def without_warning_filters(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Start the processes of a Ray of our own without PYTHONWARNINGS.

    With `error`, a warning of one of Ray's libraries would end its agent, and Ray would wait until it times out.
    """
    filters = environment.pop("PYTHONWARNINGS", None)
    try:
        yield
    finally:
        if filters is not None:
            environment["PYTHONWARNINGS"] = filters


def _lacks_token(environment: Mapping[str, str]) -> bool:
    """Return True where Ray asks for a token, and has none and no place for one."""
    is_set = any(environment.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if is_set or environment.get("RAY_AUTH_MODE", "token").lower() != "token":
        return False
    home = environment.get("HOME")
    if not home or not Path(home).is_absolute():
        return True
    path = Path(home, ".ray", "auth_token")
    try:
        if path.exists():
            return not path.read_bytes().strip()
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return True
    return not os.access(path.parent, os.W_OK | os.X_OK) or bool(os.statvfs(path.parent).f_flag & os.ST_RDONLY)


_FILES = "raise it, such as by `ulimit -n 65536`, or LimitNOFILE in a service of systemd"
_MOVE = "set RAY_TMPDIR to a short path on a local disk, such as /tmp"


TASK_S = 120.0
"""Seconds that a worker of a Ray of our own has to start; a busy machine of two cores takes 20."""


def explain_task(err: Exception) -> ConfigError:
    """Return the error of a Ray of our own that started, and on which no task ran."""
    is_late = "GetTimeoutError" in type(err).__name__
    cause = f"none within {TASK_S:g} s" if is_late else f"{type(err).__name__}: {message_of(err)}"
    remedy = _LATE if is_late else _LOG
    return ConfigError(f"Ray starts on this machine, and none of its workers does: {cause}; {remedy}")


def explain_start(err: Exception) -> ConfigError:
    """Return the error of a Ray of our own that did not start, with what the operator can do about it."""
    cause = f"{type(err).__name__}: {message_of(err)}"
    return ConfigError(f"Ray cannot start on this machine: {cause}; {_remedy(err, cause.lower())}")


def explain_end(last_line: str) -> ConfigError:
    """Return the error of a process that ended while it started a Ray of our own.

    Args:
        last_line: Last line of its standard error.
    """
    remedy = next((remedy for words, remedy in _BY_WORD if any(word in last_line.lower() for word in words)), _LOG)
    return ConfigError(f"Ray ended the process that started it: {printable(last_line)[:MESSAGE_LENGTH]}; {remedy}")


def _remedy(err: Exception, cause: str) -> str:
    if isinstance(err, OSError) and err.filename == sys.executable:
        return "let this user run this Python, and read its folders"
    number = err.errno if isinstance(err, OSError) else None
    by_number = next((remedy for numbers, remedy in _BY_NUMBER if number in numbers), None)
    if by_number is None and isinstance(err, MemoryError):
        return _MEMORY
    if by_number is None and isinstance(err, ValueError | ImportError | AttributeError) and (names := _set_hooks()):
        return f"correct or unset {' and '.join(names)}"
    return by_number or next((remedy for words, remedy in _BY_WORD if any(word in cause for word in words)), _OTHERWISE)


def _set_hooks(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables of this process by which Ray reads JSON, or imports a module, when it starts."""
    return [name for name in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV_HOOK") if environment.get(name)]


_MEMORY = "raise the limits of memory and processes (`ulimit -a`), or use a larger machine"
_PORTS = "free the ports that RAY_ variables or other programs take, and unset those variables"
_OTHERWISE = "correct HOME and the RAY_ variables, and install the version of Ray that constraints.txt names"

_BY_NUMBER = (
    (
        (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
        "set RAY_TMPDIR to a short path on a local disk that can be written and has room",
    ),
    ((errno.EMFILE, errno.ENFILE), "raise the limit of open files, such as by `ulimit -n 65536`"),
    ((errno.ENOMEM, errno.EAGAIN), _MEMORY),
    ((errno.EADDRINUSE,), _PORTS),
)
"""Remedies by numbers of errors of the operating system."""

_SHARED_MEMORY = (
    "give the container more shared memory (docker run --shm-size=2g), or set placement.object_store_mb to what fits "
    "into /dev/shm"
)
_LOG = (
    "look into its logs in $RAY_TMPDIR/ray/session_latest/logs (/tmp/ray by default): too little memory or /dev/shm, a "
    "limit of open files, of a file's size or of processes (`ulimit -a`), or a taken port"
)
_LATE = f"if this machine is busy, start again when it has less to do (`uptime`); otherwise {_LOG}"

_BY_WORD = (
    (("can't start new thread", "resource temporarily unavailable", "bad_alloc", "cannot allocate memory"), _MEMORY),
    (("too many open files",), f"the limit of open files is too low; {_FILES}"),
    (("address already in use", " port"), _PORTS),
    (("object store", "object_store", "/dev/shm"), _SHARED_MEMORY),  # noqa: S108 - Ray's own words
    (("timed out", "timeout"), _LATE),
    (("died", "failed to start", "initialize", "connect", "exited", "gcs"), _LOG),
)
"""Remedies by words of Ray's own messages, in small letters; the first that fits."""
