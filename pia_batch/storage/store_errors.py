"""Store errors: the exceptions of obstore and of the operating system as one line with what the operator can do."""

from __future__ import annotations

import errno
import os
import re

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from pia_batch.errors import (
    CERTIFICATE_REMEDY,
    ObjectExistsError,
    StorageError,
    UnwritableStoreError,
    environment_remedy,
    message_of,
    printable,
)
from pia_batch.storage import s3_config
from pia_batch.storage.local_disk import DISK_REMEDIES, FULL, PASSING
from pia_batch.storage.uris import redacted

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_STATUS = re.compile(r"status code: (\d+)( [A-Za-z][A-Za-z -]*)?")
_CODE = re.compile(r"<Code>\s*([\w.]+)\s*</Code>")
_MOST_WORDS = 150
"""Maximum number of characters kept of a store's own words."""

_WORDS = re.compile(rf"<Message>\s*([^<]{{1,{_MOST_WORDS}}})")
_DENIED = (PermissionDeniedError, UnauthenticatedError, PermissionError)
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
"""Part of obstore's error by which it does not trust a server."""

_CONFLICTS = frozenset({"ConditionalRequestConflict", "OperationAborted"})
"""Codes of a create that met another write of its name: nothing is decided, and S3 asks for another attempt."""

_GARBLED = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"})
"""Codes by which a store refuses a request that did not arrive as it was sent; the next one may."""

_PASSING_STATUSES = frozenset({"404", "408", "409", "412", "425", "429"})
"""HTTP statuses of 400 to 499 that have a meaning of their own, or that end by another attempt."""

_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})

REFUSED_TO_ALL = s3_config.DENIALS | {"InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"}
"""Codes of a refusal that depends on neither the object nor its bucket, as a misspelled bucket of one request does."""

_CREDENTIALS = "check the credentials and the policy"
_EXPIRED = f"{_CREDENTIALS}: the temporary ones have expired; renew them, or use a role that renews itself"
_QUOTA = "free some space in the store, or raise its quota"

_NO_ROOM = frozenset(
    {
        *("QuotaExceeded", "ServiceQuotaExceeded", "InsufficientStorage"),
        *("XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"),
    }
)
"""Codes of a store that has no room for an object, by its disks or by a quota."""

_CREATE = "no such bucket or folder; create it, or correct the URI"
_BUSY = "the store is overloaded or down: wait, or use fewer engines (placement.max_engines)"

_CODE_REMEDIES = {
    **dict.fromkeys(("AccessDenied", "Forbidden"), _CREDENTIALS),
    **dict.fromkeys(_NO_BUCKET, _CREATE),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable"), _BUSY),
    "InvalidAccessKeyId": f"{_CREDENTIALS}: this store does not know the access key, or it is another store's",
    "SignatureDoesNotMatch": f"{_CREDENTIALS}: the secret key does not belong to the access key",
    "RequestTimeTooSkewed": "the clock of this machine differs too much from that of the store: correct it",
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    **dict.fromkeys(_NO_ROOM, _QUOTA),
}
"""Remedies by the code with which a store refuses a request."""

_STATUS_REMEDIES = {
    "429": "the store asks for fewer requests: wait, or use fewer engines (placement.max_engines)",
    "503": _BUSY,
    "507": _QUOTA,
}
"""Remedies by the HTTP status of the last attempt."""

_NO_REASON = f"the store gives no reason; {_CREDENTIALS}: temporary ones may have expired"
FAILING = "look into the log and the documentation of the store for this answer"
_DISK = "look into the system's log, or choose another path"
SILENT = "check that the store runs, its address (AWS_ENDPOINT_URL), the network and the proxy settings"


def cause_of(err: Exception) -> str | int:
    """Classify a client's exception.

    Returns:
        `absent`, `no bucket`, `exists`, `denied`, `certificate`, `other region`, `refused` or `transient`.
        An error of a local disk is classified by its number, a key of `DISK_REMEDIES`.
    """
    # A listing raises GenericError for every HTTP status.
    status = _STATUS.search(str(err)) if isinstance(err, GenericError) else None
    number, code = _os_error(err), _code(err)
    cause: str | int = "transient"
    if code in _NO_BUCKET:
        cause = "no bucket"
    elif isinstance(err, FileNotFoundError) or (status and status[1] == "404"):
        cause = "absent"
    elif code in _CONFLICTS or code in _GARBLED:
        cause = "transient"
    elif number in DISK_REMEDIES:
        cause = number
    elif isinstance(err, _DENIED) or (status and status[1] in ("401", "403")) or code in s3_config.DENIALS:
        cause = "denied"
    elif _CERTIFICATE.search(str(err)):
        cause = "certificate"
    elif s3_config.OTHER_REGION.search(str(err)):
        cause = "other region"
    elif isinstance(err, AlreadyExistsError):
        cause = "exists"
    elif status and code and _is_refusal(status[1]):
        cause = "refused"
    return cause


