"""Fetching of weights from a folder of this machine, the hub, or object storage; each object once per node.

Objects are kept in a cache folder, `PIA_BATCH_CACHE` or `~/.cache/pia_batch/weights`. A folder in the cache appears by
one rename after all its files are complete. It is reused as long as the store lists the same names, sizes and tags.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from pia_batch.errors import ConfigError
from pia_batch.storage import schemes
from pia_batch.storage.object_store import ObjectInfo, Store
from pia_batch.storage.uris import redacted
from pia_batch.weights import safetensors

log = logging.getLogger(__name__)

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)/(.+\.\w+)")
_RECORD = ".fetched.json"
_ABANDONED_S = 24 * 3600.0
"""Age in seconds at which an unfinished download counts as abandoned; younger ones may be another machine's."""


@dataclass(frozen=True)
class FetchedFolder:
    """Folder on this machine with the requested files.

    Attributes:
        root: Path of the folder.
        commit: Hub commit of the snapshot; None if it is not from the hub.
        named: Name in the config, for messages.
        origin: Location that has more files than were requested; None: the folder has all.
    """

    root: Path
    commit: str | None
    named: str
    origin: Location | None = None

    def names(self, part: str) -> list[str]:
        """Return the names of all files in a part's folder, fetched or not, without those of folders in it."""
        origin = self.origin or LocalFolder(self.root, self.named)
        folder = "" if part in ("", ".") else f"{part}/"
        inside = (name.removeprefix(folder) for name in origin.names() if name.startswith(folder))
        return sorted(name for name in inside if "/" not in name)


class Location(Protocol):
    """Location of weights: a local folder, a hub repository or a prefix of an object store."""

    def names(self) -> list[str]:
        """Return all files, relative to the location, with slashes."""

    def fetch(self, patterns: Sequence[str]) -> FetchedFolder:
        """Bring the files that match one of `patterns` to this machine. A pattern without a match is not an error.

        In a pattern, `*` matches any characters; every other character matches itself.
        """


