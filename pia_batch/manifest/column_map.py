"""Column map: columns of somebody else's table under the names of requests, fields of structs included.

Everything after it sees our names only, so that a renamed source changes no key, no default and no check.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pia_batch.config import RequestIdFrom, RunConfig
from pia_batch.errors import ManifestError
from pia_batch.manifest.arrow_types import plain_type
from pia_batch.manifest.column_layout import Layout, Path, Rest, Value, image_columns, is_image, leaves_of, type_at
from pia_batch.manifest.column_paths import find_path, member_at, nearest, path_of_member
from pia_batch.schema.columns import REQUEST

_OTHER = {"image": "image_bytes", "image_bytes": "image"}
"""Columns for which an image struct may stand, each with the other."""

_SHOWN_NAMES = 30
"""Maximum number of a manifest's names in a message."""


@dataclass(frozen=True)
class ColumnMap:
    """Names of columns with their sources; hashable. Without any, it only takes image structs apart.

    A source is the name of a column, or a path with dots into structs; a name that has the dots itself comes first.

    Attributes:
        sources: Pairs of name and source.
        ids: Origin of request ids; only with `column` may there be a column of them.
    """

    sources: tuple[tuple[str, str], ...] = ()
    ids: RequestIdFrom = "column"

    @classmethod
    def of(cls, config: RunConfig) -> ColumnMap:
        """Return the map of the config's `columns` and `request_id_from`."""
        return cls(tuple(config.columns.items()), config.request_id_from)

    @cached_property
    def _source_of(self) -> dict[str, str]:
        return dict(self.sources)

    def label(self, name: str) -> str:
        """Return a column's name for messages, with its source if that differs."""
        source = self._source_of.get(name, name)
        return f"'{name}'" if source == name else f"'{name}' (source '{source}')"

    def layout(self, schema: pa.Schema, place: str) -> Layout:
        """Return the columns of a file under our names; sources that it lacks are left out.

        Args:
            schema: Schema of the file, as stored.
            place: Name of the file or Dataset for messages.

        Raises:
            ManifestError: two columns would have one name, or a path leads through a column that is no struct.
        """
        paths = self._paths(schema, place)
        columns: list[Value | Rest] = []
        for item in schema:
            here = {name: path for name, path in paths.items() if path[0] == item.name}
            for name, path in here.items():
                columns += self._columns(name, path, item, schema.names)
            if any(len(path) == 1 for path in here.values()):
                continue
            if not here and self._is_taken(item.name):
                raise ManifestError(f"{place}: {self._collision(item.name)}")
            if not here or self._is_image(item.name, (item.name,), item, schema.names):
                columns += self._columns(item.name, (item.name,), item, schema.names)
                continue
            rest = Rest.of(item, here.values())
            if rest is not None and self._may_carry(item.name):
                columns.append(rest)
        return Layout(tuple(columns))

    def _paths(self, schema: pa.Schema, place: str) -> dict[str, Path]:
        """Return the path of each source that the schema has, by our name."""
        types = [(item.name, plain_type(item.type)) for item in schema]
        found = {}
        for name, source in self.sources:
            path = find_path(types, source, f"{place}: columns.{name}: {source!r}")
            if path is None:
                continue
            if schema.names.count(path[0]) > 1:
                raise ManifestError(f"{place} has more than one column {path[0]!r}; rename or drop the others")
            found[name] = path
        return found

    def _columns(self, name: str, path: Path, item: pa.Field, names: Collection[str]) -> list[Value | Rest]:
        if self._is_image(name, path, item, names):
            return image_columns(path, item)
        return [Value.at(name, path, item)]

    def _is_image(self, name: str, path: Path, item: pa.Field, names: Collection[str]) -> bool:
        """Return True if a column is an image struct, and nothing else stands for the image."""
        if name not in _OTHER or not is_image(type_at(path, item)):
            return False
        other = _OTHER[name]
        return other not in self._source_of and (other not in names or other == path[0])

    def _may_carry(self, name: str) -> bool:
        """Return True if what is left of a struct can keep its name."""
        return name not in self._source_of and name not in REQUEST.names

    def _is_taken(self, name: str) -> bool:
        """Return True if our column of this name comes from elsewhere."""
        return name in self._source_of or (name == "request_id" and self.ids != "column")

    def _collision(self, name: str) -> str:
        if name not in self._source_of:
            return (
                f"column 'request_id' is there, and request_id_from is {self.ids}; leave request_id_from out, or "
                "rename the column, such as by --column source_id=request_id"
            )
        return (
            f"column {name!r} is there, and columns.{name} takes it from {self._source_of[name]!r}; leave "
            f"columns.{name} out, or rename the other column, such as by --column source_{name}={name}"
        )

    def partitions(self, values: Mapping[str, str | None]) -> dict[str, str | None]:
        """Return the values of hive partitions under our names.

        Raises:
            ManifestError: a partition has the name of a column that comes from elsewhere.
        """
        taken = {source for _, source in self.sources}
        kept = {name: value for name, value in values.items() if name not in taken}
        for name in filter(self._is_taken, kept):
            raise ManifestError(f"partitions of the manifest: {self._collision(name)}")
        return kept | {name: values[source] for name, source in self.sources if source in values}

    def positions(self, header: Sequence[str], place: str) -> list[tuple[str, int]]:
        """Return our names for the columns of a CSV file, each with the number of its column.

        Raises:
            ManifestError: two columns would have one name.
        """
        taken = {source for _, source in self.sources}
        found = []
        for number, column in enumerate(header):
            if column in taken:
                found += [(name, number) for name, source in self.sources if source == column]
            elif self._is_taken(column):
                raise ManifestError(f"{place}: {self._collision(column)}")
            else:
                found.append((column, number))
        return found

    def members(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a JSON object under our names; null where an object on the way is null or absent.

        Raises:
            ValueError: two values would have one name, or a path leads through a value that is no object.
        """
        if not self.sources and self.ids == "column":
            return row
        paths = {name: path for name, source in self.sources if (path := _path_in(row, source, name))}
        found: dict[str, Any] = {}
        for key, value in row.items():
            here = [path for path in paths.values() if path[0] == key]
            if not here:
                if self._is_taken(key):
                    raise ValueError(self._collision(key))
                found[key] = value
            elif any(len(path) == 1 for path in here):
                continue
            elif key == "image" and not _OTHER.keys() & self._source_of.keys():
                found[key] = value  # it may be an image struct, of which nothing is carried
            elif self._may_carry(key):
                found |= {key: _without_members(value, {path[1:] for path in here})}
        for name, path in paths.items():
            found[name] = member_at(row, path)
        return found

    def has_all(self, names: Collection[str]) -> bool:
        """Return True if every source was found, which gave these columns under our names."""
        return all(name in names or _OTHER.get(name) in names for name, _ in self.sources)

    def not_found(self, names: Collection[str], stored: pa.Schema, place: str) -> ManifestError:
        """Return the error about a source that is nowhere; it names the nearest column.

        Args:
            names: Columns that were found, under our names.
            stored: Columns under their own names.
            place: Name of the manifest for the message.
        """
        name, source = next(pair for pair in self.sources if not (pair[0] in names or _OTHER.get(pair[0]) in names))
        known = list(leaves_of(stored))
        shown = ", ".join(known[:_SHOWN_NAMES]) + (", ..." if len(known) > _SHOWN_NAMES else "")
        near = nearest(source, known)
        hint = f"did you mean {near!r}? It" if near else "it"
        return ManifestError(f"columns.{name}: {place} has no column {source!r}; {hint} has: {shown}")


NO_MAP = ColumnMap()
"""Map of a manifest that has our names."""


_JSON_WORDS = {bool: "true or false", list: "a list", str: "a text"}


def _path_in(members: dict[str, Any], source: str, name: str) -> Path | None:
    """Return the path of a source in a JSON object; None if it is absent, or an object on the way is null."""

    def barred(head: str, value: object) -> None:
        found = _JSON_WORDS.get(type(value), "a number")
        raise ValueError(f"columns.{name}: {source!r}: {head!r} is {found}, and only an object has members")

    return path_of_member(members, source, barred)


def _without_members(members: dict[str, Any], taken: Collection[Path]) -> dict[str, Any] | None:
    """Return a JSON object without the paths `taken`; None if nothing is left."""
    left = {}
    for key, value in members.items():
        below = {path[1:] for path in taken if path[0] == key}
        if not below:
            left[key] = value
        elif () not in below:
            left[key] = _without_members(value, below)
    return left or None
