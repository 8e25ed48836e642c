"""Logs of Spark's writers in a folder of data files, which say what files of it are committed.

Streams of Spark write `_spark_metadata/0`, `1`, ... with the files of each batch, and `9.compact` with those of all
batches up to it. Databricks writes `_started_ID` and `_committed_ID` for each write. Files that a broken write has left
have rows that were written again.
"""

from __future__ import annotations

import itertools
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import pyarrow.fs

from pia_batch.errors import ManifestError

_STREAM_FOLDER = "_spark_metadata"
_BATCH = re.compile(r"([0-9]+)(\.compact)?")
_STARTED, _COMMITTED = re.compile(r"_started_([0-9]+)"), re.compile(r"_committed_([0-9]+)")
_WRITE = re.compile(r"-tid-([0-9]+)-")
"""Number of the write in the name of a data file of Databricks."""


def uncommitted(filesystem: pyarrow.fs.FileSystem, root: str, found: Iterable[str], files: Iterable[str]) -> set[str]:
    """Return those of `files` that belong to no completed write, or that a later write replaced.

    Args:
        filesystem: File system of the manifest.
        root: Path of the folder; if it is a partition of a stream's folder, the log above it counts.
        found: Paths of everything in the folder, hidden names included.
        files: Paths of the data files.

    Raises:
        ManifestError: A log is damaged; the message names it.
        Exception: The client's own exception.
    """
    streams: dict[str, list[str]] = {}
    writes: dict[str, list[str]] = {}
    for path in itertools.chain(found, _logs_above(filesystem, root)):
        folder, name = posixpath.split(path)
        if posixpath.basename(folder) == _STREAM_FOLDER and _BATCH.fullmatch(name):
            streams.setdefault(posixpath.dirname(folder), []).append(path)
        elif _STARTED.fullmatch(name) or _COMMITTED.fullmatch(name):
            writes.setdefault(folder, []).append(path)
    left_out = set[str]()
    files = list(files) if streams or writes else []
    for folder, logs in streams.items():
        written = _written(filesystem, logs)
        inside = (path for path in files if path.startswith(f"{folder}/"))
        left_out.update(path for path in inside if not _is_among(path.removeprefix(f"{folder}/"), written))
    for folder, logs in writes.items():
        inside = (path for path in files if posixpath.dirname(path) == folder)
        left_out.update(_broken(filesystem, logs, inside))
    return left_out


def _logs_above(filesystem: pyarrow.fs.FileSystem, root: str) -> Iterator[str]:
    """Yield the files of the logs of streams of which a folder is a partition; none where they may not be read."""
    folder = root
    while "=" in posixpath.basename(folder):
        folder = posixpath.dirname(folder)
        log = posixpath.join(folder, _STREAM_FOLDER)
        with suppress(Exception):  # every file system has its own classes; a parent may be forbidden
            if filesystem.get_file_info(log).type == pyarrow.fs.FileType.Directory:
                yield from (info.path for info in filesystem.get_file_info(pyarrow.fs.FileSelector(log)))


def _written(filesystem: pyarrow.fs.FileSystem, logs: Iterable[str]) -> dict[str, list[str]]:
    """Return the paths that a stream has written, by their last part."""
    batches = {path: _BATCH.fullmatch(posixpath.basename(path)) for path in logs}
    numbers = {path: (int(match[1]), match[2] is not None) for path, match in batches.items() if match}
    first = max((number for number, is_compact in numbers.values() if is_compact), default=-1)
    chosen = [path for path, number in numbers.items() if number >= (first, True)]
    current: dict[str, None] = {}
    for log in sorted(chosen, key=lambda path: numbers[path]):
        for entry in _entries(filesystem, log):
            path = unquote(str(entry["path"]))
            if entry.get("action", "add") == "delete":
                current.pop(path, None)
            else:
                current[path] = None
    by_name: dict[str, list[str]] = {}
    for path in current:
        by_name.setdefault(posixpath.basename(path), []).append(path)
    return by_name


def _is_among(below: str, written: dict[str, list[str]]) -> bool:
    """Return True for a file whose path below the folder is written; the folder may have been moved since."""
    below = unquote(below)
    return any(f"/{path}".endswith(f"/{below}") for path in written.get(posixpath.basename(below), ()))


def _entries(filesystem: pyarrow.fs.FileSystem, log: str) -> Iterator[dict[str, Any]]:
    lines = _text(filesystem, log).splitlines()
    if lines[:1] != ["v1"]:
        raise _damaged(log)
    for line in filter(None, lines[1:]):
        yield _object(line, log, "path")


def _broken(filesystem: pyarrow.fs.FileSystem, logs: Iterable[str], files: Iterable[str]) -> Iterator[str]:
    """Yield the files of one folder whose write was started and not committed, or that another write removed."""
    names = {posixpath.basename(log): log for log in logs}
    started = {match[1] for name in names if (match := _STARTED.fullmatch(name))}
    committed = {match[1]: names[name] for name in names if (match := _COMMITTED.fullmatch(name))}
    contents = [_object(_text(filesystem, log), log, "removed") for log in committed.values()]
    removed = {str(name) for content in contents for name in content["removed"]}
    for path in files:
        write = _WRITE.search(posixpath.basename(path))
        is_open = write is not None and write[1] in started - committed.keys()
        if is_open or posixpath.basename(path) in removed:
            yield path


def _object(text: str, log: str, key: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        raise _damaged(log) from None
    if not isinstance(found, dict) or key not in found:
        raise _damaged(log)
    return found


def _text(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read()).decode(errors="replace")


def _damaged(log: str) -> ManifestError:
    return ManifestError(
        f"{log} is no log of Spark's writes, which says what files of its folder are committed; restore it, or write "
        "the rows again"
    )
