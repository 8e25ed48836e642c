"""Exceptions of this package, grouped by who must act.

PiaBatchError
├── ConfigError        the operator fixes the config or the command; exit code 2
├── ManifestError      the operator fixes the manifest; exit code 2, before Ray starts
├── StorageError       the operator fixes the store, or starts again once it is back
│   ├── ObjectExistsError   a create lost the race; the caller compares
│   └── UnwritableStoreError   the operator frees space, raises the quota, or looks into the store's log
├── BrokenDeviceError  the operator removes the machine or repairs its drivers; raised before anything is generated
├── LeaseHeldError     another run works on this output; exit code 75
├── InterruptedRunError     SIGINT or SIGTERM; everything finished is committed; exit code 4
├── AccountingError    a request does not have exactly one result; nothing is published
└── RequestError       one request is bad: it becomes a `failed` result and the run continues

Anything else is a bug: it ends the run with its traceback and exit code 1, and committed results stay.
Every class takes one message, so that it survives pickling between processes.
"""

import errno
import os
import re
import socket
import ssl
import sys


class PiaBatchError(Exception):
    """Base class of all exceptions that this package raises on purpose."""

    exit_code = 1
    """Exit code of a command that ends with this error."""


class ConfigError(PiaBatchError):
    """Config, flag or model that cannot work. The message names the key and the remedy."""

    exit_code = 2


class ManifestError(PiaBatchError):
    """Manifest that cannot be read, is empty, or lacks a required column."""

    exit_code = 2


class StorageError(PiaBatchError):
    """Store that refused, or did not answer. After a write the outcome is unknown: create again."""

    exit_code = 2


class ObjectExistsError(StorageError):
    """Name that `Store.create` found taken, perhaps by its own earlier attempt."""


class UnwritableStoreError(StorageError):
    """Store that takes no object, for want of room or by an error of its own. It may still list and delete."""


class BrokenDeviceError(PiaBatchError):
    """Device that computes wrong pixels, or nothing at all. The message names the device and the deviation."""

    exit_code = 2


class LeaseHeldError(PiaBatchError):
    """Lease of the output that another run holds."""

    exit_code = 75


class InterruptedRunError(PiaBatchError):
    """Run that was asked to stop. Start it again to resume."""

    exit_code = 4


class AccountingError(PiaBatchError):
    """Results and manifest that do not match one to one; the results were not published."""


class RequestError(PiaBatchError):
    """Request that cannot be animated. `kind` becomes the result's `error_kind`, and the text its `error`."""

    kind = "request_error"


class ImageNotAllowedError(RequestError):
    """Image outside of the manifest's own store and of the places that `images.allow` opens."""

    kind = "image_not_allowed"


class ImageUnavailableError(RequestError):
    """Image that could not be read: missing, refused, too slow or too large."""

    kind = "image_unavailable"


class ImageUnreadableError(RequestError):
    """Image that is not accepted: truncated, corrupt, another format, or too many pixels."""

    kind = "image_unreadable"


class ImageMismatchError(RequestError):
    """Image whose sha256 differs from the manifest's."""

    kind = "image_mismatch"


class UnsupportedSettingError(RequestError):
    """Setting that this model does not support, such as more frames than its motion modules have positions."""

    kind = "unsupported_setting"


class NonFiniteError(RequestError):
    """NaN or infinity from the network, also after decoding again in float32."""

    kind = "non_finite"


class EngineError(RequestError):
    """Exception of the engine for this request only, while it generates others. The text names the exception."""

    kind = "engine_error"


class WorkerCrashError(RequestError):
    """Death of the worker every time it processed this request alone."""

    kind = "worker_crash"


class RequestTimeoutError(RequestError):
    """Request that took longer than its share of `limits.timeout_s`."""

    kind = "timeout"


class DegenerateError(RequestError):
    """Clip that was generated, and is below `limits.min_frame_std` or `limits.min_motion`."""

    kind = "degenerate"


class UnsafeError(RequestError):
    """Image or clip that `safety.checker` flags, where `safety.policy` is `fail`. Nothing of it is stored."""

    kind = "unsafe"


class EncodingError(RequestError):
    """Animation that could not be encoded, or whose file does not decode to its frames."""

    kind = "encoding_failed"


class DeviceMemoryError(RequestError):
    """Request that needs more memory than the device, or its worker, has, even alone."""

    kind = "out_of_memory"


