"""The output's store: the only door by which anything is written.

It goes through obstore, because that creates only where nothing is (`If-None-Match: *` on S3, an atomic link on a local
disk) and tells a lost race apart from a failure. Nothing is ever streamed into a final name: an exception inside such a
stream commits a truncated object.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from pia_batch.errors import ConfigError, ObjectExistsError, StorageError, message_of
from pia_batch.storage.concurrency import map_in_threads
from pia_batch.storage.retries import retry
from pia_batch.storage.schemes import LOCAL, SCHEMES, UnsupportedSchemeError, canonical, expected, find
from pia_batch.storage.uris import redacted, redacted_uri

log = logging.getLogger(__name__)

T = TypeVar("T")
V = TypeVar("V")

ATTEMPTS = 6
"""Attempts for one request before the store counts as down, with pauses of 25 s in all."""

MAX_PAUSE_S = 10.0
"""Longest pause between two attempts, in seconds; the first one is 1 s, and each is twice the one before."""

REQUEST_TIMEOUT_S = 30.0
"""Seconds for one request to the store; an animation is a few MB."""

PAGE_OBJECTS = 1000
"""What one page of a listing holds; S3 gives no more."""

PART_BYTES = 4 * 2**20
"""What `Store.download` asks for by one request; eight of them arrive in `REQUEST_TIMEOUT_S` at 9 Mbit/s."""

MEDIA_TYPES = {
    "gif": "image/gif",
    "html": "text/html; charset=utf-8",
    "json": "application/json",
    "mp4": "video/mp4",
    "parquet": "application/vnd.apache.parquet",
    "webp": "image/webp",
    "zip": "application/zip",
}
"""By extension. Stores call the rest `application/octet-stream`, which browsers save and do not show."""

_DENIED = (PermissionDeniedError, UnauthenticatedError, PermissionError)
_STAGED = re.compile(r".+#\d+")
"""What obstore calls a local file before it is whole."""
_HAS_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_LACKS_SLASHES = re.compile(rf"^({'|'.join(name for name in SCHEMES if name != LOCAL)}):(?!//)")


@dataclass(frozen=True)
class ObjectInfo:
    """An object of the store: its name below the store's root, its size in bytes, and the store's tag of its content.

    Two objects with one tag are the same upload; the tag tells nothing else. None: the store gives no tags.
    `modified_s` is when it was written, in seconds since 1970 by the store's clock; equality does not look at it.
    """

    name: str
    num_bytes: int
    etag: str | None = None
    modified_s: float | None = field(default=None, compare=False)


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
        attributes = self._attributes(name)
        self._attempt(
            lambda: obstore.put(self._store, name, data, mode="create", attributes=attributes), "create", name
        )

    def replace(self, name: str, data: bytes) -> None:
        """Store `data` under `name` whatever is there: a run's own results, and the pointer to the newest."""
        attributes = self._attributes(name)
        self._attempt(lambda: obstore.put(self._store, name, data, attributes=attributes), "write", name)

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
        return self.each(self.read, names, threads)

    def each(self, function: Callable[[V], T], items: Iterable[V], threads: int = 16) -> Iterator[T]:
        """What `function` returns for each item, in order; it asks this store, and is called in several threads."""
        return map_in_threads(function, items, threads)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object below `prefix`, in no particular order; in memory there is one page of the listing at a time."""
        if self._is_absent():
            return
        pages: Any = None
        last: str | None = None

        def next_page() -> Any:  # obstore's own dictionaries
            nonlocal pages
            if pages is None and last is not None and self._is_local:
                msg = f"the disk failed in the middle of a listing of {self.uri_of(prefix)}; start again"
                raise StorageError(msg)  # a disk lists in no order, so there is no place to go on from
            pages = pages or obstore.list(self._store, prefix, offset=last, chunk_size=PAGE_OBJECTS)
            try:
                return next(pages, None)
            except BaseException:
                pages = None
                raise

        while page := self._attempt(next_page, "list", prefix):
            for item in page:
                yield ObjectInfo(item["path"], item["size"], item["e_tag"], item["last_modified"].timestamp())
            last = page[-1]["path"]

    def staged(self, prefix: str) -> Iterator[ObjectInfo]:
        """What killed writers have left below `prefix` of a local disk: no listing shows it. Other stores have none."""
        if not self._is_local:
            return
        root = Path(local_path(self.uri))
        for folder, _, names in os.walk(root / prefix):
            for path in (Path(folder, name) for name in names if _STAGED.fullmatch(name)):
                with suppress(FileNotFoundError):  # its writer was alive, and has finished
                    stat = path.stat()
                    yield ObjectInfo(path.relative_to(root).as_posix(), stat.st_size, None, stat.st_mtime)

    def delete(self, name: str) -> None:
        """Remove what `list` or `staged` named; nothing happens where it is gone already.

        Raises:
            StorageError: the store refused or did not answer.
        """
        with suppress(FileNotFoundError):
            if self._is_local:  # obstore takes no name that a staged file has
                self._attempt(Path(local_path(self.uri), name).unlink, "delete", name)
            else:
                self._attempt(lambda: obstore.delete(self._store, name), "delete", name)

    def stat(self, name: str) -> ObjectInfo:
        """What a listing would say of one object.

        Raises:
            FileNotFoundError: there is none.
            StorageError: the store refused or did not answer.
        """
        if self._is_absent():
            raise FileNotFoundError(self.uri_of(name))
        item = self._attempt(lambda: obstore.head(self._store, name), "read", name)
        return ObjectInfo(name, item["size"], item["e_tag"], item["last_modified"].timestamp())

    def download(self, found: ObjectInfo, path: Path, threads: int = 8) -> None:
        """Write an object to the local file `path`, several parts at a time, all of them of the version `found`.

        The file is on the disk when this returns; after an exception there may be a part of it.

        Args:
            found: as `list` or `stat` returned it.
            path: in a folder that exists; overwritten.
            threads: parts of `PART_BYTES` asked for at a time.

        Raises:
            StorageError: the store refused, did not answer, or holds another version by now.
            OSError: the local disk is full or may not be written.
        """

        def fetch(start: int) -> None:
            end = min(start + PART_BYTES, found.num_bytes)
            part = self._attempt(lambda: self._read_part(found, start, end), "read", found.name)
            if len(part) != end - start:
                raise StorageError(_changed(self.uri_of(found.name)))
            if os.pwrite(file.fileno(), part, start) != len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        with path.open("wb") as file:
            for _ in map_in_threads(fetch, range(0, found.num_bytes, PART_BYTES), threads):
                pass
            os.fsync(file.fileno())

    def _read_part(self, found: ObjectInfo, start: int, end: int) -> bytes:
        wanted: obstore.GetOptions = {"range": (start, end), "if_match": found.etag}
        try:
            return bytes(obstore.get(self._store, found.name, options=wanted).bytes())
        except (PreconditionError, FileNotFoundError):
            raise StorageError(_changed(self.uri_of(found.name))) from None

    def check(self, probe: str) -> None:
        """Make sure that this store can be written, and that it refuses to create what exists.

        Leaves one small object, and never writes it twice.

        Args:
            probe: the name of that object.

        Raises:
            StorageError: not writable, or a store that ignores `If-None-Match` and so could lose finished work.
        """
        for _ in range(2):
            try:
                self.create(probe, b"this store creates only where nothing is\n")
            except ObjectExistsError:
                return
        msg = (
            f"{self.uri} ignores conditional creation (If-None-Match), on which exact commits depend; "
            "use a store that honours it, such as AWS S3, GCS, Azure, SeaweedFS, MinIO or a local disk"
        )
        raise StorageError(msg)

    def _attributes(self, name: str) -> dict[str, str] | None:
        """What a web server tells of an object, and a browser asks for; a local disk has no place for it."""
        media_type = None if self._is_local else MEDIA_TYPES.get(name.rpartition(".")[2])
        return {"Content-Type": media_type} if media_type else None

    @property
    def _is_local(self) -> bool:
        return self.uri.startswith("file://")

    def _is_absent(self) -> bool:
        """Whether this is a local folder that nobody has written to yet; reading must not make it."""
        return self._is_local and not Path(local_path(self.uri)).exists()

    def _attempt(self, call: Callable[[], T], verb: str, name: str) -> T:
        shown = redacted_uri(self.uri_of(name))

        def warn(attempt: int, err: Exception) -> None:
            reason = redacted(message_of(err))
            log.warning("store_retry verb=%s name=%s attempt=%d error=%s", verb, name, attempt, reason)

        pauses_s = [min(2.0**k, MAX_PAUSE_S) for k in range(ATTEMPTS - 1)]
        try:
            return retry(call, is_transient=_is_transient, pauses_s=pauses_s, on_retry=warn)
        except (BaseError, OSError) as err:
            cause, reason = _cause(err), redacted(message_of(err))
            if cause == "absent" and verb in ("read", "delete"):
                raise
            if cause == "absent":
                msg = f"cannot {verb} {shown}: no such bucket or folder; create it, or correct the URI"
                raise StorageError(msg) from None
            if cause == "exists":
                msg = f"{shown} exists"
                raise ObjectExistsError(msg) from None
            if cause == "denied":
                msg = f"may not {verb} {shown}: {reason}; check the credentials and the policy"
                raise StorageError(msg) from None
            msg = f"cannot {verb} {shown} after {ATTEMPTS} attempts: {reason}"
            raise StorageError(msg) from None


def _changed(uri: str) -> str:
    return f"{uri} was replaced or removed while it was read; start again"


def _cause(err: Exception) -> str:
    """What a client's exception means: `absent`, `exists`, `denied`, or `transient`: worth another attempt."""
    # A listing raises GenericError whatever the status is.
    status = re.search(r"status code: (\d+)", str(err)) if isinstance(err, GenericError) else None
    if isinstance(err, FileNotFoundError) or (status and status[1] == "404"):
        return "absent"
    if isinstance(err, _DENIED) or (status and status[1] in ("401", "403")):
        return "denied"
    return "exists" if isinstance(err, AlreadyExistsError) else "transient"


