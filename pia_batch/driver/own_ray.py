"""Ray of a run's own: checks where it keeps its session, and explains an error of its start. Does not import Ray."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pia_batch.errors import ConfigError, message_of, printable

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
            f"{variable}: cannot write to {printable(folder)}, where Ray keeps its session: {message_of(err)}; {_MOVE}"
        )
        raise ConfigError(msg) from None


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
    longest = _SOCKET_BYTES - _BELOW_BYTES
    if (num_bytes := len(os.fsencode(folder))) > longest:
        msg = (
            f"{variable}: too long for the sockets of a Ray on this machine (got {num_bytes} bytes, {shown}, expected "
            f"at most {longest}); {_MOVE}"
        )
        raise ConfigError(msg)


_MOVE = "set RAY_TMPDIR to a short path on a local disk, such as /tmp"


def explain_start(err: Exception) -> ConfigError:
    """Return the error of a Ray of our own that did not start, with what the operator can do about it."""
    cause = f"{type(err).__name__}: {message_of(err)}"
    return ConfigError(f"Ray cannot start on this machine: {cause}; {_remedy(err, cause.lower())}")


def _remedy(err: Exception, cause: str) -> str:
    number = err.errno if isinstance(err, OSError) else None
    by_number = next((remedy for numbers, remedy in _BY_NUMBER if number in numbers), None)
    if by_number is None and isinstance(err, MemoryError):
        return _MEMORY
    return by_number or next((remedy for words, remedy in _BY_WORD if any(word in cause for word in words)), _OTHERWISE)


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
    "look into its log in $RAY_TMPDIR/ray/session_latest/logs (/tmp/ray by default): too little memory or /dev/shm, a "
    "limit of open files or processes (`ulimit -a`), or a taken port"
)

_BY_WORD = (
    (("address already in use", " port"), _PORTS),
    (("object store", "object_store", "/dev/shm"), _SHARED_MEMORY),  # noqa: S108 - Ray's own words
    (("died", "failed to start", "timed out", "timeout", "initialize", "connect", "exited", "gcs"), _LOG),
)
"""Remedies by words of Ray's own messages, in small letters; the first that fits."""
