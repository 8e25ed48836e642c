"""Store errors: the exceptions of obstore and of the operating system as one line with what the operator can do."""

from __future__ import annotations

import os
import re

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from pia_batch.errors import CERTIFICATE_REMEDY, ObjectExistsError, StorageError, message_of
from pia_batch.storage import s3_config
from pia_batch.storage.local_disk import DISK_REMEDIES, PASSING
from pia_batch.storage.uris import redacted

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_STATUS = re.compile(r"status code: (\d+)")
_CODE = re.compile(r"<Code>\s*([\w.]+)\s*</Code>")
_DENIED = (PermissionDeniedError, UnauthenticatedError, PermissionError)
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
"""Part of obstore's error by which it does not trust a server."""

_CONFLICTS = frozenset({"ConditionalRequestConflict", "OperationAborted"})
"""Codes of a create that met another write of its name: nothing is decided, and S3 asks for another attempt."""

_CREDENTIALS = "check the credentials and the policy"
_EXPIRED = f"{_CREDENTIALS}: the temporary ones have expired; renew them, or use a role that renews itself"
_QUOTA = "free some space in the store, or raise its quota"

_CODE_REMEDIES = {
    "RequestTimeTooSkewed": "the clock of this machine differs too much from that of the store: correct it",
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    **dict.fromkeys(("QuotaExceeded", "ServiceQuotaExceeded", "XMinioStorageFull", "InsufficientStorage"), _QUOTA),
}
"""Remedies by the code with which a store refuses a request."""

_STATUS_REMEDIES = {
    "429": "the store asks for fewer requests: wait, or use fewer engines (placement.max_engines)",
    "503": "the store is overloaded or down: wait, or use fewer engines (placement.max_engines)",
    "507": _QUOTA,
}
"""Remedies by the HTTP status of the last attempt."""

_FAILING = "look into the log and the documentation of the store for this answer"
_SILENT = "check that the store runs, its address (AWS_ENDPOINT_URL), the network and the proxy settings"


def cause_of(err: Exception) -> str | int:
    """Classify a client's exception: `absent`, `exists`, `denied`, `certificate`, `other region`, or `transient`.

    An error of a local disk is classified by its number, a key of `DISK_REMEDIES`.
    """
    # A listing raises GenericError for every HTTP status.
    status = _STATUS.search(str(err)) if isinstance(err, GenericError) else None
    number, code = _os_error(err), _code(err)
    cause: str | int = "transient"
    if isinstance(err, FileNotFoundError) or (status and status[1] == "404"):
        cause = "absent"
    elif code in _CONFLICTS:
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
    return cause


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
    cause, reason = cause_of(err), redacted(message_of(err))
    subject = f"cannot {verb} {shown}"
    match cause:
        case "exists":
            return ObjectExistsError(f"{shown} exists")
        case "absent":
            msg = f"{subject}: no such bucket or folder; create it, or correct the URI"
        case "denied":
            msg = f"may not {verb} {shown}: {reason}; {_CODE_REMEDIES.get(_code(err) or '', _CREDENTIALS)}"
        case int():
            msg = f"{subject}: {os.strerror(cause)}; {DISK_REMEDIES[cause]}"
        case "other region":
            msg = f"{subject}: {s3_config.other_region_remedy()}"
        case "certificate":
            found = _CERTIFICATE.search(str(err))
            msg = f"{subject}: invalid certificate ({found and found[1]}); {CERTIFICATE_REMEDY}"
        case _:
            msg = f"{subject} after {attempts} attempt{'s' if attempts > 1 else ''}: {reason}; {_remedy(err)}"
    return StorageError(msg)


def _remedy(err: Exception) -> str:
    status = _STATUS.search(str(err))
    if remedy := _CODE_REMEDIES.get(_code(err) or ""):
        return remedy
    return _SILENT if status is None else _STATUS_REMEDIES.get(status[1], _FAILING)


def _code(err: Exception) -> str | None:
    """Return the code of S3's answer, which obstore repeats; None if there is none."""
    found = _CODE.search(str(err))
    return found and found[1]


def _os_error(err: Exception) -> int:
    """Return the number of the operating system's error, which obstore repeats; 0 if there is none."""
    found = _OS_ERROR.search(str(err))
    return err.errno if isinstance(err, OSError) and err.errno else int(found[1]) if found else 0