def _is_transient(err: Exception) -> bool:
    return isinstance(err, BaseError | OSError) and _cause(err) == "transient"


def absolute(uri: str) -> str:
    """A URI with its scheme; paths become absolute `file://` URIs.

    Raises:
        ConfigError: not a URI, one without a bucket or a path, or one with credentials in it.
    """
    if not _HAS_SCHEME.match(uri):
        if found := _LACKS_SLASHES.match(uri):
            msg = f"{redacted_uri(uri)} is neither a URI nor a likely path; write {found[1]}://, with two slashes"
            raise ConfigError(msg)
        return Path(uri).expanduser().absolute().as_uri()
    try:
        parts = urlsplit(uri)
    except ValueError:
        msg = f"{redacted_uri(uri)} is not a URI"
        raise ConfigError(msg) from None
    scheme = SCHEMES.get(parts.scheme)
    is_bucket = scheme is not None and scheme.committer == "obstore"
    # A secret key of S3 may hold a slash, and the netloc ends there.
    if ":" in (parts.netloc if scheme and scheme.store == "s3" else parts.netloc.rpartition("@")[0]):
        msg = (
            f"{redacted_uri(uri)} was given with credentials, which results and logs would repeat; "
            "give them by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
        raise ConfigError(msg)
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        msg = f"{uri} names a host where the path should begin; write file:///FULL/PATH, or the path alone"
        raise ConfigError(msg)
    if is_bucket and not parts.netloc:
        msg = f"{uri} names no bucket; write {parts.scheme}://BUCKET/PATH"
        raise ConfigError(msg)
    return canonical(uri) if parts.scheme == LOCAL else uri


def _open_store(uri: str) -> Any:  # obstore's stores share no public base class
    try:
        scheme = find(uri, "output")
    except UnsupportedSchemeError as err:
        raise ConfigError(f"cannot open {redacted_uri(uri)}: {err}") from None
    if scheme.committer == "local":
        path = Path(local_path(uri))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            msg = f"output {uri} is not a folder that can be made: {err.strerror}; give another one, or the right to it"
            raise StorageError(msg) from None
        return LocalStore(path)
    options: dict[str, Any] = {}
    if scheme.store == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            options["region"] = "us-east-1"
    try:
        return from_url(
            canonical(uri),
            client_options={
                "allow_http": bool(options.get("endpoint", "").startswith("http://")),
                "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
                "connect_timeout": timedelta(seconds=5),
            },
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=20)},
            **options,
        )
    except (BaseError, ValueError) as err:
        msg = f"cannot open {redacted_uri(uri)}: {redacted(message_of(err))}; use {expected('output')}"
        raise ConfigError(msg) from None


def local_path(uri: str) -> str:
    """The path that a `file://` URI names."""
    return unquote(urlsplit(uri).path)