CERTIFICATE_REMEDY = "name the certificates of your network by AWS_CA_BUNDLE, SSL_CERT_FILE or REQUESTS_CA_BUNDLE"
_ROOM = "free some space on that disk, or choose another one by the path, TMPDIR or RAY_TMPDIR"
_FILES = "raise the limit of open files, such as by `ulimit -n 65536`"
_MEMORY = "raise the limits of memory and processes (`ulimit -a`), or use a larger machine"
_ACCESS = "give this user access to it, or set HOME, TMPDIR or the path to another place"
_ENCODING = "use names in UTF-8: set PYTHONUTF8=1, or LC_ALL to a locale such as C.UTF-8"
_NETWORK = "check the name, the address, the network and the proxy settings (HTTPS_PROXY, NO_PROXY)"
_REMEDIES = (
    (_ROOM, "ENOSPC EDQUOT"),
    ("raise the limit of a file's size (`ulimit -f unlimited`), or choose a disk with larger files", "EFBIG"),
    ("a file has the name of a folder there: remove it, or set HOME, TMPDIR or the path to another place", "ENOTDIR"),
    ("give the path of a file, not that of a folder", "EISDIR"),
    (_ACCESS, "EROFS EACCES EPERM"),
    (_FILES, "EMFILE ENFILE"),
    (_MEMORY, "ENOMEM EAGAIN"),
    ("choose a shorter path or name", "ENAMETOOLONG"),
    ("a symbolic link there points to itself: remove it, or choose another path", "ELOOP"),
    ("that folder has too many entries: choose another one", "EMLINK"),
    ("that disk does not take every name: choose another disk or name", "EILSEQ"),
    ("unset large environment variables, or give fewer arguments", "E2BIG"),
    ("look into the system's log: a disk fails", "EIO ENXIO ENODEV EUCLEAN EBADMSG ENOMEDIUM EMEDIUMTYPE"),
    ("mount the network disk again", "ESTALE ENOTCONN EREMOTEIO ENONET ECOMM ENOLINK"),
    ("mount the network disk with locks, or choose a local disk", "ENOLCK"),
    (
        "unlock the encrypted folder, or renew the key or the ticket of the network disk",
        "ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED",
    ),
    ("choose a disk with another file system, such as ext4 or XFS", "ENOSYS ENOTSUP"),
    ("end the program that uses it, or choose another path", "EBUSY ETXTBSY"),
    ("install the program for this machine's processor", "ENOEXEC"),
    ("end the program that has the port, or choose another port", "EADDRINUSE"),
    (_NETWORK, "EADDRNOTAVAIL ECONNREFUSED ECONNRESET ECONNABORTED ENETRESET ENOBUFS ETIMEDOUT"),
    (_NETWORK, "EHOSTUNREACH EHOSTDOWN ENETUNREACH ENETDOWN"),
)

_ENVIRONMENT = {
    getattr(errno, name): remedy for remedy, names in _REMEDIES for name in names.split() if hasattr(errno, name)
}
"""Remedies for errors of the operating system that an operator causes and ends, by their number."""


_OUT_OF_MEMORY_PATTERNS = (
    "out.of.memory",
    "(can't|cannot|failed to|could not) allocate",
    "not enough memory",
    "bad_alloc",
    "storage size calculation overflowed",
    r"(cublas|cudnn|cusparse)_status_\w*alloc\w*_failed",
    "could not create a (primitive(?! descriptor)|memory object)",
    "could not execute a primitive",
    "was unable to find an engine to execute this computation",
)
"""Patterns, in small letters, of a plain RuntimeError of torch that means memory ran out outside its GPU allocator.

A primitive is oneDNN's: it has no other words for memory that it does not get, and reports a computation that it lacks
by the descriptor. The last text comes from a convolution: torch tries one cuDNN algorithm after another, skips those
whose workspace does not fit into memory, and finally reports only that no algorithm was left.
"""

_OUT_OF_MEMORY = re.compile("|".join(_OUT_OF_MEMORY_PATTERNS), re.IGNORECASE)


def is_out_of_memory(err: BaseException) -> bool:
    """Return True if this exception means that memory ran out, of the device or of the machine.

    An error of torch's allocator is recognised by the name of its class, so that the driver needs no torch.
    """
    if isinstance(err, MemoryError) or "OutOfMemory" in type(err).__name__:
        return True
    if isinstance(err, OSError):
        return err.errno == errno.ENOMEM
    return isinstance(err, RuntimeError) and _OUT_OF_MEMORY.search(str(err)) is not None


