"""Reads of what users name by URI: manifests as Arrow file systems, images by their first bytes.

They go through fsspec and s3fs, which have a client for every scheme that a manifest may name. Nothing is written here.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec import asyn

from pia_batch.errors import CERTIFICATE_REMEDY, StorageError, certificate_problem, environment_remedy
from pia_batch.storage import s3_config, schemes, store_errors
from pia_batch.storage.s3_config import S3Config
from pia_batch.storage.store_uris import absolute, check_segments, local_path
from pia_batch.storage.uris import TooLargeError

T = TypeVar("T")

_TAGS = ("ETag", "etag", "generation", "LastModified", "last_modified", "updated", "mtime", "created")
"""Names under which fsspec's file systems report a property that changes with the content, the most exact first."""


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return a pyarrow file system that reads `uri`, and the path inside it.

    Raises:
        ConfigError: `uri` is malformed.
        UnsupportedSchemeError: Manifests cannot be read from its scheme.
        ImportError: The package that reads its scheme is not installed.
    """
    uri = absolute(uri)
    if uri.startswith("file://"):
        return pyarrow.fs.LocalFileSystem(), local_path(uri)
    check_segments(uri)
    scheme = schemes.find(uri, "manifest")
    filesystem = _filesystem(scheme.store)
    path = filesystem._strip_protocol(schemes.canonical(uri))  # noqa: SLF001 - fsspec has no public name for it
    return pyarrow.fs.PyFileSystem(_FSSpecHandler(filesystem, scheme.store)), path


class _FSSpecHandler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc] # pyarrow is untyped
    """pyarrow's handler, which takes every failure of a store at the opening of a file for a missing file.

    It can be pickled: where it arrives, it has the client of that process, which has the credentials of that machine.
    """

    def __init__(self, filesystem: Any, store: str) -> None:  # fsspec is untyped
        super().__init__(filesystem)
        self._store = store

    def __reduce__(self) -> tuple[Any, ...]:
        return _handler_of, (self._store,)

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb"), mode="r")


def _handler_of(store: str) -> _FSSpecHandler:
    return _FSSpecHandler(_filesystem(store), store)


def remedy_for(err: BaseException) -> str | None:
    """Return what the operator can do about the answer of S3 behind an exception of s3fs; None for any other one."""
    return store_errors.remedy_for(_code_of(err))


def reading_remedy(place: str, err: BaseException) -> str | None:
    """Return what the operator can do where a file that they named cannot be read; None where nothing is known.

    Args:
        place: URI or path of the file.
        err: Exception of its file system.
    """
    if remedy := remedy_for(err):
        return remedy
    if "://" not in place or place.startswith("file://"):
        return environment_remedy(err)
    if isinstance(err, PermissionError):
        is_explained = err.filename is not None or "AWS_" in str(err)
        return None if is_explained else "check the credentials and the policy"
    if certificate_problem(err):
        return CERTIFICATE_REMEDY
    if _code_of(err) and not isinstance(err, FileNotFoundError):
        return store_errors.FAILING
    is_s3 = place.startswith(("s3://", "s3a://"))
    return (store_errors.SILENT if is_s3 else _SILENT) if isinstance(err, (TimeoutError, *_client_errors())) else None


_SILENT = "check the name and the address, that the server runs, the network and the proxy settings"

_OF_CLIENTS = (
    *(("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("aiohttp", "ClientError")),
    *(("azure.core.exceptions", "AzureError"), ("google.auth.exceptions", "GoogleAuthError"), ("httpx", "HTTPError")),
)
"""Modules and base classes of the exceptions that the clients of stores let through, and that are no OSError."""


def unreadable(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return `others` with the classes of what the system and the clients raise where a file cannot be read."""
    return (OSError, *_client_errors(), *others)


def _client_errors() -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in _OF_CLIENTS if module in sys.modules)


def _code_of(err: BaseException) -> str:
    """Return the code of S3's answer behind an exception of s3fs; empty if there is none."""
    answered = getattr(err.__cause__, "response", None)  # botocore's is a mapping; an HTTP client's is none
    return str(answered.get("Error", {}).get("Code", "")) if isinstance(answered, Mapping) else ""


