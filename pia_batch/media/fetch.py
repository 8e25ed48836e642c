"""Image bytes by URI: opens only what `uris.Policy` permits, bounded in time and size.

Every failure has the column, the URI without its secrets, and the reason. It is a RequestError; where a store refuses
every image, it is a StorageError, which ends the run instead of failing one request after the other.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import stat
import time

from pia_batch.config import ImagesConfig
from pia_batch.errors import (
    ConfigError,
    ImageNotAllowedError,
    ImageUnavailableError,
    RequestError,
    StorageError,
    certificate_problem,
    message_of,
    printable,
    problem_of,
)
from pia_batch.storage import filesystems
from pia_batch.storage.http_client import HttpReader
from pia_batch.storage.local_disk import DENIED_REMEDY
from pia_batch.storage.retries import retry
from pia_batch.storage.uris import (
    Location,
    NotAllowedError,
    Policy,
    RefusedError,
    TooLargeError,
    redacted,
    redacted_uri,
    remedy_for_missing,
)

HTTP = HttpReader()

_NO_FILES = ("/proc", "/sys")
"""Folders of the kernel, whose files show the machine's processes, memory and devices."""

_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    ValueError,
    ConfigError,
    StorageError,
)
_FINAL_NUMBERS = frozenset({errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EPERM})
"""Error numbers after which another attempt cannot succeed."""


def read_image(
    uri: str, base_uri: str, images: ImagesConfig, *, column: str = "image", http: HttpReader = HTTP
) -> bytes:
    """Return an image as it is stored: 1 to `images.max_bytes` bytes.

    Args:
        uri: Absolute URI, or a path relative to the folder `base_uri`.
        base_uri: Folder of the manifest, with its scheme.
        images: Allowed places, size limit, and time limit, which includes retries of transient faults. Reading a local
            file cannot be interrupted.
        column: Column of the manifest, for the error.
        http: Reader of http and https URLs.

    Raises:
        ImageNotAllowedError: The policy does not permit the location.
        ImageUnavailableError: There are no bytes, for a reason that may be this image's own.
        StorageError: The store refuses every image of its bucket, or this process lacks its credentials or its client.
    """
    wanted = f"column {column!r}: {printable(redacted_uri(uri))}"
    too_large = ImageUnavailableError(
        f"{wanted} has more than {images.max_bytes} bytes (images.max_bytes); raise the limit, or store a smaller image"
    )
    try:
        data = _read(uri, base_uri, images, http, images.max_bytes + 1, whole=True)
    except TooLargeError:
        raise too_large from None
    except Exception as err:  # noqa: BLE001 - every client has its own classes; `_explain` maps them to ours
        raise _explain(wanted, uri, err, images.timeout_s) from None
    if len(data) > images.max_bytes:
        raise too_large
    return _not_empty(wanted, data)


def read_image_head(
    uri: str, base_uri: str, images: ImagesConfig, num_bytes: int, *, column: str = "image", http: HttpReader = HTTP
) -> bytes:
    """Return the first `num_bytes` bytes of an image, or all of it if it is shorter; never more.

    Arguments and errors are those of `read_image`, except that an image may have any size.
    """
    wanted = f"column {column!r}: {printable(redacted_uri(uri))}"
    try:
        data = _read(uri, base_uri, images, http, num_bytes, whole=False)
    except Exception as err:  # noqa: BLE001 - as above
        raise _explain(wanted, uri, err, images.timeout_s) from None
    return _not_empty(wanted, data)


@functools.lru_cache(maxsize=16)
def _policy(base_uri: str, allow: tuple[str, ...]) -> Policy:
    return Policy(base_uri, allow)


def _read(uri: str, base_uri: str, images: ImagesConfig, http: HttpReader, num_bytes: int, *, whole: bool) -> bytes:
    """Return up to `num_bytes` bytes; repeat the read after transient faults until the time is up."""
    policy = _policy(base_uri, images.allow)
    location = policy.locate(uri)
    deadline = time.monotonic() + images.timeout_s
    return retry(
        lambda: _read_once(location, policy, http, num_bytes, deadline - time.monotonic(), whole=whole),
        is_transient=lambda err: not _is_final(err),
        pauses_s=(0.2 * 2**k for k in itertools.count()),
        deadline=deadline,
    )