_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED.*?verify failed:? ?([^(\n\"]*)")
"""OpenSSL's words for a server that it does not trust, in the text of every client's exception, with the reason."""

_CERTIFICATE_REMEDIES = (
    ("expired", "have it renewed on the server, or correct the clock of this machine"),
    ("not yet valid", "correct the clock of this machine"),
    ("mismatch", "use a name that the certificate has"),
)


def certificate_problem(err: BaseException) -> str | None:
    """Return why a server is not trusted, with the remedy; None if the exception has no such cause."""
    cause: BaseException | None = err
    for _ in range(_MOST_CAUSES):
        if cause is None:
            return None
        if found := _CERTIFICATE.search(str(cause)):
            reason = printable(found[1].strip(" ',")[:MESSAGE_LENGTH]) or "verification failed"
            remedies = (remedy for words, remedy in _CERTIFICATE_REMEDIES if words in reason.lower())
            return f"the certificate of the server is not trusted ({reason}); {next(remedies, CERTIFICATE_REMEDY)}"
        cause = cause.__cause__ or cause.__context__
    return None


_MOST_CAUSES = 10
"""Largest number of exceptions behind another one that are searched."""


def environment_error(err: BaseException) -> ConfigError | None:
    """Return an error of the operator's environment as one line with its remedy; None for any other exception.

    A missing file and a closed pipe are none of these: unless its caller expects them, they are bugs.
    """
    remedy = environment_remedy(err)
    if remedy is None and isinstance(err, ValueError) and (name := _variable_quoted_by(str(err))) is not None:
        remedy = f"correct or unset {name}"
    return None if remedy is None else ConfigError(f"{type(err).__name__}: {message_of(err)}; {remedy}")


def environment_remedy(err: BaseException) -> str | None:
    """Return what the operator can do about an error of their environment; None for any other exception."""
    if isinstance(err, MemoryError) or (isinstance(err, RuntimeError) and str(err) == "can't start new thread"):
        return _MEMORY
    if isinstance(err, ssl.SSLError):
        return CERTIFICATE_REMEDY
    if isinstance(err, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
        return _ENCODING
    if isinstance(err, socket.gaierror):
        return _NETWORK
    if isinstance(err, OSError) and err.errno is not None:
        return _ENVIRONMENT.get(err.errno)
    return _NETWORK if isinstance(err, ConnectionRefusedError | ConnectionResetError | TimeoutError) else None


def _variable_quoted_by(message: str) -> str | None:
    """Return the variable of Ray or of Hugging Face whose value a message quotes at its end; None if there is none.

    They read numbers from the environment at import, as in `invalid literal for int() with base 10: 'many'`.
    """
    names = (name for name in os.environ if name.startswith(("RAY_", "HF_")))
    return next((name for name in names if os.environ[name] and message.endswith(f": {os.environ[name]!r}")), None)


MESSAGE_LENGTH = 300
"""Maximum number of characters kept of another library's message."""


def message_of(err: BaseException) -> str:
    """Return the first line of an exception, `printable`, or the name of its class if it has no text.

    Another library's is cut. One of this package ends with the remedy: only the middle of long paths in it is left out.
    """
    line = str(err).strip().split("\n", 1)[0] or type(err).__name__
    if type(err).__module__.startswith(f"{__package__}."):
        return " ".join(_shortened(word) for word in printable(line).split(" "))
    return printable(line.splitlines()[0][:MESSAGE_LENGTH])[:MESSAGE_LENGTH]


def problem_of(err: BaseException) -> str:
    """Return what went wrong, for a message that names the file: of an error of the system nothing but its words."""
    if not isinstance(err, OSError) or not err.errno or not err.strerror:
        return message_of(err)
    detail = _DETAIL.search(err.strerror)
    return printable((detail[1] if detail else err.strerror).splitlines()[0][:MESSAGE_LENGTH])


_DETAIL = re.compile(r"Detail: \[errno [0-9]+\] (.+)")
"""End of Arrow's message about an error of the system, which has the path in its middle."""


def _shortened(word: str) -> str:
    half = MESSAGE_LENGTH // 2
    return word if len(word) <= MESSAGE_LENGTH else f"{word[:half]}…{word[-half:]}"


def printable(text: str) -> str:
    """Return `text` with control characters and lone surrogates escaped, as result rows and log lines need it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
