"""Prompt templates over columns, such as `{caption}, cinematic, {style}`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.errors import ConfigError
from pia_batch.manifest.arrow_types import plain_type
from pia_batch.manifest.column_layout import Path, leaves_of
from pia_batch.manifest.column_paths import find_path, nearest


@dataclass(frozen=True)
class Template:
    """A text with columns in braces; `{{` and `}}` are braces themselves.

    Attributes:
        text: Template as it was written.
        option: Option that gave it, for messages.
    """

    text: str
    option: str

    def __post_init__(self) -> None:
        """Parse the text.

        Raises:
            ConfigError: A brace is not closed, or what is in braces is no name of a column.
        """
        self.parts  # noqa: B018 - raises

    @property
    def parts(self) -> list[tuple[str, str | None]]:
        """Pairs of a literal and the column after it; the last column is None."""
        try:
            parsed = list(Formatter().parse(self.text))
        except ValueError as err:
            msg = f"{self.option}: {self.text!r}: {err}; write a column as {{NAME}}, and a brace itself as {{{{ or }}}}"
            raise ConfigError(msg) from None
        for _, name, form, conversion in parsed:
            if name is not None and (not name.strip() or form or conversion or "[" in name):
                msg = f"{self.option}: {self.text!r}: write columns as {{NAME}} or {{STRUCT.FIELD}}, without a format"
                raise ConfigError(msg)
        return [(literal, name) for literal, name, _, _ in parsed] or [("", None)]

    @property
    def columns(self) -> list[str]:
        """Columns that the template needs, each once."""
        return list(dict.fromkeys(name for _, name in self.parts if name is not None))

    def fill(self, num_rows: int, texts: Callable[[str], pa.Array]) -> pa.Array:
        """Return the text of every row; null where a column is null.

        Args:
            num_rows: Number of rows.
            texts: Function that returns a column as text.
        """
        pieces: list[pa.Array] = []
        for literal, name in self.parts:
            if literal:
                pieces.append(pa.repeat(pa.scalar(literal, pa.string()), num_rows))
            if name is not None:
                pieces.append(texts(name))
        if not pieces:
            return pa.repeat(pa.scalar("", pa.string()), num_rows)
        return pc.binary_join_element_wise(*pieces, "", null_handling="emit_null")


def find(schema: pa.Schema, path: str, label: str) -> Path:
    """Return the names from a column down to a field of a struct.

    Args:
        schema: All columns.
        path: Name of a column, or a path with dots into structs; a name that has dots itself comes first.
        label: Option that names it, for the message.

    Raises:
        ConfigError: There is no such column; the message names the nearest one.
        ManifestError: The path leads through a column that is no struct.
    """
    found = find_path([(item.name, plain_type(item.type)) for item in schema], path, label)
    if found is not None:
        return found
    near = nearest(path, list(leaves_of(schema)))
    hint = f"; did you mean {near!r}?" if near else ""
    shown = ", ".join(schema.names[:20]) + (", ..." if len(schema.names) > 20 else "")  # noqa: PLR2004 - a few lines
    raise ConfigError(f"{label}: no column {path!r}{hint} (columns: {shown})")


def values_of(table: pa.Table, path: Path) -> pa.Array:
    """Return the values at a path; null where a struct on the way is null, or has no such field in these rows."""
    column = table[path[0]]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(column, pa.ChunkedArray):  # larger than one array may be
        column = pa.concat_arrays(column.chunks)
    for name in path[1:]:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(name) < 0:
            return pa.nulls(len(table))  # JSON objects need not have every name
        column = pc.struct_field(column, name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def as_texts(column: pa.Array) -> pa.Array | None:
    """Return a column as text without blanks around it, lists of texts joined by commas; null where nothing is left.

    Returns:
        Strings; None if the type has no text.
    """
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        inner = column.type.value_type
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
            return None
        column = pc.binary_join(column, ", ")
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return None
    trimmed = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