def _read_once(
    location: Location, policy: Policy, http: HttpReader, num_bytes: int, timeout_s: float, *, whole: bool
) -> bytes:
    if location.scheme == "file":
        return _read_file(location.target, policy, num_bytes)
    if location.is_web:

        def check(url: str) -> str:
            return policy.locate(url).target

        read = functools.partial(http.read, location.target, check, num_bytes, whole=whole)
        return filesystems.wait(read, timeout_s=timeout_s)
    if not location.parts[-1]:
        raise IsADirectoryError("a prefix, not an object")
    return filesystems.read_object(location.target, num_bytes, timeout_s=timeout_s, whole=whole)


def _read_file(path: str, policy: Policy, num_bytes: int) -> bytes:
    """Return the beginning of a regular file that is inside one of the policy's folders once links are followed."""
    real = os.path.realpath(path)
    open_folders = [os.path.realpath(folder) for folder in policy.folders]
    if not any(_is_inside(real, folder) for folder in open_folders) or any(_is_inside(real, no) for no in _NO_FILES):
        raise policy.refusal()
    with os.fdopen(_open_regular(real), "rb") as file:
        return file.read(num_bytes)


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _open_regular(real: str) -> int:
    """Open the regular file `real`, a path without links, and return its file descriptor.

    Opens folder by folder and follows no links, so that no folder can be exchanged for a link after the check; and does
    not block, as it would on a pipe.
    """
    *folders, name = [part for part in real.split("/") if part] or ["."]
    at = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        for folder in folders:
            deeper = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = deeper
        # Checked before it is opened, because opening alone moves a tape; and after, as it may have been exchanged.
        _check_regular(os.stat(name, dir_fd=at, follow_symlinks=False))
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=at)
    finally:
        os.close(at)
    try:
        _check_regular(os.fstat(file))
    except BaseException:
        os.close(file)
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError("cannot be opened: not a regular file")


def _is_final(err: Exception) -> bool:
    if isinstance(err, _FINAL) or (isinstance(err, OSError) and err.errno in _FINAL_NUMBERS):
        return True
    return certificate_problem(err) is not None


def _explain(wanted: str, uri: str, err: Exception, timeout_s: float) -> RequestError | StorageError:
    if isinstance(err, StorageError | ConfigError | ImportError):
        return StorageError(f"{wanted} cannot be opened: {redacted(message_of(err))}")
    if isinstance(err, NotAllowedError):
        return ImageNotAllowedError(f"{wanted} {redacted(message_of(err))}")
    if isinstance(err, RefusedError):
        return ImageUnavailableError(f"{wanted} {redacted(message_of(err))}")
    if untrusted := certificate_problem(err):
        return ImageUnavailableError(f"{wanted} cannot be opened: {untrusted}")
    problem, remedy = "cannot be opened" if _is_final(err) else "could not be read in time", filesystems.remedy_for(err)
    if isinstance(err, FileNotFoundError):
        problem, remedy = "does not exist", remedy or remedy_for_missing(uri)
    elif isinstance(err, PermissionError):
        problem = "may not be read"
        if err.filename is not None:  # a file of this machine
            remedy = DENIED_REMEDY
    reason = "" if isinstance(err, FileNotFoundError) and err.errno else f": {redacted(problem_of(err))}"
    limit = "" if _is_final(err) else f" (images.timeout_s: {timeout_s:g} s)"
    return ImageUnavailableError(f"{wanted} {problem}{reason}{limit}{f'; {remedy}' if remedy else ''}")


def _not_empty(wanted: str, data: bytes) -> bytes:
    if not data:
        raise ImageUnavailableError(f"{wanted} is empty")
    return data
