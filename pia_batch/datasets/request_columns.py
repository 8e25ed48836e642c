"""Columns of a manifest made of a source's columns: their names, the prompt, and what is carried."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import ImagesConfig
from pia_batch.datasets.source_images import has_uris, image_columns, image_source
from pia_batch.datasets.sources import Images, Kind
from pia_batch.datasets.templates import Template, as_texts, find, values_of
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest.column_layout import Path
from pia_batch.manifest.column_paths import cuts
from pia_batch.schema.columns import REQUEST, RESERVED
from pia_batch.schema.expressions import RowFilter

OnMissing = Literal["fail", "drop", "empty"]
IdsFrom = Literal["column", "content", "location"]

_TAKEN = ("request_id", "image", "image_bytes", "prompt")
_TEMPLATES = ("prompt", "negative_prompt")


@dataclass(frozen=True)
class RequestOptions:
    """Options that decide what becomes of a row.

    Attributes:
        kind: Kind of the source.
        columns: Sources of columns by their name in the manifest.
        prompt: Template of the prompt; None: the column.
        negative_prompt: Template of the negative prompt; None: the column, if there is one.
        on_missing: Treatment of rows in which a column of a template is null or blank.
        ids_from: Origin of request ids; None: the column if there is one, otherwise what suits the kind.
        where: Condition on the source's columns; None: all rows.
        sample: Share of the rows, above 0 to 1; always the same ones.
        shuffle: Seed of the order of rows; None: the source's order.
        probe: True to read every image's size, and to reject images that cannot be animated.
        images: `bytes` to fetch images that the source names by URI; `uris` to refuse bytes; None: as the source has
            them.
        fetching: Limits of fetching, and the places that images may come from.
    """

    kind: Kind
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: Template | None = None
    negative_prompt: Template | None = None
    on_missing: OnMissing = "fail"
    ids_from: IdsFrom | None = None
    where: RowFilter | None = None
    sample: float | None = None
    shuffle: int | None = None
    probe: bool = False
    images: Images | None = None
    fetching: ImagesConfig = field(default_factory=ImagesConfig)


class RequestColumns:
    """Converter of a source's columns. It can be pickled.

    Args:
        options: Names and templates.
        schema: Columns that the source has in all rows or in its first ones; others are taken as they come.

    Raises:
        ConfigError: An option names a column that the source does not have.
        ManifestError: No column is the image, or none is the prompt.
    """

    def __init__(self, options: RequestOptions, schema: pa.Schema) -> None:
        self._options, self._schema = options, schema
        names = schema.names
        self._is_manifest = "request_id" in names and options.kind.prompt is None
        """The source has our own column names, which then mean what they mean in a manifest."""
        for name, source in options.columns.items():
            if name in RESERVED:
                near = difflib.get_close_matches(name, REQUEST.names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"--column {name}={source}: {name!r} is a column of results{hint}")
        self._paths: dict[str, Path] = {
            source: find(schema, source, f"--column {name}={source}") for name, source in options.columns.items()
        }
        for template in filter(None, (options.prompt, options.negative_prompt)):
            for name in template.columns:
                self._paths[name] = find(schema, name, template.option)
        if options.ids_from == "column" and self.source_of("request_id") is None:
            raise ConfigError("--request-id-from column: no column is the id; name it by --column request_id=COLUMN")
        self.image: Path = image_source(schema, options.columns)
        if options.prompt is None and self.source_of("prompt") is None and options.kind.prompt not in names:
            shown = ", ".join(item.name for item in schema if pa.types.is_string(item.type)) or "none"
            raise ManifestError(
                f"no column is the prompt; write a template such as --prompt '{{NAME}}' (columns of text: {shown})"
            )

    @property
    def notes(self) -> list[str]:
        """Remarks on columns whose names have another meaning in a manifest, for the operator."""
        kept = [name for name in self._schema.names if self.carried_name(name) != name and name not in self._used]
        if not kept:
            return []
        carried = ", ".join(f"{name} as {self.carried_name(name)}" for name in kept)
        setting = next((name for name in kept if name in REQUEST.names), None)
        remedy = f"; --column {setting}={setting} makes a setting of it" if setting else ""
        return [f"carried under other names, because a manifest's mean something else: {carried}{remedy}"]

    @property
    def may_have_uris(self) -> bool:
        """True if the image of a row may be a URI."""
        return has_uris(self._schema, self.image)

    def source_of(self, name: str) -> str | None:
        """Return the source of a column of the manifest, or None."""
        if name in self._options.columns:
            return self._options.columns[name]
        if name not in self._schema.names:
            return None
        return name if self._is_manifest or name in (*_TAKEN, "negative_prompt") else None

    def made(self, table: pa.Table, places: pa.Array) -> tuple[dict[str, pa.Array], dict[str, pa.Array]]:
        """Return the columns of the manifest without request ids, and by option the rows in which something is missing.

        Args:
            table: Rows of the source, with every column of its schema.
            places: Place of each row, for messages.

        Raises:
            ManifestError: A value that a template needs is missing, and `on_missing` is `fail`.
            ConfigError: A column of a template has no text, or the column of images is neither bytes nor URIs.
        """
        columns: dict[str, pa.Array] = {"request_id": pa.nulls(len(table), pa.string())}
        columns |= image_columns(values_of(table, self.image))
        missing: dict[str, pa.Array] = {}
        for name, template in (("prompt", self._options.prompt), ("negative_prompt", self._options.negative_prompt)):
            if template is None and name == "prompt" and self.source_of(name) is None:
                template = Template(f"{{{self._options.kind.prompt}}}", "--prompt")  # noqa: PLW2901
            source = self.source_of(name)
            if template is not None:
                columns[name], missing[name] = self._filled(template, table, places)
            elif source is not None:
                columns[name] = self.texts(table, source, f"--column {name}={source}")
        for name, source in self._options.columns.items():
            if name not in (*_TAKEN, "negative_prompt"):
                columns[name] = values_of(table, self._paths[source])
        for name in table.column_names:
            if name not in self._used and self.carried_name(name) not in columns:
                columns[self.carried_name(name)] = values_of(table, (name,))
        return columns, missing

    def texts(self, table: pa.Table, source: str, label: str) -> pa.Array:
        """Return a column, or a field of a struct, as texts.

        Raises:
            ConfigError: Its type has no text.
        """
        texts = as_texts(values_of(table, self._paths.get(source, (source,))))
        if texts is None:
            raise ConfigError(f"{label}: column {source!r} has no text; choose a column of texts or numbers")
        return texts

    @cached_property
    def _used(self) -> set[str]:
        """Columns of the source that others stand for."""
        used = {*self._options.columns.values(), self.image[0]}
        if self.source_of("request_id") is not None and self._options.ids_from in (None, "column"):
            used.add("request_id")
        used |= {path for path in self._paths if any(head in self._schema.names for head, _ in cuts(path))}
        return used | {name for name in _TEMPLATES if self._is_column(name)}

    def _is_column(self, name: str) -> bool:
        """Return True if a text is a column of the source as it is, without a template."""
        template = self._options.prompt if name == "prompt" else self._options.negative_prompt
        return template is None and self.source_of(name) == name

    def carried_name(self, name: str) -> str:
        """Return the name of a carried column: names that mean something else in a manifest get a prefix."""
        if self._is_manifest and name in REQUEST.names and name not in ("request_id", *_TEMPLATES):
            return name
        is_other = name in REQUEST.names or name in RESERVED or name in ("base_id", *self._options.columns)
        return f"source_{name}" if is_other else name

    def _filled(self, template: Template, table: pa.Table, places: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Return the texts of a template, and the rows in which one of its columns is missing."""
        missing = pa.array(np.zeros(len(table), bool))

        def texts(path: str) -> pa.Array:
            nonlocal missing
            found = self.texts(table, path, template.option)
            absent = pc.is_null(found)
            if self._options.on_missing == "fail" and pc.any(absent).as_py():
                row = pc.index(absent, pa.scalar(True)).as_py()
                raise ManifestError(
                    f"{places[row].as_py()}: column {path!r} is null or blank, and {template.option} needs it; choose "
                    "--on-missing drop or --on-missing empty"
                )
            missing = pc.or_(missing, absent)
            return pc.fill_null(found, "") if self._options.on_missing == "empty" else found

        return template.fill(len(table), texts), missing
