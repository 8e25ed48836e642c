"""Object store of an output: the only module through which anything is written.

It uses obstore, which can create an object only if its name is free (`If-None-Match: *` on S3, an atomic link on a
local disk), and reports a lost race differently from a failure. Objects are never streamed to their final name, because
an exception inside such a stream commits a truncated object.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError, PreconditionError

from pia_batch.errors import ObjectExistsError, StorageError
from pia_batch.storage import local_disk, store_clients, store_errors
from pia_batch.storage.concurrency import map_in_threads
from pia_batch.storage.retries import retry
from pia_batch.storage.store_uris import absolute, check_prefix, local_path
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)

T = TypeVar("T")
V = TypeVar("V")

ATTEMPTS = 6
"""Attempts for one request before the store counts as down, with pauses of 25 s in all."""

MAX_PAUSE_S = 10.0
"""Longest pause between two attempts, in seconds; the first one is 1 s, and each is twice the one before."""

PAGE_OBJECTS = 1000
"""Number of objects in one page of a listing; S3 returns no more."""

PART_BYTES = 4 * 2**20
"""Size of one request of `Store.download`, in bytes; eight of them arrive within `store_clients.REQUEST_TIMEOUT_S`
at 9 Mbit/s."""

MEDIA_TYPES = {
    "gif": "image/gif",
    "html": "text/html; charset=utf-8",
    "jpg": "image/jpeg",
    "json": "application/json",
    "md": "text/markdown; charset=utf-8",
    "mp4": "video/mp4",
    "parquet": "application/vnd.apache.parquet",
    "webm": "video/webm",
    "webp": "image/webp",
    "zip": "application/zip",
}
"""Media types by file name extension. Stores give others `application/octet-stream`, which browsers save, not show."""

_STAGED = re.compile(r".+#\d+")
"""Name that obstore gives a local file until it is complete."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object of the store."""

    name: str
    """Name relative to the root of the store."""
    num_bytes: int
    etag: str | None = None
    """Tag of the upload: two objects with the same tag are the same upload. None: the store has no tags."""
    modified_s: float | None = field(default=None, compare=False)
    """Time of writing, in seconds since 1970 by the store's clock. Equality ignores it."""