def version_of(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    """Return the version of a file: its size with its tag, or with the time of its last change.

    Raises:
        FileNotFoundError: There is no such file.
        Exception: The client's own exception.
    """
    if isinstance(filesystem, pyarrow.fs.PyFileSystem):
        return _version(_info(filesystem.handler.fs, path))
    found = filesystem.get_file_info(path)
    if not found.is_file:
        raise FileNotFoundError(path)
    return f"{found.size} {found.mtime_ns}"


@dataclass(frozen=True)
class FoundFile:
    """A file in a listing.

    Attributes:
        path: Path inside its file system.
        num_bytes: Size, in bytes.
        version: Size with the tag, or with the time of the last change; another version means other content.
    """

    path: str
    num_bytes: int
    version: str


def list_files(filesystem: pyarrow.fs.FileSystem, root: str) -> list[FoundFile]:
    """Return the file at `root`, or every file below the folder `root`, sorted by path; empty if there is nothing.

    Raises:
        Exception: The client's own exception.
    """
    if isinstance(filesystem, pyarrow.fs.PyFileSystem):
        client = filesystem.handler.fs
        found = client.find(root, detail=True, refresh=True) if _can_refresh(client) else client.find(root, detail=True)
        files = [FoundFile(path, info["size"] or 0, _version(info)) for path, info in found.items()]
        return sorted(files, key=lambda file: file.path)
    info = filesystem.get_file_info(root)
    listed = [info] if info.is_file else []
    if info.type == pyarrow.fs.FileType.Directory:
        listed = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    files = [FoundFile(item.path, item.size, f"{item.size} {item.mtime_ns}") for item in listed if item.is_file]
    return sorted(files, key=lambda file: file.path)


def _can_refresh(client: Any) -> bool:  # fsspec is untyped
    """Return True for clients that keep listings whatever they are asked, unless each call says otherwise."""
    return "hf" in client.protocol


def pinned(uri: str, commit: str | None = None) -> tuple[str, str]:
    """Return a URI of the Hugging Face hub with its revision as a commit, and the commit; other URIs as they are.

    Args:
        uri: URI with its scheme.
        commit: Commit to use; None: the one that the revision in `uri`, or the main branch, has now.

    Raises:
        FileNotFoundError: There is no such repository or revision.
        Exception: The client's own exception.
    """
    if not uri.startswith("hf://"):
        return uri, ""
    client = _filesystem("hf")
    place = client.resolve_path(uri)
    if commit is None:
        info = client._api.repo_info(  # noqa: SLF001 - the client that has the file system's endpoint and token
            place.repo_id, repo_type=place.repo_type, revision=place.revision
        )
        commit = str(info.sha)
    folder = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    path = f"/{place.path_in_repo}" if place.path_in_repo else ""
    return f"hf://{folder}{place.repo_id}@{commit}{path}", commit


def changed_ns(filesystem: pyarrow.fs.FileSystem, path: str) -> int | None:
    """Return the time of a file's last change, in nanoseconds since 1970; None if its version depends on a tag.

    Raises:
        Exception: See `version_of`.
    """
    if not isinstance(filesystem, pyarrow.fs.PyFileSystem):
        return int(filesystem.get_file_info(path).mtime_ns)
    info = _info(filesystem.handler.fs, path)
    return None if any(info.get(name) for name in _TAGS[:3]) else time.time_ns()


def _version(info: Mapping[str, Any]) -> str:
    """Return the version of a file from the description of fsspec's file system."""
    tags = (str(info[name]).strip('"') for name in _TAGS if info.get(name))
    return f"{info['size']} {next(tags, '')}"


_ABSENT = (404, 410)
"""HTTP status codes for a resource that does not exist."""


def _info(filesystem: Any, path: str) -> dict[str, Any]:  # fsspec is untyped
    """Return the file system's own description of a file.

    fsspec reports every HTTP failure as a missing file; here, those other than 404 and 410 are an OSError.
    """
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


def check_access(uris: Iterable[str]) -> None:
    """Verify that this process has what it needs to read from S3, if one of `uris` is there. Sends no request to it.

    Raises:
        ConfigError: S3 is not configured, or not rightly; the message names the remedy.
    """
    if any(schemes.find(uri, "images.allow").store == "s3" for uri in uris):
        s3_config.resolve()


def read_object(uri: str, num_bytes: int, *, timeout_s: float, whole: bool = True) -> bytes:
    """Return the first `num_bytes` bytes of an object, or the whole object if it is shorter. Makes one attempt.

    Never reads more than `num_bytes`, and never exceeds `timeout_s` by more than a second.

    Args:
        uri: URI of the object, such as `s3://bucket/key`, with `?versionId=` if one version is wanted.
        num_bytes: Number of bytes, at least 1.
        timeout_s: Time limit, in seconds.
        whole: True to refuse a longer object; False to request only its beginning.

    Raises:
        TooLargeError: `whole` is set, and the store reports a longer object; nothing of it is read.
        StorageError: The store refuses every object of this bucket, such as to credentials that have expired.
        OSError: The store's answer, as FileNotFoundError, PermissionError or IsADirectoryError.
        Exception: The client's own exception, for a transient fault.
    """
    scheme = schemes.find(uri, "image")
    filesystem = _filesystem(scheme.store)
    if scheme.store == "s3":
        return bytes(wait(_read_s3, filesystem, uri, num_bytes, whole, timeout_s=timeout_s))
    path = filesystem._strip_protocol(uri)  # noqa: SLF001 - fsspec has no public name for it
    deadline = time.monotonic() + timeout_s
    info = _within(timeout_s, filesystem, "info", path)
    if info["type"] == "directory":
        raise IsADirectoryError("a prefix, not an object")
    if whole and info["size"] > num_bytes:
        raise TooLargeError
    end = min(info["size"], num_bytes)
    if not end:
        return b""
    data = _within(deadline - time.monotonic(), filesystem, "cat_file", path, start=0, end=end)
    return bytes(data)[:num_bytes]


def wait(function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, timeout_s: float) -> T:
    """Run a coroutine on the one thread of all asynchronous clients, and return its result.

    Raises:
        TimeoutError: The coroutine took longer than `timeout_s` seconds; it is cancelled.
    """
    result: T = asyn.sync(asyn.get_loop(), function, *arguments, timeout=max(timeout_s, 0.1))
    return result


async def _read_s3(filesystem: Any, uri: str, num_bytes: int, whole: bool) -> bytes:  # fsspec is untyped
    """Read as `read_object` does, with one request, and not one byte more of its answer."""
    # s3fs's own read makes two requests, accepts an answer of any length, and ignores the version.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    key, _, version = key.partition("?versionId=")
    options = {"VersionId": version} if version else {}
    if not whole:
        options["Range"] = f"bytes=0-{num_bytes - 1}"
    try:
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **options)  # noqa: SLF001 - see above
    except OSError as err:
        if not whole and "range" in str(err).lower():  # S3 refuses any range of an empty object
            return b""
        code = _code_of(err)
        if code in store_errors.REFUSED_TO_ALL and await _is_refused_otherwise(filesystem, bucket, code):
            raise StorageError(store_errors.refused_to_all(code, err.strerror or str(err))) from None
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


