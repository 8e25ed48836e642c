"""What can go wrong, by who must act.

PiaBatchError
├── ConfigError        the operator fixes the config or the command; exit code 2
├── ManifestError      the operator fixes the manifest; exit code 2, before Ray starts
├── StorageError       the operator fixes the store, or starts again once it is back
│   └── ObjectExistsError   a create lost the race; the caller compares
├── BrokenDeviceError  the operator takes a machine out, or mends its drivers; raised before anything is drawn
├── LeaseHeldError     another run works on this output; exit code 75
├── InterruptedRunError     SIGINT or SIGTERM; what was finished is committed; exit code 4
├── AccountingError    finalise found a request without exactly one result; nothing is published
└── RequestError       one request is bad: it becomes a `failed` result and the run goes on

Anything else is a bug: it ends the run with its traceback and exit code 1, and what is committed stays.
Every class takes one message, so that it survives pickling between processes.
"""


class PiaBatchError(Exception):
    """The root of everything this package raises on purpose."""

    exit_code = 1
    """What a command leaves with that ends by it."""


class ConfigError(PiaBatchError):
    """A config, a flag or a model that cannot work. The message names the key and the remedy."""

    exit_code = 2


class ManifestError(PiaBatchError):
    """A manifest that cannot be read, is empty, or lacks a required column."""

    exit_code = 2


class StorageError(PiaBatchError):
    """The store refused or did not answer. After a write the outcome is unknown: create again."""

    exit_code = 2


class ObjectExistsError(StorageError):
    """`Store.create` found the name taken, perhaps by its own earlier attempt."""


class BrokenDeviceError(PiaBatchError):
    """A device computes other pixels than it should, or nothing at all. The message says which device and how far."""

    exit_code = 2


class LeaseHeldError(PiaBatchError):
    """Another run holds the lease of this output."""

    exit_code = 75


class InterruptedRunError(PiaBatchError):
    """The run was asked to stop. Start it again to resume."""

    exit_code = 4


class AccountingError(PiaBatchError):
    """Results and manifest do not match one to one; the results were not published."""


class RequestError(PiaBatchError):
    """One request cannot be animated. `kind` is the result's `error_kind`; the text is its `error`."""

    kind = "request_error"


class ImageNotAllowedError(RequestError):
    """The image lies outside of the manifest's own store and of what `images.allow` opens."""

    kind = "image_not_allowed"


class ImageUnavailableError(RequestError):
    """The image could not be read: missing, refused, too slow or too large."""

    kind = "image_unavailable"


class ImageUnreadableError(RequestError):
    """What was read is no image that we accept: truncated, corrupt, another format, too many pixels."""

    kind = "image_unreadable"


class ImageMismatchError(RequestError):
    """The image's sha256 is not the one that the manifest promised."""

    kind = "image_mismatch"


class UnsupportedSettingError(RequestError):
    """A setting that this model cannot take, such as more frames than its motion modules know."""

    kind = "unsupported_setting"


class NonFiniteError(RequestError):
    """The network produced NaN or infinity, and decoding again in float32 did not help."""

    kind = "non_finite"


class EngineError(RequestError):
    """The engine raised for this request alone, while it draws others. The text names what it raised."""

    kind = "engine_error"


class WorkerCrashError(RequestError):
    """The worker died whenever it drew this request, and no other."""

    kind = "worker_crash"


class RequestTimeoutError(RequestError):
    """The request took longer than its share of `limits.timeout_s`."""

    kind = "timeout"


class DegenerateError(RequestError):
    """The clip was drawn, and shows less than `limits.min_frame_std` or `limits.min_motion` asks for."""

    kind = "degenerate"


class EncodingError(RequestError):
    """The animation could not be encoded, or what was encoded does not decode to what went in."""

    kind = "encoding_failed"


class DeviceMemoryError(RequestError):
    """The device, or its worker, has too little memory for this one request, even by itself."""

    kind = "out_of_memory"


MESSAGE_LENGTH = 300
"""Characters of another library's message that are passed on."""


def message_of(err: BaseException) -> str:
    """The first line of another library's exception, `printable`; the name of its class where it says nothing."""
    lines = str(err).strip().splitlines()
    return printable(lines[0][:MESSAGE_LENGTH] if lines else type(err).__name__)[:MESSAGE_LENGTH]


def printable(text: str) -> str:
    """`text` as a result row or a log line can hold it: control characters and half surrogate pairs are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