class Hub(Protocol):
    """Interface of the Hugging Face hub that this package uses."""

    def names(self, repo_id: str, revision: str | None) -> list[str]:
        """Return the names of all files of a repository."""

    def download(self, repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
        """Download the files that match one of `patterns`; return their folder, which is named by its commit."""


def locate(name: str, revision: str | None, key: str, hub: Hub) -> tuple[Location, str | None]:
    """Return the location that a config's `name` means, and the file in it if `name` names a file.

    A name is, in this order: a URI (`file://`, or of an object store), a folder, a file, `owner/name` on the hub, or
    `owner/name/file.safetensors` there.

    Args:
        name: Name in the config.
        revision: Hub commit, tag or branch; unused for other locations.
        key: Key of the config, for messages.
        hub: Hub for hub ids; called only when the location is used.

    Raises:
        ConfigError: There is no such location, or the file is not safetensors.
    """
    scheme = _SCHEME.match(name)
    if scheme is not None and scheme[1].lower() != "file":
        return _locate_object(name, key)
    path = Path(unquote(urlsplit(name).path) if scheme else name).expanduser()
    if path.is_dir():
        return LocalFolder(path, name), None
    if path.is_file():
        safetensors.refuse_pickle(name, key)
        return LocalFolder(path.parent, name), path.name
    suffix = Path(name).suffix.lower()
    if scheme is None and _HUB_ID.fullmatch(name) and suffix not in (safetensors.SUFFIX, *safetensors.PICKLED):
        return HubRepository(name, revision, hub), None
    in_repository = None if scheme else _HUB_FILE.fullmatch(name)
    if in_repository is not None:
        safetensors.refuse_pickle(name, key)
        return HubRepository(in_repository[1], revision, hub), in_repository[2]
    raise ConfigError(
        f"{key}: there is no folder or file {name}, and it is not a hub id (owner/name, or owner/name/file.safetensors)"
    )


def _locate_object(uri: str, key: str) -> tuple[Location, str | None]:
    try:
        schemes.find(uri, "weights")
    except schemes.UnsupportedSchemeError as err:
        raise ConfigError(f"{key}: {redacted(uri)}: {err}, or a hub id (owner/name)") from None
    whole = uri.rstrip("/")
    parent, _, last = whole.rpartition("/")
    if Path(last).suffix.lower() in (safetensors.SUFFIX, *safetensors.PICKLED) and not parent.endswith(":/"):
        safetensors.refuse_pickle(redacted(uri), key)
        return ObjectFolder(Store(parent), key), last
    return ObjectFolder(Store(whole), key), None


@dataclass(frozen=True)
class LocalFolder:
    """Folder of this machine, used in location."""

    path: Path
    named: str

    def names(self) -> list[str]:
        """Return all files, relative to the location, with slashes."""
        return sorted(path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())

    def fetch(self, patterns: Sequence[str]) -> FetchedFolder:
        """Return the folder itself."""
        del patterns
        return FetchedFolder(self.path, None, self.named)


@dataclass(frozen=True)
class HubRepository:
    """Repository of the hub at one revision; None: its main branch."""

    repo_id: str
    revision: str | None
    hub: Hub

    def names(self) -> list[str]:
        """Return all files of the repository; without a network, those of its newest snapshot in the hub's cache."""
        return self.hub.names(self.repo_id, self.revision)

    def fetch(self, patterns: Sequence[str]) -> FetchedFolder:
        """Download the matching files that are missing; return the snapshot in the hub's cache."""
        root = self.hub.download(self.repo_id, self.revision, [_glob(pattern) for pattern in patterns])
        return FetchedFolder(root, root.name, self.repo_id, self)


class HuggingFaceHub:
    """Hugging Face hub; without a network, or with HF_HUB_OFFLINE=1, its cache on this machine.

    Both methods raise ConfigError if neither the hub nor its cache has the repository.
    """

    def names(self, repo_id: str, revision: str | None) -> list[str]:
        """Return the names of all files of a repository."""
        import huggingface_hub  # noqa: PLC0415 - most runs name folders, and it takes a third of a second
        from huggingface_hub import errors  # noqa: PLC0415

        try:
            return sorted(huggingface_hub.HfApi().list_repo_files(repo_id, revision=revision))
        except (OSError, ValueError, errors.HTTPError):  # type: ignore[attr-defined] # its HTTP client's base
            # No network, or no such repository: use the cache, whose error explains what is missing.
            return LocalFolder(self.download(repo_id, revision, []), repo_id).names()

    def download(self, repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
        """Download the files that match one of `patterns`; return their folder, which is named by its commit."""
        import huggingface_hub  # noqa: PLC0415
        from huggingface_hub import errors  # noqa: PLC0415

        try:
            return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
        except (OSError, ValueError, errors.HTTPError) as err:  # type: ignore[attr-defined] # its HTTP client's base
            wanted = repo_id if revision is None else f"{repo_id} at {revision}"
            raise ConfigError(
                f"cannot get {wanted} from the hub, nor from its cache on this machine: {err}. Nothing on this machine "
                "has that name either. Check the id, the revision, HF_TOKEN for gated models, and the network"
            ) from err


@dataclass(frozen=True)
class ObjectFolder:
    """Prefix of an object store, cached on this machine."""

    store: Store
    key: str

    def names(self) -> list[str]:
        """Return all objects under the prefix, relative to it."""
        return sorted(found.name for found in self.store.list(""))

    def fetch(self, patterns: Sequence[str]) -> FetchedFolder:
        """Return a cached folder with the matching objects; fetch it if it is not in the cache.

        Raises:
            ConfigError: No object matches, or the cache folder cannot be written.
            StorageError: The store refused, did not answer, or changed during the download.
        """
        listing = self._listing(patterns)
        if not listing:
            raise ConfigError(
                f"{self.key}: there are no weights at {redacted(self.store.uri)}; no object matches "
                f"{', '.join(patterns)}"
            )
        try:
            root = _cached(self.store, listing)
        except OSError as err:
            raise ConfigError(
                f"cannot cache {redacted(self.store.uri)} in {cache_folder()}: {err}. "
                "Free disk space, or set PIA_BATCH_CACHE to a writable folder"
            ) from err
        return FetchedFolder(root, None, redacted(self.store.uri), self)

    def _listing(self, patterns: Sequence[str]) -> list[ObjectInfo]:
        if not any("*" in pattern for pattern in patterns):
            found = [self._stat(name) for name in patterns]
            return sorted((each for each in found if each is not None), key=lambda each: each.name)
        return sorted(
            (each for each in self.store.list("") if any(_matches(each.name, pattern) for pattern in patterns)),
            key=lambda each: each.name,
        )

    def _stat(self, name: str) -> ObjectInfo | None:
        try:
            return self.store.stat(name)
        except FileNotFoundError:
            return None


def cache_folder() -> Path:
    """Return the cache folder of objects: `PIA_BATCH_CACHE`, else `~/.cache/pia_batch/weights`."""
    return Path(os.environ.get("PIA_BATCH_CACHE") or "~/.cache/pia_batch/weights").expanduser()


def _matches(name: str, pattern: str) -> bool:
    """Return True if the name matches the pattern, as on the hub, but `*` does not match a slash."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, _glob(pattern))


def _glob(pattern: str) -> str:
    """Escape all special characters except `*`: names may contain brackets and question marks."""
    return re.sub(r"[\[?]", r"[\g<0>]", pattern)


def _cached(store: Store, listing: list[ObjectInfo]) -> Path:
    """Return the complete folder with all of `listing`; one process of this machine fetches it while others wait."""
    cache = cache_folder()
    origin = _digest(store.uri)
    target = cache / f"{origin}-{_digest(json.dumps([asdict(found) for found in listing]))}"
    if _is_whole(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{origin}.lock"):
        if not _is_whole(target):
            _clear(cache, origin, target)
            _fetch(store, listing, cache, origin, target)
    return target


def _fetch(store: Store, listing: list[ObjectInfo], cache: Path, origin: str, target: Path) -> None:
    """Create `target` by one rename, after all files are on disk."""
    partial = cache / f"{origin}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        _fill(partial, store, listing, _known(cache, origin))
        try:
            partial.rename(target)
        except OSError:
            if not _is_whole(target):  # else another machine was faster: the cache may be on a shared disk
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(folder: Path, store: Store, listing: list[ObjectInfo], known: dict[ObjectInfo, Path]) -> None:
    began = time.perf_counter()
    files: dict[str, dict[str, Any]] = {}
    num_fetched = 0
    for found in listing:
        path = folder / found.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _hard_link(known.get(found), path):
            store.download(found, path)
            num_fetched += 1
        sha256, modified_ns = _sha256(path), path.stat().st_mtime_ns
        files[found.name] = asdict(found) | {"sha256": sha256, "modified_ns": modified_ns}
    record = {"uri": redacted(store.uri), "files": files}
    (folder / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    log.info(
        "weights_fetched uri=%s files=%d of=%d bytes=%d seconds=%.1f",
        *(redacted(store.uri), num_fetched, len(listing), sum(found.num_bytes for found in listing)),
        time.perf_counter() - began,
    )


def _hard_link(known: Path | None, path: Path) -> bool:
    """Hard-link a file that an earlier download has; return False if there is none or the disk has no hard links."""
    if known is None:
        return False
    try:
        path.hardlink_to(known)
    except OSError:
        return False
    return True


def _known(cache: Path, origin: str) -> dict[ObjectInfo, Path]:
    """Return the cached files of one origin, by the object's name, size and tag."""
    found = {}
    for folder in cache.glob(f"{origin}-*"):
        for name, file in _record(folder).items():
            info = ObjectInfo(name, file["num_bytes"], file["etag"])
            if info.etag is not None and _is_same(folder / name, file):
                found[info] = folder / name
    return found


def _is_whole(folder: Path) -> bool:
    """Return True if a cached folder exists and has the files recorded when it was created."""
    files = _record(folder)
    return bool(files) and all(_is_same(folder / name, file) for name, file in files.items())


def _is_same(path: Path, recorded: dict[str, Any]) -> bool:
    """Return True if size and time are as recorded; if only the time differs, compare the content."""
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != recorded["num_bytes"]:
        return False
    return bool(stat.st_mtime_ns == recorded["modified_ns"] or _sha256(path) == recorded["sha256"])


def _record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the recorded files of a cached folder; empty if there is no record, or it is damaged."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files


def _clear(cache: Path, origin: str, target: Path) -> None:
    """Remove a damaged folder, and the remains of abandoned downloads of the same origin."""
    if target.exists():
        log.warning("cache_damage_found folder=%s", target)
        # Rename first: a partly removed folder must never have the name of a complete one.
        shutil.rmtree(target.rename(cache / f"{origin}.partial-{os.getpid()}-{secrets.token_hex(4)}"))
    for partial in cache.glob(f"{origin}.partial-*"):
        if time.time() - partial.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine; the system releases it when the process ends, in any way."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
