"""The only door to bytes: the output store, and the reading of what users name by URI.

Writing goes through obstore, because it creates only where nothing is (`If-None-Match: *` on S3, an atomic link on a
local disk) and tells a lost race apart from a failure. Reading what users name goes through fsspec and s3fs. Nothing is
ever streamed into a final name: an exception inside such a stream commits a truncated object.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
import obstore
import pyarrow.fs
from fsspec import asyn
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, from_url

from pia_batch.errors import ConfigError, ImageUnavailableError, ObjectExistsError, StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 6
"""How often one object is asked for or created before the store counts as down: about 30 s of waiting in all."""

REQUEST_TIMEOUT_S = 30.0
"""Seconds for one request to the store; an animation is a few MB."""

_DENIED = (PermissionDeniedError, UnauthenticatedError, PermissionError)
_HAS_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True)
class ObjectInfo:
    """An object of the store: its name below the store's root, and its size in bytes."""

    name: str
    num_bytes: int


class Store:
    """A folder of objects on S3, GCS, Azure or a local disk. Safe to use from several threads, and to pickle."""

    def __init__(self, uri: str) -> None:
        self.uri = absolute(uri).rstrip("/")
        self._client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "_client": None}

    @property
    def _store(self) -> Any:  # obstore's stores share no public base class
        if self._client is None:
            self._client = _open_store(self.uri)
        return self._client

    def uri_of(self, name: str) -> str:
        """The full URI of an object, as a reader would name it."""
        return f"{self.uri}/{name}"

    def create(self, name: str, data: bytes) -> None:
        """Store `data` under `name` unless something is there already. One request, all or nothing.

        A time-out leaves the outcome unknown, so it is tried again; then the name may be taken by one's own attempt.

        Raises:
            ObjectExistsError: the name is taken; the caller reads it and decides whether it is as good.
            StorageError: the store refused, or did not answer in `ATTEMPTS` attempts.
        """
        self._attempt(lambda: obstore.put(self._store, name, data, mode="create"), "create", name)

    def replace(self, name: str, data: bytes) -> None:
        """Store `data` under `name` whatever is there: a run's own results, and the pointer to the newest."""
        self._attempt(lambda: obstore.put(self._store, name, data), "write", name)

    def read(self, name: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is none.
            StorageError: the store refused or did not answer.
        """
        if self._is_absent():
            raise FileNotFoundError(self.uri_of(name))
        return bytes(self._attempt(lambda: obstore.get(self._store, name).bytes(), "read", name))

    def read_all(self, names: list[str], threads: int = 16) -> Iterator[bytes]:
        """The objects in the order of `names`, several requests at a time, at most `threads` held ahead."""
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(names), threads):
                yield from pool.map(self.read, names[start : start + threads])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object below `prefix`, in no particular order."""
        if self._is_absent():
            return
        for page in self._attempt(lambda: list(obstore.list(self._store, prefix)), "list", prefix):
            for item in page:
                yield ObjectInfo(item["path"], item["size"])

    def check(self) -> None:
        """Make sure that this store can be written, and that it refuses to create what exists.

        Leaves one small object, `_journal/create-only`, and never writes it twice.

        Raises:
            StorageError: not writable, or a store that ignores `If-None-Match` and so could lose finished work.
        """
        name = "_journal/create-only"
        for _ in range(2):
            try:
                self.create(name, b"this store creates only where nothing is\n")
            except ObjectExistsError:
                return
        msg = (
            f"{self.uri} ignores conditional creation (If-None-Match), on which exact commits depend; "
            "use a store that honours it, such as AWS S3, GCS, Azure, SeaweedFS, MinIO or a local disk"
        )
        raise StorageError(msg)

    def _is_absent(self) -> bool:
        """Whether this is a local folder that nobody has written to yet; reading must not make it."""
        return self.uri.startswith("file://") and not Path(_local_path(self.uri)).exists()

    def _attempt(self, call: Callable[[], T], verb: str, name: str) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except (BaseError, OSError) as err:
                cause, reason = _cause(err), _first_line(err)
                if cause == "absent" and verb == "read":
                    raise
                if cause == "absent":
                    msg = f"cannot {verb} {self.uri_of(name)}: no such bucket or folder; create it, or correct the URI"
                    raise StorageError(msg) from None
                if cause == "exists":
                    msg = f"{self.uri_of(name)} exists"
                    raise ObjectExistsError(msg) from None
                if cause == "denied":
                    msg = f"may not {verb} {self.uri_of(name)}: {reason}; check the credentials and the policy"
                    raise StorageError(msg) from None
                if attempt == ATTEMPTS:
                    msg = f"cannot {verb} {self.uri_of(name)} after {attempt} attempts: {reason}"
                    raise StorageError(msg) from None
                log.warning("store_retry verb=%s name=%s attempt=%d error=%s", verb, name, attempt, reason)
                time.sleep(min(2.0**attempt / 2, 10.0))
        raise AssertionError  # unreachable: the last attempt returns or raises


def _cause(err: Exception) -> str:
    """What a client's exception means: `absent`, `exists`, `denied`, or `passing`: worth another attempt."""
    # A listing raises GenericError whatever the status is.
    status = re.search(r"status code: (\d+)", str(err)) if isinstance(err, GenericError) else None
    if isinstance(err, FileNotFoundError) or (status and status[1] == "404"):
        return "absent"
    if isinstance(err, _DENIED) or (status and status[1] in ("401", "403")):
        return "denied"
    return "exists" if isinstance(err, AlreadyExistsError) else "passing"


def absolute(uri: str) -> str:
    """A URI with its scheme; paths become absolute `file://` URIs.

    Raises:
        ConfigError: not a URI, or one with S3 credentials in it, which no client here would use.
    """
    if not _HAS_SCHEME.match(uri):
        return Path(uri).expanduser().absolute().as_uri()
    try:
        parts = urlsplit(uri)
    except ValueError as err:
        msg = f"{redacted(uri)} is not a URI: {err}"
        raise ConfigError(msg) from None
    if parts.scheme in ("s3", "s3a") and ":" in parts.netloc:
        msg = (
            f"{redacted(uri)} was given with credentials, which results and logs would repeat; "
            "give them by the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
        )
        raise ConfigError(msg)
    return uri


def redacted(text: str) -> str:
    """`text` without the user names, passwords and signatures of the URIs in it."""
    # A secret key of S3 may hold slashes.
    text = re.sub(r"(?i)([a-z][a-z0-9+.-]*://)[^/:@\s]*(:[^@\s]*)?@", r"\1", text)
    return re.sub(r"(?i)(https?://[^?#\s]*)[?#]\S*", r"\1", text)


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A pyarrow file system for reading `uri`, and the path inside it."""
    uri = absolute(uri)
    if uri.startswith("file://"):
        return pyarrow.fs.LocalFileSystem(), _local_path(uri)
    filesystem, path = _filesystem(urlsplit(uri).scheme), uri
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), filesystem._strip_protocol(path)  # noqa: SLF001 - fsspec has no public name for it


def read_image(uri: str, base_uri: str, *, schemes: tuple[str, ...], max_bytes: int, timeout_s: float) -> bytes:
    """The bytes of a condition image as stored.

    Args:
        uri: absolute, or a path relative to the folder `base_uri`.
        base_uri: the folder of the manifest.
        schemes: what may be opened.
        max_bytes: more than this is refused, without reading the rest.
        timeout_s: seconds, retries of passing faults included.

    Raises:
        ImageUnavailableError: for every reason why there are no bytes, with the URI and the reason.
    """
    try:
        target = absolute(_resolve(uri, base_uri))
    except ConfigError as err:
        msg = f"column 'image': {err}"
        raise ImageUnavailableError(msg) from None
    shown = redacted(target)
    scheme = urlsplit(target).scheme
    if scheme not in schemes:
        msg = (
            f"column 'image': {shown}: scheme {scheme!r} is not allowed; allowed: {', '.join(schemes)} (images.schemes)"
        )
        raise ImageUnavailableError(msg)
    data = _read_patiently(target, max_bytes, timeout_s)
    if len(data) > max_bytes:
        msg = f"column 'image': {shown} has more than {max_bytes} bytes (images.max_bytes)"
        raise ImageUnavailableError(msg)
    if not data:
        msg = f"column 'image': {shown} is empty"
        raise ImageUnavailableError(msg)
    return data


def _read_patiently(uri: str, max_bytes: int, timeout_s: float) -> bytes:
    """Up to `max_bytes` + 1 bytes; passing faults are tried again until the time is up."""
    shown = redacted(uri)
    deadline = time.monotonic() + timeout_s
    pause_s = 0.2
    while True:
        try:
            return _read_capped(uri, max_bytes, deadline - time.monotonic())
        except Exception as err:  # noqa: BLE001 - every client has its own classes for a passing fault
            reason = f"column 'image': {shown} {_refusal(err)}: {redacted(_first_line(err))}"
            final = isinstance(err, _FINAL) or time.monotonic() + pause_s > deadline
            if final:
                raise ImageUnavailableError(reason) from None
        time.sleep(pause_s)
        pause_s *= 2


_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError)


def _refusal(err: Exception) -> str:
    if isinstance(err, FileNotFoundError):
        return "does not exist"
    if isinstance(err, PermissionError):
        return "may not be read"
    return "cannot be opened" if isinstance(err, _FINAL) else "could not be read in time"


def _resolve(uri: str, base_uri: str) -> str:
    if _HAS_SCHEME.match(uri):
        return uri
    if uri.startswith("/"):
        return Path(uri).as_uri()
    base = base_uri.rstrip("/")
    if base.startswith("file://"):
        return (Path(_local_path(base)) / uri).as_uri()
    return f"{base}/{uri}"


def _read_capped(uri: str, max_bytes: int, timeout_s: float) -> bytes:
    if uri.startswith("file://"):
        path = Path(_local_path(uri))
        if not stat.S_ISREG(path.stat().st_mode):
            msg = "not a regular file"
            raise ValueError(msg)
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    filesystem = _filesystem(urlsplit(uri).scheme)
    path = filesystem._strip_protocol(uri)  # noqa: SLF001 - fsspec has no public name for it
    deadline = time.monotonic() + timeout_s
    info = _within(timeout_s, filesystem, "info", path)
    if info["type"] == "directory":
        msg = "not an object but a prefix"
        raise IsADirectoryError(msg)
    if not info["size"]:
        return b""
    end = min(info["size"], max_bytes + 1)
    # By keyword: the second positional argument of s3fs is a version id.
    return bytes(_within(deadline - time.monotonic(), filesystem, "cat_file", path, start=0, end=end))


def _within(timeout_s: float, filesystem: Any, method: str, path: str, **options: int) -> Any:  # fsspec is untyped
    """What a method of fsspec returns; s3fs by itself multiplies its own retries with botocore's: minutes."""
    if not filesystem.async_impl:
        return getattr(filesystem, method)(path, **options)
    call = getattr(filesystem, f"_{method}")
    return asyn.sync(filesystem.loop, call, path, timeout=max(timeout_s, 0.1), **options)


@functools.cache
def _filesystem(scheme: str) -> Any:  # fsspec is untyped
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": 5,
            "read_timeout": 15,
            "retries": {"mode": "standard", "max_attempts": 3},
            "max_pool_connections": 64,
        }
    return fsspec.filesystem(scheme, **options)


def _open_store(uri: str) -> Any:  # obstore's stores share no public base class
    if uri.startswith("file://"):
        path = Path(_local_path(uri))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            msg = f"output {uri} is not a folder that can be made: {err}"
            raise StorageError(msg) from None
        return LocalStore(path)
    options: dict[str, Any] = {}
    if uri.startswith(("s3://", "s3a://")):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            options["region"] = "us-east-1"
    try:
        return from_url(
            uri,
            client_options={
                "allow_http": bool(options.get("endpoint", "").startswith("http://")),
                "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
                "connect_timeout": timedelta(seconds=5),
            },
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=20)},
            **options,
        )
    except (BaseError, ValueError) as err:
        msg = f"cannot open output {redacted(uri)}: {_first_line(err)}"
        raise ConfigError(msg) from None


def _local_path(uri: str) -> str:
    return unquote(urlsplit(uri).path)


def _first_line(err: BaseException) -> str:
    text = str(err).strip()
    return text.splitlines()[0][:300] if text else type(err).__name__
