"""Errors of the operating system, as an operator sees them: one line with its remedy, and exit code 2."""

import errno
import os
import socket
import ssl
import warnings
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayTaskError

from pia_batch import cli
from pia_batch.errors import ConfigError, InterruptedRunError, environment_error, message_of
from pia_batch.pipeline.worker_errors import explain_loss


def of(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/x")


TABLE = [
    (of(errno.ENOSPC), "OSError: [Errno 28] No space left on device: '/data/x'; free some space"),
    (of(errno.EDQUOT), "Disk quota exceeded: '/data/x'; free some space"),
    (of(errno.EFBIG), "File too large: '/data/x'; raise the limit of a file's size (`ulimit -f unlimited`)"),
    (of(errno.ENOTDIR), "Not a directory: '/data/x'; a file has the name of a folder there"),
    (of(errno.EROFS), "Read-only file system: '/data/x'; give this user access"),
    (of(errno.EACCES), "[Errno 13] Permission denied: '/data/x'; give this user access to it, or set HOME"),
    (of(errno.EPERM), "PermissionError: [Errno 1] Operation not permitted: '/data/x'; give this user access"),
    (of(errno.EMFILE), "Too many open files: '/data/x'; raise the limit of open files, such as by `ulimit -n 65536`"),
    (of(errno.ENFILE), "Too many open files in system: '/data/x'; raise the limit of open files"),
    (of(errno.ENOMEM), "Cannot allocate memory: '/data/x'; raise the limits of memory and processes (`ulimit -a`)"),
    (of(errno.EAGAIN), "Resource temporarily unavailable: '/data/x'; raise the limits of memory and processes"),
    (RuntimeError("can't start new thread"), "can't start new thread; raise the limits of memory and processes"),
    (MemoryError(), "MemoryError: MemoryError; raise the limits of memory"),
    (of(errno.ENAMETOOLONG), "File name too long: '/data/x'; choose a shorter path or name"),
    (of(errno.EIO), "Input/output error: '/data/x'; look into the system's log"),
    (of(errno.ESTALE), "Stale file handle: '/data/x'; mount the network disk again"),
    (of(errno.ENOLCK), "No locks available: '/data/x'; mount the network disk with locks"),
    (of(errno.ELOOP), "Too many levels of symbolic links: '/data/x'; a symbolic link there points to itself"),
    (of(errno.EISDIR), "Is a directory: '/data/x'; give the path of a file, not that of a folder"),
    (of(errno.EBUSY), "Device or resource busy: '/data/x'; end the program that uses it"),
    (of(errno.EADDRINUSE), "Address already in use: '/data/x'; end the program that has the port"),
    (of(errno.ECONNREFUSED), "ConnectionRefusedError: [Errno 111] Connection refused: '/data/x'; check the name"),
    (of(errno.ENETUNREACH), "Network is unreachable: '/data/x'; check the name, the address, the network"),
    (TimeoutError("timed out"), "TimeoutError: timed out; check the name"),
    (socket.gaierror(-2, "Name or service not known"), "Name or service not known; check the name"),
    (ssl.SSLCertVerificationError(1, "verify failed"), "; name the certificates of your network by AWS_CA_BUNDLE"),
]  # fmt: skip


@pytest.mark.parametrize(("raised", "line"), TABLE, ids=[f"{type(err).__name__} {err}" for err, _ in TABLE])
def test_it_is_one_line_with_a_remedy_and_exit_code_2(
    raised: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(*_: object, **__: object) -> NoReturn:
        raise raised

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main([])

    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("pia-batch: ")
    assert line in printed
    assert ended.value.code == 2


@pytest.mark.parametrize(("raised", "line"), TABLE, ids=[f"{type(err).__name__} {err}" for err, _ in TABLE])
def test_in_a_worker_it_interrupts_the_run_which_can_be_started_again(raised: Exception, line: str) -> None:
    explained = explain_loss(RayTaskError("fetch()", "Traceback", raised))

    assert isinstance(explained, InterruptedRunError)
    assert line in str(explained)
    assert str(explained).endswith("what was finished is committed. Start again to resume")


NO_FAULTS = {
    *("ENOENT", "EEXIST", "ENOTEMPTY", "EXDEV", "EINVAL", "EPIPE", "EBADF", "EFAULT", "ESPIPE", "ERANGE", "EDOM"),
    *("EINTR", "ERESTART", "EALREADY", "EINPROGRESS", "ECANCELED", "EISCONN", "EMSGSIZE", "EOVERFLOW", "EDEADLOCK"),
    *("ECHILD", "ESRCH", "ENOTTY", "ENOTSOCK", "ENOTBLK", "EDESTADDRREQ", "ENOPROTOOPT", "EPROTO", "EPROTOTYPE"),
    *("EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EPFNOSUPPORT", "EAFNOSUPPORT", "ESHUTDOWN", "ETOOMANYREFS", "ETIME"),
    *(
        "EOWNERDEAD",
        "ENOTRECOVERABLE",
        "EIDRM",
        "ENOMSG",
        "ENODATA",
        "ENOSR",
        "ENOSTR",
        "ESTRPIPE",
        "EREMOTE",
        "EUSERS",
    ),
    *("EADV", "EBADE", "EBADFD", "EBADR", "EBADRQC", "EBADSLT", "EBFONT", "ECHRNG", "EDOTDOT", "EISNAM", "EL2HLT"),
    *("EL2NSYNC", "EL3HLT", "EL3RST", "ELIBACC", "ELIBBAD", "ELIBEXEC", "ELIBMAX", "ELIBSCN", "ELNRNG", "EMULTIHOP"),
    *("ENAVAIL", "ENOANO", "ENOCSI", "ENOPKG", "ENOTNAM", "ENOTUNIQ", "EREMCHG", "ERFKILL", "ESRMNT", "EUNATCH"),
    "EXFULL",
}
"""Errors of the operating system that only a bug meets, or none of this package's calls."""


@pytest.mark.parametrize("number", errno.errorcode)
def test_every_error_of_the_operating_system_has_a_remedy_or_is_a_bug(number: int) -> None:
    explained = environment_error(of(number))

    assert (explained is None) == (errno.errorcode[number] in NO_FAULTS)


@pytest.mark.parametrize("raised", [FileNotFoundError(2, "x"), BrokenPipeError(32, "x"), OSError("x"), KeyError("x")])
def test_a_bug_stays_a_bug(raised: Exception) -> None:
    assert environment_error(raised) is None


def test_a_message_of_several_lines_is_printed_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(*_: object, **__: object) -> NoReturn:
        raise ConfigError("model.base: cannot load:\nmissing keys\nmore")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit):
        cli.main([])

    assert capsys.readouterr().err == "pia-batch: model.base: cannot load: missing keys more\n"


@given(st.text(st.characters(exclude_characters=" \n", codec="utf-8"), max_size=4096))
def test_a_message_of_our_own_keeps_its_remedy_after_a_path_of_any_length(name: str) -> None:
    message = message_of(ConfigError(f"file:///data/{name}.png is not below the manifest; add it to `images.allow`"))

    assert message.startswith("file:///data/")
    assert message.endswith(".png is not below the manifest; add it to `images.allow`")
    assert message.isprintable()
    assert max(map(len, message.split(" "))) <= 301


def test_a_message_of_another_library_is_cut() -> None:
    assert message_of(ValueError("x" * 4096)) == "x" * 300


@pytest.mark.parametrize("name", ["RAY_DATA_TRACE_ALLOCATIONS", "RAY_NUM_REDIS_GET_RETRIES", "HF_HUB_DOWNLOAD_TIMEOUT"])
def test_a_variable_that_a_library_cannot_read_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "many")

    with pytest.raises(ValueError, match="invalid literal") as raised:
        int("many")

    assert str(environment_error(raised.value)).endswith(f"base 10: 'many'; correct or unset {name}")
    monkeypatch.delenv(name)
    assert environment_error(raised.value) is None


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
@pytest.mark.parametrize("value", ["many", "", "1.5", "10s"])
def test_a_timeout_of_the_hub_that_is_no_number_is_named_by_every_command(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--manifest", "m.jsonl"])

    assert ended.value.code == 2
    assert f"{name} must be a whole number of seconds (got {value!r}); correct or unset it" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["10", " 10 "])
def test_a_timeout_of_the_hub_that_is_a_number_is_taken(value: str) -> None:
    cli._check_hub_timeouts({"HF_HUB_DOWNLOAD_TIMEOUT": value})
    cli._check_hub_timeouts({})


def test_filters_of_warnings_that_end_a_command_are_ignored() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cli._ignore_warning_filters()
        warnings.warn("old", DeprecationWarning, stacklevel=1)