def _is_refusal(status: str) -> bool:
    """Return True for an HTTP status that no other attempt changes."""
    return status == "501" or (status.startswith("4") and status not in _PASSING_STATUSES)


def reason_of(err: Exception) -> str:
    """Return what went wrong, without credentials: the status, the code and the words of a store's answer, if any.

    The client's own text repeats the name, and an answer is behind its first line.
    """
    answer, code, words = _STATUS.search(str(err)), _code(err), _WORDS.search(str(err))
    if answer is None:
        return redacted(message_of(err))
    said = "".join((f", {code}" if code else "", f" ({printable(' '.join(words[1].split()))})" if words else ""))
    return redacted(f"the store answers {answer[1]}{(answer[2] or '').rstrip()}{said}")


def remedy_for(code: str) -> str | None:
    """Return what the operator can do about the code of a store's answer; None for any other code."""
    return _CODE_REMEDIES.get(code)


def lacks_reason(err: Exception) -> bool:
    """Return True for the answer 400 or 403 without a code, which S3 gives to HEAD."""
    status = _STATUS.search(str(err))
    return status is not None and status[1] in ("400", "403") and _code(err) is None


def refused_to_all(code: str, words: str) -> str:
    """Return the reason and the remedy where a store refuses every object by a code of `REFUSED_TO_ALL`."""
    said = redacted(printable(words)[:_MOST_WORDS])
    return f"the store answers {code} ({said}); {_CODE_REMEDIES.get(code, _CREDENTIALS)}"


def is_transient(err: Exception) -> bool:
    """Return True if another attempt of the same call may succeed."""
    return isinstance(err, BaseError | OSError) and cause_of(err) in ("transient", *PASSING)


def explain(err: Exception, verb: str, shown: str, attempts: int) -> StorageError:
    """Return our own error for a client's exception.

    Args:
        err: Exception of the last attempt.
        verb: Infinitive of what failed, such as `create`.
        shown: URI of the object, without credentials.
        attempts: Number of attempts.
    """
    cause, reason = cause_of(err), reason_of(err)
    subject = f"cannot {verb} {shown}"
    match cause:
        case "exists":
            return ObjectExistsError(f"{shown} exists")
        case "absent" | "no bucket":
            msg = f"{subject}: {_CREATE}"
        case "denied":
            msg = f"may not {verb} {shown}: {reason}; {_CODE_REMEDIES.get(_code(err) or '', _CREDENTIALS)}"
        case "refused":
            msg = f"{subject}: {reason}; {_remedy(err, shown, verb)}"
        case int():
            msg = f"{subject}: {os.strerror(cause)}; {DISK_REMEDIES[cause]}"
        case "other region":
            msg = f"{subject}: {s3_config.other_region_remedy()}"
        case "certificate":
            found = _CERTIFICATE.search(str(err))
            msg = f"{subject}: invalid certificate ({found and found[1]}); {CERTIFICATE_REMEDY}"
        case _:
            tried = f"after {attempts} attempt{'s' if attempts > 1 else ''}"
            msg = f"{subject} {tried}: {reason}; {_remedy(err, shown, verb)}"
    return UnwritableStoreError(msg) if verb in _WRITES and _takes_nothing(err) else StorageError(msg)


def _takes_nothing(err: Exception) -> bool:
    """Return True where no write can succeed; SeaweedFS answers 500 once the quota of a bucket is used up."""
    status = _STATUS.search(str(err))
    failed = status is not None and status[1].startswith("5")
    return failed or _os_error(err) in FULL or _code(err) in _NO_ROOM


_WRITES = ("create", "write")
"""Verbs of what may need room."""

_OF_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""Errors of this process or machine, which it also meets on its way to another store."""


def _remedy(err: Exception, shown: str, verb: str) -> str:
    status = _STATUS.search(str(err))
    if remedy := _CODE_REMEDIES.get(_code(err) or ""):
        return remedy
    number, is_local = _os_error(err), shown.startswith("file:")
    if number in _OF_PROCESS or (is_local and number):
        return environment_remedy(OSError(number, os.strerror(number))) or _DISK
    if status is None:
        return _DISK if is_local else SILENT
    if status[1] == "400" and _code(err) is None:  # an answer to HEAD has no body
        return _NO_REASON
    if status[1] == "500" and verb in _WRITES:
        return f"{FAILING}: its disks or a quota may be full"
    return _STATUS_REMEDIES.get(status[1], FAILING)


def _code(err: Exception) -> str | None:
    """Return the code of S3's answer, which obstore repeats; None if there is none."""
    found = _CODE.search(str(err))
    return found and found[1]


def _os_error(err: Exception) -> int:
    """Return the number of the operating system's error, which obstore repeats; 0 if there is none."""
    found = _OS_ERROR.search(str(err))
    return err.errno if isinstance(err, OSError) and err.errno else int(found[1]) if found else 0