async def _is_refused_otherwise(filesystem: Any, bucket: str, code: str) -> bool:  # fsspec is untyped
    """Return True if the bucket refuses another object by the same code, so that the first one is not the cause.

    A proxy that writes a key in another way invalidates the signature of this key alone.
    """
    try:
        await filesystem._call_s3("get_object", Bucket=bucket, Key=_OTHER_KEY, Range="bytes=0-0")  # noqa: SLF001 - see above
    except OSError as err:
        return _code_of(err) == code
    return False


_OTHER_KEY = "pia-batch"
"""Key of plain letters, which needs not exist."""


def _within(timeout_s: float, filesystem: Any, method: str, path: str, **options: int) -> Any:  # fsspec is untyped
    """Call a method of fsspec within a time limit. By keyword, because positional arguments differ between clients."""
    if not filesystem.async_impl:
        return getattr(filesystem, method)(path, **options)
    return wait(functools.partial(getattr(filesystem, f"_{method}"), path, **options), timeout_s=timeout_s)


def _filesystem(store: str) -> Any:  # fsspec is untyped
    return _s3_filesystem(s3_config.resolve()) if store == "s3" else _other_filesystem(store)


@functools.cache
def _other_filesystem(store: str) -> Any:  # fsspec is untyped
    try:
        return fsspec.filesystem(store, use_listings_cache=False)
    except ImportError as err:
        package = schemes.SCHEMES[store].package
        if package is None:
            raise
        msg = f"{store}:// needs the package {package}; pip install 'pia-batch[{schemes.EXTRAS[package]}]'"
        raise ImportError(msg) from err


@functools.lru_cache(maxsize=8)
def _s3_filesystem(config: S3Config) -> Any:  # fsspec is untyped
    """Return s3fs with the configuration that obstore has too. Everything that it would look up itself is set."""
    return fsspec.filesystem(
        "s3",
        anon=config.credentials is None,
        key=None,  # fsspec's own settings, such as FSSPEC_S3_KEY, are for reading only
        secret=None,
        token=None,
        endpoint_url=config.endpoint,
        session=config.aio_session(),
        client_kwargs={"region_name": config.region, "verify": config.ca_bundle},
        config_kwargs={
            "connect_timeout": 5,
            "read_timeout": 15,
            "retries": {"mode": "standard", "max_attempts": 3},
            "max_pool_connections": 64,
            "proxies": dict(config.proxies),
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
