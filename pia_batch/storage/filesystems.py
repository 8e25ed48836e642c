"""Reading what users name by URI: manifests as Arrow file systems, images and weights by their first bytes.

Goes through fsspec and s3fs, which have a client for every scheme that a manifest may name. Nothing is written here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import fsspec
import pyarrow.fs
from fsspec import asyn

from pia_batch.storage import schemes
from pia_batch.storage.object_store import absolute, local_path
from pia_batch.storage.uris import TooLargeError

T = TypeVar("T")

_TAGS = ("ETag", "etag", "generation", "LastModified", "last_modified", "updated", "mtime", "created")
"""What file systems of fsspec call that which changes with the content, the most exact first."""


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A pyarrow file system for reading `uri`, and the path inside it."""
    uri = absolute(uri)
    if uri.startswith("file://"):
        return pyarrow.fs.LocalFileSystem(), local_path(uri)
    scheme = schemes.find(uri, "manifest")
    filesystem = _filesystem(scheme.store)
    path = filesystem._strip_protocol(schemes.canonical(uri))  # noqa: SLF001 - fsspec has no public name for it
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def version_of(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    """What tells a file from the one that replaces it: its size with its tag, or with the time of its last change.

    Raises:
        FileNotFoundError: there is none.
        Exception: the client's own.
    """
    if isinstance(filesystem, pyarrow.fs.PyFileSystem):
        info = _info(filesystem.handler.fs, path)
        tags = (str(info[name]).strip('"') for name in _TAGS if info.get(name))
        return f"{info['size']} {next(tags, '')}"
    found = filesystem.get_file_info(path)
    if not found.is_file:
        raise FileNotFoundError(path)
    return f"{found.size} {found.mtime_ns}"


def changed_ns(filesystem: pyarrow.fs.FileSystem, path: str) -> int | None:
    """When a file was changed, in nanoseconds since 1970, if its version depends on that; None: on a tag.

    Raises:
        Exception: as `version_of`.
    """
    if not isinstance(filesystem, pyarrow.fs.PyFileSystem):
        return int(filesystem.get_file_info(path).mtime_ns)
    info = _info(filesystem.handler.fs, path)
    return None if any(info.get(name) for name in _TAGS[:3]) else time.time_ns()


_ABSENT = (404, 410)
"""What an HTTP server answers where there is nothing."""


def _info(filesystem: Any, path: str) -> dict[str, Any]:  # fsspec is untyped
    """As the file system has it. What keeps HTTP from an answer is an OSError: fsspec takes it for a missing file."""
    try:
        info: dict[str, Any] = filesystem.info(path)
    except FileNotFoundError as err:
        cause = err.__cause__
        status = getattr(cause, "status", None)
        if cause is None or "http" not in filesystem.protocol or status in _ABSENT:
            raise
        if status is not None:
            msg = f"the server answers {status} {getattr(cause, 'message', '')}"
            raise OSError(msg) from None
        raise OSError(str(cause) or type(cause).__name__) from None
    return info


def read_object(uri: str, num_bytes: int, *, timeout_s: float, whole: bool = True) -> bytes:
    """The first `num_bytes` bytes of an object, or all of it where that is less. One attempt; never reads more.

    Args:
        uri: `s3://bucket/key`, `?versionId=` included, or what else fsspec has a file system for.
        num_bytes: at least 1.
        timeout_s: seconds.
        whole: False: only the beginning is wanted, and asked for.

    Raises:
        TooLargeError: with `whole`, an object that says to be longer, before it is read.
        OSError: FileNotFoundError, PermissionError, IsADirectoryError: what the store says.
        Exception: the client's own, for what may pass; no time limit is exceeded by more than a second.
    """
    scheme = schemes.find(uri, "image")
    filesystem = _filesystem(scheme.store)
    if scheme.store == "s3":
        return bytes(wait(_read_s3, filesystem, uri, num_bytes, whole, timeout_s=timeout_s))
    path = filesystem._strip_protocol(uri)  # noqa: SLF001 - fsspec has no public name for it
    deadline = time.monotonic() + timeout_s
    info = _within(timeout_s, filesystem, "info", path)
    if info["type"] == "directory":
        raise IsADirectoryError("not an object but a prefix")
    if whole and info["size"] > num_bytes:
        raise TooLargeError
    end = min(info["size"], num_bytes)
    if not end:
        return b""
    data = _within(deadline - time.monotonic(), filesystem, "cat_file", path, start=0, end=end)
    return bytes(data)[:num_bytes]


def wait(function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, timeout_s: float) -> T:
    """What a coroutine returns, run on the one thread of all asynchronous clients.

    Raises:
        TimeoutError: after `timeout_s` seconds; the coroutine is cancelled.
    """
    result: T = asyn.sync(asyn.get_loop(), function, *arguments, timeout=max(timeout_s, 0.1))
    return result


async def _read_s3(filesystem: Any, uri: str, num_bytes: int, whole: bool) -> bytes:  # fsspec is untyped
    """As `read_object`: one request, and of its answer no byte more than is wanted."""
    # Not s3fs's own reading: that asks twice, takes what comes whatever it asked for, and passes over a version.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    key, _, version = key.partition("?versionId=")
    options = {"VersionId": version} if version else {}
    if not whole:
        options["Range"] = f"bytes=0-{num_bytes - 1}"
    try:
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **options)  # noqa: SLF001 - see above
    except OSError as err:
        if not whole and "range" in str(err).lower():  # an empty object has no first byte
            return b""
        raise
    body = answer["Body"]
    try:
        if whole and answer.get("ContentLength", 0) > num_bytes:
            raise TooLargeError
        data = bytearray()
        while len(data) < num_bytes and (more := await body.read(num_bytes - len(data))):
            data += more
    finally:
        body.close()
    return bytes(data)


def _within(timeout_s: float, filesystem: Any, method: str, path: str, **options: int) -> Any:  # fsspec is untyped
    """What a method of fsspec returns, by keyword: the positional arguments differ from client to client."""
    if not filesystem.async_impl:
        return getattr(filesystem, method)(path, **options)
    return wait(functools.partial(getattr(filesystem, f"_{method}"), path, **options), timeout_s=timeout_s)


@functools.cache
def _filesystem(store: str) -> Any:  # fsspec is untyped
    options: dict[str, Any] = {"use_listings_cache": False}
    if store == "s3":
        options["config_kwargs"] = {
            "connect_timeout": 5,
            "read_timeout": 15,
            "retries": {"mode": "standard", "max_attempts": 3},
            "max_pool_connections": 64,
        }
    try:
        return fsspec.filesystem(store, **options)
    except ImportError as err:
        package = schemes.SCHEMES[store].package
        if package is None:
            raise
        raise ImportError(f"{store}:// needs the package {package}; pip install {package}") from err