class Store:
    """Folder of objects on S3, GCS, Azure or a local disk. It can be used from several threads, and pickled.

    Args:
        uri: URI or path of the folder.
        anchor: Name of an object that exists as long as the folder is the one that was checked. Without it a local
            folder was removed, replaced or unmounted: nothing more is read from it or written to it. None: not known.
            `check` makes its probe the anchor.
    """

    def __init__(self, uri: str, anchor: str | None = None) -> None:
        self.uri = absolute(uri).rstrip("/")
        check_prefix(self.uri)
        self._anchor = anchor
        self._client: Any = None
        self._ending = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "_anchor": self._anchor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_client": None, "_ending": threading.Event()}

    def stop_retrying(self) -> None:
        """Give every call of this object one attempt from now on; a call that waits for its next one has it at once.

        For a run that ends because of this store, and then still writes how it ended.
        """
        self._ending.set()

    @property
    def _store(self) -> Any:  # obstore's stores share no public base class
        if self._client is None:
            self._client = store_clients.open_store(self.uri)
        return self._client

    def uri_of(self, name: str) -> str:
        """Return the full URI of an object."""
        return f"{self.uri}/{name}"

    def create(self, name: str, data: bytes) -> None:
        """Store `data` under `name` if the name is free. One request, all or nothing.

        After a time-out the outcome is unknown, so the request is repeated; then the name may be taken by the first
        attempt of this very call.

        Raises:
            ObjectExistsError: The name is taken. The caller reads the object and decides whether it is as good.
            StorageError: The store refused, or did not answer in `ATTEMPTS` attempts.
        """
        attributes = self._attributes(name)
        self._attempt(
            lambda: obstore.put(self._store, name, data, mode="create", attributes=attributes), "create", name
        )

    def replace(self, name: str, data: bytes) -> None:
        """Store `data` under `name`, replacing any object: for a run's own results, and the pointer to the newest.

        Raises:
            StorageError: The store refused, or did not answer in `ATTEMPTS` attempts.
        """
        attributes = self._attributes(name)
        self._attempt(lambda: obstore.put(self._store, name, data, attributes=attributes), "write", name)

    def replace_file(self, name: str, path: Path) -> ObjectInfo:
        """Store a local file under `name`, replacing any object, and return what was stored.

        All or nothing, as `replace`; a large file is sent in parts, so that memory does not grow with it.

        Raises:
            StorageError: The store refused, or did not answer in `ATTEMPTS` attempts.
        """
        attributes = self._attributes(name)
        put = self._attempt(lambda: obstore.put(self._store, name, path, attributes=attributes), "write", name)
        return ObjectInfo(name, path.stat().st_size, put["e_tag"])

    def read(self, name: str) -> bytes:
        """Return the whole object.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: The store refused or did not answer.
        """
        if self._is_absent():
            raise FileNotFoundError(self.uri_of(name))
        return bytes(self._attempt(lambda: obstore.get(self._store, name).bytes(), "read", name))

    def read_json(self, name: str, fields: Sequence[str] = ()) -> dict[str, Any]:
        """Return an object that holds one JSON object.

        Args:
            name: Name of the object.
            fields: Names that the JSON object must have.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: It is damaged, such as by a power failure, or the store refused or did not answer.
        """
        data = self.read(name)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            found = None
        if isinstance(found, dict) and all(field in found for field in fields):
            return found
        problem = "is empty" if not data else "is not the JSON object that it should be"
        msg = f"{redacted_uri(self.uri_of(name))} is damaged: it {problem}; restore it, or delete it and start again"
        raise StorageError(msg)

    def read_all(self, names: list[str], threads: int = 16) -> Iterator[bytes]:
        """Yield the objects in the order of `names`: `threads` requests at a time, and as many objects held ahead."""
        return self.each(self.read, names, threads)

    def each(self, function: Callable[[V], T], items: Iterable[V], threads: int = 16) -> Iterator[T]:
        """Yield what `function` returns for each item, in order. Calls it in several threads; it uses this store."""
        return map_in_threads(function, items, threads)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object below `prefix`, in no particular order. Holds one page of the listing in memory.

        Raises:
            StorageError: The store refused or did not answer.
        """
        if self._is_absent():
            return
        pages: Any = None
        last: str | None = None

        def next_page() -> Any:  # obstore's own dictionaries
            nonlocal pages
            if pages is None and last is not None and self._is_local:
                msg = f"the disk failed in the middle of a listing of {self.uri_of(prefix)}; start again"
                raise StorageError(msg)  # a disk lists in no order, so the listing cannot be resumed
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
        """Yield the incomplete files that killed writers left below `prefix`, or of that name, on a local disk.

        No listing shows them. Other stores have none.
        """
        if not self._is_local:
            return
        root = Path(local_path(self.uri))
        below = (Path(folder, name) for folder, _, names in os.walk(root / prefix) for name in names)
        for path in itertools.chain(below, () if prefix.endswith("/") else root.glob(f"{prefix}#*")):
            if _STAGED.fullmatch(path.name):
                with suppress(FileNotFoundError):  # its writer is alive, and has just finished
                    stat = path.stat()
                    yield ObjectInfo(path.relative_to(root).as_posix(), stat.st_size, None, stat.st_mtime)

    def delete(self, name: str) -> None:
        """Remove an object that `list` or `staged` named; a name that is already gone is no error.

        Raises:
            StorageError: The store refused or did not answer.
        """
        with suppress(FileNotFoundError):
            if self._is_local:  # obstore refuses the names of staged files
                self._attempt(Path(local_path(self.uri), name).unlink, "delete", name)
            else:
                self._attempt(lambda: obstore.delete(self._store, name), "delete", name)

    def stat(self, name: str) -> ObjectInfo:
        """Return one object as a listing would describe it.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: The store refused or did not answer.
        """
        if self._is_absent():
            raise FileNotFoundError(self.uri_of(name))
        item = self._attempt(lambda: self._head(name), "read", name)
        return ObjectInfo(name, item["size"], item["e_tag"], item["last_modified"].timestamp())

    def _head(self, name: str) -> Any:  # obstore's own dictionaries
        """Describe an object. A refusal of HEAD has no body, so a GET asks for its code.

        Raises:
            Exception: The refusal of the GET, or of the HEAD where the GET was not refused.
        """
        try:
            return obstore.head(self._store, name)
        except BaseError as err:
            if store_errors.lacks_reason(err):
                obstore.get(self._store, name)  # its body is not read
            raise

    def download(self, found: ObjectInfo, path: Path, threads: int = 8) -> None:
        """Write an object to a local file, several parts at a time, all of them of the version `found`.

        The file is synchronised to the disk when this returns. After an exception it may be incomplete.

        Args:
            found: Object as `list` or `stat` returned it.
            path: File to write, in an existing folder; an existing file is overwritten.
            threads: Number of parts of `PART_BYTES` requested at a time.

        Raises:
            StorageError: The store refused, did not answer, or now holds another version.
            OSError: The local disk is full or cannot be written.
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
        except (PreconditionError, FileNotFoundError) as err:
            if store_errors.cause_of(err) == "no bucket":
                raise
            raise StorageError(_changed(self.uri_of(found.name))) from None

    def check(self, probe: str, link: Callable[[Path, Path], None] = os.link) -> None:
        """Verify that this store can be written, and that it refuses to create an object that exists.

        Leaves one small object, and never writes it twice.

        Args:
            probe: Name of that object.
            link: Function that makes a hard link on a local disk.

        Raises:
            ConfigError: The local disk has no hard links.
            StorageError: The store cannot be written, or ignores `If-None-Match` and so could lose finished work.
        """
        if self._is_local:
            local_disk.check_disk(Path(local_path(self.uri)), probe, link)
        for _ in range(2):
            try:
                self.create(probe, b"this store creates only where nothing is\n")
            except ObjectExistsError:
                self._anchor = probe
                return
        msg = (
            f"{self.uri}: the store ignores conditional creation (If-None-Match), on which exact commits depend; "
            "use a store that honours it, such as AWS S3, GCS, Azure, SeaweedFS, MinIO or a local disk"
        )
        raise StorageError(msg)

    def find_obstacle(self) -> str | None:
        """Return what will keep a run from writing to a local disk, as far as it is seen without writing; else None."""
        return local_disk.find_obstacle(Path(local_path(self.uri))) if self._is_local else None

    def is_full(self, probe: str) -> bool:
        """Return True if a local disk is too full for a small object; False for any other store.

        Args:
            probe: Name of an object, next to which a file is written for a moment.
        """
        return self._is_local and local_disk.is_full(Path(local_path(self.uri)), probe)

    def _attributes(self, name: str) -> dict[str, str] | None:
        """Return the attributes with which a web server delivers the object; a local disk cannot store any."""
        media_type = None if self._is_local else MEDIA_TYPES.get(name.rpartition(".")[2])
        return {"Content-Type": media_type} if media_type else None

    @property
    def _is_local(self) -> bool:
        return self.uri.startswith("file://")

    def _is_absent(self) -> bool:
        """Return True for a local folder that does not exist yet; reading must not create it.

        Raises:
            StorageError: It cannot be known, such as below a folder that is closed to this user.
        """
        if not self._is_local or self._anchor is not None:
            return False
        try:
            return not Path(local_path(self.uri)).exists()
        except OSError as err:
            raise StorageError(f"cannot read the folder {self.uri}: {local_disk.reason_of(err)}") from None

    def _attempt(self, call: Callable[[], T], verb: str, name: str) -> T:
        shown = redacted_uri(self.uri_of(name))

        def warn(attempt: int, err: Exception) -> None:
            reason = store_errors.reason_of(err)
            log.warning("store_retry verb=%s name=%s attempt=%d error=%s", verb, name, attempt, reason)

        attempts = 0

        def attempt() -> T:
            nonlocal attempts
            attempts += 1
            self._check_anchor(verb, shown)
            return call()

        pauses_s = [] if self._ending.is_set() else [min(2.0**k, MAX_PAUSE_S) for k in range(ATTEMPTS - 1)]
        try:
            return retry(attempt, is_transient=self._may_pass, pauses_s=pauses_s, on_retry=warn, hurry=self._ending)
        except (BaseError, OSError) as err:
            if verb in ("read", "delete") and store_errors.cause_of(err) == "absent":
                self._check_anchor(verb, shown)
                raise
            raise store_errors.explain(err, verb, shown, attempts) from None

    def _may_pass(self, err: Exception) -> bool:
        return not self._ending.is_set() and store_errors.is_transient(err)

    def _check_anchor(self, verb: str, shown: str) -> None:
        """Refuse to go on in a local folder that is no longer there: obstore would create it again, empty.

        Raises:
            StorageError: The folder was removed, replaced or unmounted.
        """
        if self._anchor is None or not self._is_local:
            return
        folder = Path(local_path(self.uri))
        try:
            folder.joinpath(self._anchor).stat()
        except (FileNotFoundError, NotADirectoryError):
            msg = (
                f"cannot {verb} {shown}: the folder {folder} was removed, replaced or unmounted after the start; "
                "restore or mount it, or choose another path"
            )
            raise StorageError(msg) from None


def _changed(uri: str) -> str:
    return f"{uri}: the object was replaced or removed while it was read; start again"
