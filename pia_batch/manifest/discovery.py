"""Files of a manifest: those of a folder that are read, their common format, and where they lie in it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import PurePosixPath
from urllib.parse import unquote

import pyarrow.fs

from pia_batch.errors import ManifestError
from pia_batch.manifest import commit_logs, hive
from pia_batch.manifest.files import reading
from pia_batch.manifest.foreign_formats import EXAMINED_FILES, refuse_known_format
from pia_batch.manifest.formats import EXTENSIONS, FileFormat, format_of_file, formats_in, is_expected
from pia_batch.manifest.table_formats import refuse_part_of_table, refuse_table
from pia_batch.manifest.text_files import MAX_TEXT_BYTES
from pia_batch.storage import filesystems
from pia_batch.storage.file_kinds import HEAD_BYTES


def discover(
    filesystem: pyarrow.fs.FileSystem, root: str, uri: str
) -> tuple[tuple[str, ...], FileFormat, tuple[str, ...]]:
    """Return the files of a manifest, their format, and the files next to them that are not read."""
    info = filesystem.get_file_info(root)
    if info.type == pyarrow.fs.FileType.NotFound:
        with suppress(FileNotFoundError):
            filesystems.version_of(
                filesystem, root
            )  # raises for a server that does not answer, not for one without the file
        pattern = ", and name a folder in place of a pattern with '*'" if "*" in unquote(uri) else ""
        msg = f"manifest {uri} does not exist; correct its path or URI{pattern}"
        raise ManifestError(msg)
    is_file = info.type == pyarrow.fs.FileType.File
    refuse_part_of_table(filesystem, root, uri, is_file=is_file)
    if is_file:
        return (root,), format_of_file(filesystem, root), ()
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    refuse_table([item.path for item in found], root, uri)
    files = sorted(item.path for item in found if item.is_file and not hive.is_hidden(below(item.path, root).parts))
    broken = commit_logs.uncommitted(filesystem, root, (item.path for item in found if item.is_file), files)
    format_by_path = formats_in(filesystem, [path for path in files if path not in broken])
    formats = sorted(set(format_by_path.values()))
    left_out = tuple(path for path in files if path not in format_by_path and not is_expected(path))
    if not formats:
        _refuse_other_formats(filesystem, left_out)
        others = f", but {', '.join(str(below(path, root)) for path in left_out[:3])}" if left_out else ""
        msg = (
            f"manifest {uri} has no file that ends in {', '.join(EXTENSIONS)}{others}; correct the folder, or the "
            "names: those that begin with '_' or '.' are not read; text may be compressed (.jsonl.gz, .csv.zst)"
        )
        raise ManifestError(msg)
    if len(formats) > 1:
        msg = f"manifest {uri} has files of several formats, {' and '.join(formats)}; leave those of one"
        raise ManifestError(msg)
    return tuple(path for path in files if path in format_by_path), formats[0], left_out


def _refuse_other_formats(filesystem: pyarrow.fs.FileSystem, paths: tuple[str, ...]) -> None:
    """Refuse the first of a folder's files that is of a known format, none of which is ours."""
    for path in paths[:EXAMINED_FILES]:
        with filesystem.open_input_file(path) as source:
            head = bytes(source.read_at(min(HEAD_BYTES, source.size()), 0))
        refuse_known_format(head, f"manifest file {path}")


def check_stored_bytes(filesystem: pyarrow.fs.FileSystem, files: tuple[str, ...], uri: str) -> None:
    """Refuse text files that are too large as they are stored, before any of them is read."""
    with reading(uri):
        num_bytes = sum(info.size or 0 for info in filesystem.get_file_info(list(files)))
    if num_bytes > MAX_TEXT_BYTES:
        msg = f"manifest {uri} has {num_bytes} bytes of JSONL or CSV; above {MAX_TEXT_BYTES}, write it as Parquet"
        raise ManifestError(msg)


def below(path: str, root: str) -> PurePosixPath:
    """Return a path relative to the manifest's folder."""
    return PurePosixPath(path.removeprefix(root).lstrip("/"))


def location(path: str, root: str) -> str:
    """Return the path of a file below the manifest's folder; its name if the manifest is one file."""
    return str(below(path, root)) if path != root else PurePosixPath(path).name


def partitions_of(path: str, root: str) -> dict[str, str | None]:
    """Return the values that the names of a file's folders give to columns."""
    return hive.partitions_in(below(path, root).parts[:-1])
