"""Interface of the sources of `prepare`: one declaration for each kind, pieces for the workers, and their rows."""

from __future__ import annotations

import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs

from pia_batch.errors import ManifestError, problem_of
from pia_batch.manifest import commit_logs, hive
from pia_batch.manifest.files import known_remedy
from pia_batch.storage import filesystems, store_uris
from pia_batch.storage.filesystems import FoundFile
from pia_batch.storage.uris import redacted, redacted_uri

Images = Literal["bytes", "uris"]
"""Form in which a manifest has its images."""

PART_BYTES = 64 * 2**20
"""Size of the rows that become one file of the manifest, in bytes; a single larger row is one file."""

PART_ROWS = 65_536
"""Number of rows that become one file of the manifest."""


@dataclass(frozen=True)
class Rows:
    """Rows that become one file of the manifest.

    Attributes:
        table: Columns of the source.
        places: Place of each row inside the source, as text: a file and a row or a key. It is unique in the source.
        skipped: Number of rows next to these that the source itself marks as failed.
        folder: Folder inside the source that relative URIs of images start from.
    """

    table: pa.Table
    places: pa.Array
    skipped: int = 0
    folder: str = ""


@dataclass(frozen=True)
class Piece:
    """Part of a source for one task.

    Attributes:
        name: Name for messages and records, such as a file's.
        version: Version of the data; another one means other rows.
        detail: Data by which the kind reads it; it can be pickled.
    """

    name: str
    version: str
    detail: Any = None


class Source(Protocol):
    """An opened source. It can be pickled."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """Pieces in order."""

    @property
    def pinned(self) -> Mapping[str, str]:
        """Versions of the source, such as a commit or a snapshot, for the record."""

    @property
    def schema(self) -> pa.Schema | None:
        """Columns of all rows; None if only the rows show them."""

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the rows of a piece in order, in tables of about PART_BYTES.

        Raises:
            ManifestError: The piece cannot be read, or has another version now.
        """


@dataclass(frozen=True)
class Place:
    """Folder, file or table that a source is read from, and the files in it.

    Attributes:
        uri: URI with its scheme, with a commit in place of a branch.
        root: Path inside the file system.
        files: Every file, sorted by path, hidden ones included.
        commit: Commit of the Hugging Face hub; empty for other places.
        broken: Paths of files that a writer of Spark left without committing them, or replaced.
    """

    uri: str
    root: str
    files: tuple[FoundFile, ...]
    commit: str = ""
    broken: frozenset[str] = frozenset()
    filesystem: pyarrow.fs.FileSystem = field(compare=False, repr=False, default=None)

    @classmethod
    def of(cls, uri: str, commit: str | None = None) -> Place:
        """List a source.

        Args:
            uri: URI or path.
            commit: Commit of the Hugging Face hub in place of the newest; None: that of `uri`.

        Raises:
            ManifestError: It is absent, or cannot be listed.
            ConfigError: `uri` is no URI.
        """
        shown = redacted_uri(uri)
        with reading(shown):
            uri, commit = filesystems.pinned(store_uris.absolute(uri).rstrip("/"), commit)
            filesystem, root = filesystems.arrow_filesystem(uri)
            files = tuple(filesystems.list_files(filesystem, root))
            paths = [file.path for file in files]
            shown_paths = (path for path in paths if not hive.is_hidden(path.removeprefix(root).split("/")))
            broken = frozenset(commit_logs.uncommitted(filesystem, root, paths, shown_paths))
        if not files:
            msg = f"source {shown}: there is no file; correct its path or URI"
            raise ManifestError(msg)
        return cls(uri, root.rstrip("/"), files, commit, broken, filesystem)

    @property
    def is_file(self) -> bool:
        """True if the source is a single file."""
        return len(self.files) == 1 and self.files[0].path == self.root

    @property
    def folder_uri(self) -> str:
        """URI of the folder that relative URIs of images start from."""
        return self.uri.rpartition("/")[0] if self.is_file else self.uri

    def name_of(self, path: str) -> str:
        """Return a file's path relative to the source; the name of a single file."""
        return posixpath.basename(path) if path == self.root else path.removeprefix(self.root).lstrip("/")

    def visible(self, *extensions: str) -> list[FoundFile]:
        """Return the files with one of these extensions, without broken ones, and without paths with a hidden part."""
        return [
            file
            for file in self.files
            if file.path.lower().endswith(extensions)
            and file.path not in self.broken
            and not hive.is_hidden(self.name_of(file.path).split("/"))
        ]

    def head(self, file: FoundFile, num_bytes: int = 16) -> bytes:
        """Return the first bytes of a file."""
        with reading(file.path), self.filesystem.open_input_file(file.path) as stream:
            return bytes(stream.read(num_bytes))

    def uri_of(self, path: str) -> str:
        """Return the full URI of a file of the source."""
        if path == self.root:
            return self.uri
        name = self.name_of(path)
        return f"{self.uri}/{quote(name) if self.uri.startswith('file://') else name}"


@dataclass(frozen=True)
class ReadOptions:
    """Options that decide which rows a source has, and their types.

    Attributes:
        images: `bytes` or `uris`; None: as the source has them.
        version: Version or snapshot of a table with a log; None: the newest.
        text: Names of columns that are kept as text.
        paths: Paths with dots that other options name. In JSON objects, which have no types, each becomes a column.
    """

    images: Images | None = None
    version: str | None = None
    text: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Kind:
    """One kind of source, declared once.

    Attributes:
        name: Value of `--kind`.
        meaning: Description of the files, for the documentation.
        detect: Function that returns True if a place holds this kind, by its contents.
        open: Function that opens a place as this kind.
        prompt: Column that is the prompt unless a template says otherwise; None: none.
        ids: Origin of request ids without a column of them.
        extra: Extra of this package that installs what reads it; empty: nothing is needed.
    """

    name: str
    meaning: str
    detect: Callable[[Place], bool]
    open: Callable[[Place, ReadOptions], Source]
    prompt: str | None = None
    ids: str = "content"
    extra: str = ""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn a client's exceptions into a ManifestError that names a part of the source."""
    shown = redacted_uri(name)
    try:
        yield
    except FileNotFoundError as err:
        remedy = filesystems.remedy_for(err) or "correct its path or URI"
        raise ManifestError(f"source {shown} does not exist; {remedy}") from None
    except filesystems.unreadable(
        ImportError, EOFError, ValueError, tarfile.TarError, zlib.error, pa.ArrowException
    ) as err:
        problem = redacted(problem_of(err))
        known = filesystems.reading_remedy(name, err) or known_remedy(problem)
        raise ManifestError(f"source {shown} cannot be read: {problem}{f'; {known}' if known else ''}") from None


def check_version(filesystem: pyarrow.fs.FileSystem, file: FoundFile) -> None:
    """Check that a file has not changed since it was listed.

    Raises:
        ManifestError: It was replaced or removed.
    """
    with reading(file.path):
        version = filesystems.version_of(filesystem, file.path)
    if version != file.version:
        raise ManifestError(changed(file.path))


def changed(name: str) -> str:
    """Return the message about a part of the source that is not what it was."""
    return (
        f"source {redacted_uri(name)} was replaced, added or removed since `prepare` began; the manifest would mix "
        "both versions. Delete the folder of --to, or choose another one, and start again"
    )
