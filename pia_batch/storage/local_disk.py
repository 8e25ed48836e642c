"""Local disks as stores: what is needed of them, and the remedies for their errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from pia_batch.errors import ConfigError, StorageError, printable

_LINKS = "choose a folder on a file system with hard links, such as ext4, XFS or NFS, or object storage"
_NETWORK_DISK = "the network disk went away: mount it again"
DENIED_REMEDY = "choose another path, or give this user access to it"

DISK_REMEDIES = {
    errno.EDQUOT: "raise the quota, or remove files",
    errno.EACCES: DENIED_REMEDY,
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f unlimited`), or choose a disk with larger files",
    errno.EIO: "the disk fails, or its network does: look into the system's log",
    errno.EISDIR: "a folder has the name of a file there; remove it or choose another path",
    errno.ELOOP: "a symbolic link there points to itself; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOSPC: "free some space there, or choose another disk (`df -i` shows whether its inodes are used up)",
    errno.ENOTCONN: _NETWORK_DISK,
    errno.ENOTDIR: "a file has the name of a folder there; remove it or choose another path",
    errno.ENOSYS: _LINKS,
    errno.ENOTSUP: _LINKS,
    errno.EPERM: "give this user access to it, or choose a folder on a disk with hard links, such as ext4 or NFS",
    errno.EROFS: "the disk is mounted read-only; choose another path, or mount it for writing",
    errno.ESTALE: _NETWORK_DISK,
}
"""Remedies for errors of a local disk, by their number."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk, on which space may become free."""

PASSING = (*FULL, errno.EIO, errno.ENOTCONN, errno.ESTALE)
"""Errors that may pass, such as those of a network disk; no other error of `DISK_REMEDIES` ends by another attempt."""

WITHOUT_LINKS = frozenset(
    {
        *("exfat", "msdos", "vfat", "vboxsf"),
        *("fuse.blobfuse", "fuse.blobfuse2", "fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.s3fs"),
    }
)
"""Types of file systems that have no hard links, as Linux calls them. Others may lack them, too: `check_disk` tries."""


def reason_of(err: OSError) -> str:
    """Return why a folder cannot be used, with the remedy."""
    remedy = DISK_REMEDIES.get(err.errno or 0, DENIED_REMEDY)
    if err.errno == errno.EEXIST:  # none of DISK_REMEDIES: creating an object meets it, too
        remedy = "a file, or a link to nothing, has the name of the folder; remove it or choose another path"
    return f"{os.strerror(err.errno or 0)}; {remedy}"


def write_file(path: Path, data: bytes, option: str) -> None:
    """Write a local file that an option names, and its folder. A file of its name stays until this one is whole.

    A pipe, a device, and a file in a folder that is closed to this user are written in place.

    Raises:
        StorageError: It cannot be written; the message has the option and the remedy.
    """
    real = Path(os.path.realpath(path))
    partial = real.with_name(f"#{os.getpid()}")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if real.exists() and not (real.is_file() and os.access(real.parent, os.W_OK)):
            real.write_bytes(data)
            return
        try:
            partial.write_bytes(data)
            partial.replace(real)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as err:
        raise StorageError(f"{option}: cannot write {path}: {reason_of(err)}") from None


def check_disk(folder: Path, probe: str, link: Callable[[Path, Path], None] = os.link) -> None:
    """Check that a local disk has space and hard links, by which obstore creates a file only where none is.

    What else keeps it from being written is left to the write that follows. Leaves nothing behind.

    Args:
        folder: Root of the store; it is created if it does not exist.
        probe: Name of an object in it, next to which the files are written.
        link: Function that makes a hard link.

    Raises:
        ConfigError: There are no hard links.
        StorageError: The disk or the quota is full.
    """
    path = Path(folder, f"{probe}#{os.getpid()}")  # a name that no listing shows, and `gc` removes
    other = path.with_name(f"{path.name}0")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(4096))
    except OSError as err:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if err.errno in FULL:  # a run waits for space, but does not begin without any
            msg = f"cannot write to {folder.as_uri()}: {err.strerror}; {DISK_REMEDIES[err.errno]}"
            raise StorageError(msg) from None
        return
    try:
        other.unlink(missing_ok=True)
        link(path, other)
    except OSError as err:
        raise ConfigError(_without_links(folder, str(err.strerror))) from None
    finally:
        other.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def is_full(folder: Path, probe: str) -> bool:
    """Return True if the disk or the quota is too full for a small file. Leaves nothing behind.

    Args:
        folder: Root of the store.
        probe: Name of an object in it, next to which the file is written.
    """
    path = Path(folder, f"{probe}#{os.getpid()}")
    try:
        path.write_bytes(bytes(4096))
    except OSError as err:
        return err.errno in FULL
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return False


def _without_links(folder: Path, reason: str) -> str:
    return (
        f"output: the file system of {folder.as_uri()} has no hard links, by which a result is created only once "
        f"({reason}); {_LINKS}"
    )


def find_obstacle(folder: Path, mounts: Iterable[tuple[str, str]] | None = None) -> str | None:
    """Return what will keep this user from writing to a folder, with its remedy, as far as it is seen without writing.

    Args:
        folder: Absolute path; it need not exist.
        mounts: Mount points with the type of their file systems; None: those of this machine.

    Returns:
        One line; None if nothing is seen.
    """
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usage = os.statvfs(existing)
    except OSError as err:
        return f"cannot read {folder.as_uri()}: {err.strerror}; {DISK_REMEDIES.get(err.errno or 0, DENIED_REMEDY)}"
    number = None
    if not existing.is_dir():
        number = errno.ENOTDIR
    elif usage.f_flag & os.ST_RDONLY:
        number = errno.EROFS
    elif not os.access(existing, os.W_OK | os.X_OK):
        number = errno.EACCES
    elif usage.f_blocks and not usage.f_bavail:
        number = errno.ENOSPC
    if number is not None:
        return f"cannot write to {folder.as_uri()}: {os.strerror(number)}; {DISK_REMEDIES.get(number, DENIED_REMEDY)}"
    kind = _type_of(existing.resolve(), _mounts() if mounts is None else mounts)
    return _without_links(folder, printable(kind)) if kind in WITHOUT_LINKS else None


def _mounts() -> list[tuple[str, str]]:
    with suppress(OSError):
        return [(each.mountpoint, each.fstype) for each in psutil.disk_partitions(all=True)]
    return []


def _type_of(folder: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """Return the type of the file system of a folder: that of the last of the longest mount points above it."""
    found, depth = "", 0
    for point, kind in mounts:
        path = Path(point)
        if len(path.parts) >= depth and (path == folder or path in folder.parents):
            found, depth = kind, len(path.parts)
    return found
