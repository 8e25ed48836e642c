"""Where weights are brought from: a folder of this machine, the hub, or object storage, each object once per node.

What an object store holds is kept in a cache folder, `PIA_BATCH_CACHE` or `~/.cache/pia_batch/weights`. A folder in
there appears by one rename once all its files are whole, and is used again as long as the store lists the same names,
sizes and tags.
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
"""Seconds after which a download that was not finished counts as dead. Younger ones may be another machine's."""


@dataclass(frozen=True)
class Source:
    """A folder on this machine with the files that were asked for.

    Attributes:
        root: the folder.
        commit: the hub commit that it is a snapshot of; None where it is not from the hub.
        named: as the config names it, for messages.
    """

    root: Path
    commit: str | None
    named: str


class Place(Protocol):
    """A folder of weights, wherever it is."""

    def names(self) -> list[str]:
        """All files in there, relative, with slashes."""

    def bring(self, patterns: Sequence[str]) -> Source:
        """The files that match one of `patterns`, on this machine. A pattern that nothing matches is no error.

        In a pattern `*` stands for any characters; every other character is itself.
        """


class Hub(Protocol):
    """What is needed of the Hugging Face hub."""

    def names(self, repo_id: str, revision: str | None) -> list[str]:
        """All files of a repository."""

    def download(self, repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
        """A folder, named by its commit, with the files that match one of `patterns`."""


def locate(name: str, revision: str | None, key: str, hub: Hub) -> tuple[Place, str | None]:
    """What a config's `name` means: a place, and the one file in it where `name` is that of a file.

    A name is, in this order: a URI (`file://`, or of an object store), a folder, a file, `owner/name` on the hub, or
    `owner/name/file.safetensors` there.

    Args:
        name: as in the config.
        revision: hub commit, tag or branch; unused elsewhere.
        key: of the config, for messages.
        hub: asked for hub ids only, and not before the place is.

    Raises:
        ConfigError: it means nothing, or a file that is not safetensors.
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
        f"{key}: there is no folder or file {name}, and it is no hub id either "
        "(owner/name, or owner/name/file.safetensors)"
    )


def _locate_object(uri: str, key: str) -> tuple[Place, str | None]:
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
    """A folder of this machine, used where it is."""

    path: Path
    named: str

    def names(self) -> list[str]:
        """All files in there, relative, with slashes."""
        return sorted(path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())

    def bring(self, patterns: Sequence[str]) -> Source:
        """The folder itself."""
        del patterns
        return Source(self.path, None, self.named)


@dataclass(frozen=True)
class HubRepository:
    """A repository of the hub at one revision; None: its main branch."""

    repo_id: str
    revision: str | None
    hub: Hub

    def names(self) -> list[str]:
        """All files of the repository; without a network those of its newest snapshot in the hub's cache."""
        return self.hub.names(self.repo_id, self.revision)

    def bring(self, patterns: Sequence[str]) -> Source:
        """The snapshot in the hub's cache, completed by the files that match."""
        root = self.hub.download(self.repo_id, self.revision, [_glob(pattern) for pattern in patterns])
        return Source(root, root.name, self.repo_id)


class HuggingFaceHub:
    """The hub itself; without a network, or with HF_HUB_OFFLINE=1, its cache on this machine.

    Raises, from both methods:
        ConfigError: neither the hub nor its cache has what is asked for.
    """

    def names(self, repo_id: str, revision: str | None) -> list[str]:
        """All files of a repository."""
        import huggingface_hub  # noqa: PLC0415 - most runs name folders, and it takes a third of a second
        from huggingface_hub import errors  # noqa: PLC0415

        try:
            return sorted(huggingface_hub.HfApi().list_repo_files(repo_id, revision=revision))
        except (OSError, ValueError, errors.HTTPError):  # type: ignore[attr-defined] # its HTTP client's base
            # No network, or no such repository: the cache knows, or says why not.
            return LocalFolder(self.download(repo_id, revision, []), repo_id).names()

    def download(self, repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
        """A folder, named by its commit, with the files that match one of `patterns`."""
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
    """A prefix of an object store, kept in the cache folder of this machine."""

    store: Store
    key: str

    def names(self) -> list[str]:
        """All objects below the prefix, relative."""
        return sorted(found.name for found in self.store.list(""))

    def bring(self, patterns: Sequence[str]) -> Source:
        """A cached folder with the objects that match; fetched unless it is there already.

        Raises:
            ConfigError: nothing matches, or the cache folder cannot be written.
            StorageError: the store refused, did not answer, or changed meanwhile.
        """
        listing = self._listing(patterns)
        if not listing:
            raise ConfigError(
                f"{self.key}: there are no weights at {redacted(self.store.uri)}; nothing there matches "
                f"{', '.join(patterns)}"
            )
        try:
            root = _cached(self.store, listing)
        except OSError as err:
            raise ConfigError(
                f"cannot keep {redacted(self.store.uri)} in {cache_folder()}: {err}. "
                "Make room, or set PIA_BATCH_CACHE to a folder that can be written"
            ) from err
        return Source(root, None, redacted(self.store.uri))

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
    """Where objects are kept: `PIA_BATCH_CACHE`, else `~/.cache/pia_batch/weights`."""
    return Path(os.environ.get("PIA_BATCH_CACHE") or "~/.cache/pia_batch/weights").expanduser()


def _matches(name: str, pattern: str) -> bool:
    """As the hub matches, but `*` ends at a slash."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, _glob(pattern))


def _glob(pattern: str) -> str:
    """The pattern with `*` alone special: names may have brackets and question marks."""
    return re.sub(r"[\[?]", r"[\g<0>]", pattern)


def _cached(store: Store, listing: list[ObjectInfo]) -> Path:
    """The folder with all of `listing`, whole; one process of this machine fetches it while the others wait."""
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
    """Make `target` in one go, after everything is on the disk."""
    partial = cache / f"{origin}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        _fill(partial, store, listing, _known(cache, origin))
        try:
            partial.rename(target)
        except OSError:
            if not _is_whole(target):  # else another machine was faster, where the cache is on a shared disk
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
        if not _linked(known.get(found), path):
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


def _linked(known: Path | None, path: Path) -> bool:
    """Whether a file that an earlier listing had already could be taken over; some disks have no hard links."""
    if known is None:
        return False
    try:
        path.hardlink_to(known)
    except OSError:
        return False
    return True


def _known(cache: Path, origin: str) -> dict[ObjectInfo, Path]:
    """The objects of one origin that are in the cache, by what the store says of them."""
    found = {}
    for folder in cache.glob(f"{origin}-*"):
        for name, file in _record(folder).items():
            info = ObjectInfo(name, file["num_bytes"], file["etag"])
            if info.etag is not None and _is_same(folder / name, file):
                found[info] = folder / name
    return found


def _is_whole(folder: Path) -> bool:
    """Whether a cached folder is there, and has what was recorded when it was made."""
    files = _record(folder)
    return bool(files) and all(_is_same(folder / name, file) for name, file in files.items())


def _is_same(path: Path, recorded: dict[str, Any]) -> bool:
    """Whether size and time are as recorded; where only the time is not, the content decides."""
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != recorded["num_bytes"]:
        return False
    return bool(stat.st_mtime_ns == recorded["modified_ns"] or _sha256(path) == recorded["sha256"])


def _record(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of the files of a cached folder; nothing where it is none, or damaged."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files


def _clear(cache: Path, origin: str, target: Path) -> None:
    """Remove a damaged folder, and what dead downloads of the same origin left."""
    if target.exists():
        log.warning("weights_damaged folder=%s", target)
        # Renamed first: half a folder must never bear the name of a whole one.
        shutil.rmtree(target.rename(cache / f"{origin}.partial-{os.getpid()}-{secrets.token_hex(4)}"))
    for partial in cache.glob(f"{origin}.partial-*"):
        if time.time() - partial.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of this machine; the system releases it when that process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
