"""Writer of the documentation that comes from the code: `make docs`.

Tables go into their pages, between `<!-- generated: NAME -->` and `<!-- end -->`; everything around them is written by
hand. jobs/configs/reference.yaml, which has every key of a config, is written as a whole.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pia_batch.cli import EXIT_CODES
from pia_batch.config import RunConfig
from pia_batch.datasets.export_table import FORMATS
from pia_batch.datasets.kinds import KINDS as SOURCE_KINDS
from pia_batch.evaluation.clips import KINDS
from pia_batch.evaluation.measures import MEASURES
from pia_batch.pipeline.metrics import METRICS
from pia_batch.report.head import REMEDIES
from pia_batch.schema.columns import MEASURED, MODEL, OUTCOME, REQUEST, SETTINGS, SOURCE
from pia_batch.schema.declaration import Setting
from pia_batch.schema.run_record import ProgressSnapshot, RunRecord
from pia_batch.schema.settings import BY_NAME
from pia_batch.storage import schemes

HERE = Path(__file__).parent


def config_keys() -> list[str]:
    """Every key of a config with its default and its meaning."""
    return _table(["key", "default", "meaning"], (_key_row(name, field) for name, field in _fields(RunConfig, "")))


def _key_row(name: str, field: FieldInfo) -> tuple[str, str, str]:
    default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
    return f"`{name}`", default, str(field.description)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def request_columns() -> list[str]:
    """Return every column of a manifest that has a meaning."""
    others = {column.name: column for column in SOURCE + MODEL}
    rows = []
    for field in REQUEST:
        column = others.get(field.name)
        setting = BY_NAME[field.name] if column is None else None
        allowed = _allowed(setting) if setting else others[field.name].allowed
        description = setting.description if setting else others[field.name].description
        rows.append((f"`{field.name}`", _type(field.type), allowed, description))
    return _table(["column", "type", "allowed", "meaning"], rows)


def result_columns() -> list[str]:
    """Return every column of a result, the settings in one row."""
    rows = [(f"`{column.name}`", _type(column.data_type), column.description) for column in OUTCOME + MEASURED]
    settings = ", ".join(f"`{name}`" for name in SETTINGS.names)
    used = (
        "Settings of the animation, defaults filled in; null for rejected rows, and where one decides nothing. "
        "`width`, `height`, `num_frames` and `fps` are those of the file, if there is one."
    )
    return _table(["column", "type", "meaning"], [*rows, (settings, "as in a manifest", used)])


def _allowed(setting: Setting) -> str:
    """Return the allowed values of a setting in words."""
    if setting.allowed:
        return setting.allowed
    if setting.choices:
        return ", ".join(f"`{choice}`" for choice in setting.choices)
    limits = setting.limits
    if not limits:
        return ""
    low = f"above {limits['gt']:g} up" if "gt" in limits else f"{limits['ge']:g}"
    multiples = f", multiples of {limits['multiple_of']}" if "multiple_of" in limits else ""
    return f"{low} to {limits['le']:g}{multiples}"


def _type(data_type: pa.DataType) -> str:
    if pa.types.is_list(data_type):
        return f"list of {_type(data_type.value_type)}s"
    words = {"int64": "int", "double": "float", "large_binary": "binary", "timestamp[us, tz=UTC]": "timestamp"}
    return words.get(str(data_type), str(data_type))


def error_kinds() -> list[str]:
    """Every error kind with its remedy."""
    return _table(["error kind", "what to do"], ((f"`{kind}`", remedy) for kind, remedy in REMEDIES.items()))


def exit_codes() -> list[str]:
    """Return every exit code with its meaning."""
    return _table(["exit code", "meaning"], ((str(code), meaning) for code, meaning in EXIT_CODES.items()))


def export_formats() -> list[str]:
    """Return every format of `export`, with what its destination has."""
    return _table(["format", "destination"], ((f"`{each.name}`", each.description) for each in FORMATS.values()))


def metrics() -> list[str]:
    """Return every metric for Prometheus."""
    rows = (
        (f"`{name}`", metric.kind, ", ".join(f"`{tag}`" for tag in metric.tags), metric.meaning)
        for name, metric in METRICS.items()
    )
    return _table(["metric", "kind", "tags", "meaning"], rows)


def progress_fields() -> list[str]:
    """Return every field of a progress record."""
    rows = ((f"`{name}`", str(field.description)) for name, field in ProgressSnapshot.model_fields.items())
    return _table(["field", "meaning"], rows)


def run_record_fields() -> list[str]:
    """Return every field of run.json with its meaning; those of an object are named after it."""
    return _table(["field", "meaning"], _record_fields(RunRecord, ""))


def _record_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        parts = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        inner = [part for part in parts if issubclass(part, BaseModel) and part is not ProgressSnapshot]
        yield f"`{prefix}{name}`", str(field.description)
        for part in inner:
            yield from _record_fields(part, f"{prefix}{name}.")


def url_schemes() -> list[str]:
    """Return every URL scheme, and what it can be used for."""
    purposes: tuple[schemes.Purpose, ...] = ("manifest", "image", "images.allow", "weights", "output")
    rows = (
        (
            f"`{scheme.name}://`",
            *("yes" if scheme.serves(purpose) else "no" for purpose in purposes),
            f"`{scheme.package}`, by the extra `{schemes.EXTRAS[scheme.package]}`" if scheme.package else "",
        )
        for scheme in schemes.SCHEMES.values()
    )
    return _table(["scheme", *purposes, "package needed to read manifests and images"], rows)


def measures() -> list[str]:
    """Return every measure of an evaluation."""
    needs = {"pixels": "", "flow": "OpenCV", "clip": "`--clip`", "dino": "`--dino`"}
    rows = (
        (f"`{each.name}`", needs[each.needs], each.span, each.unit, each.better, each.formula, each.source)
        for each in MEASURES
    )
    return _table(["measure", "needs", "range", "unit", "wanted", "formula", "source"], rows)


def evaluation_errors() -> list[str]:
    """Return every error kind of an evaluation."""
    rows = ((", ".join(f"`{kind}`" for kind in kinds.split(", ")), text) for kinds, text in KINDS.items())
    return _table(["error kind", "meaning"], rows)


def kinds_of_sources() -> list[str]:
    """Return every kind of source that `prepare` reads."""
    ids = {"content": "image, prompt and settings", "location": "the place in the source"}
    rows = [
        (f"`{kind.name}`", kind.meaning, f"`{{{kind.prompt}}}`" if kind.prompt else "", ids[kind.ids])
        for kind in SOURCE_KINDS.values()
    ]
    return _table(["kind", "reads", "prompt without `--prompt`", "ids without a column"], rows)


def modules() -> list[str]:
    """Return the tree of the package, one line for each module: the first line of its docstring."""
    return ["```text", "pia_batch/", *_tree(HERE.parent / "pia_batch", "  "), "```"]


def _tree(folder: Path, indent: str) -> Iterator[str]:
    """Yield a folder's modules and then its packages, each with what the first line of its docstring says."""
    for path in sorted(folder.iterdir(), key=_place):
        if path.suffix == ".py":
            yield f"{indent}{path.name:<{_TREE_COLUMN - len(indent)}}{_first_line(path)}"
        elif (path / "__init__.py").is_file():
            yield f"{indent}{path.name}/"
            yield from _tree(path, f"{indent}  ")


def _place(path: Path) -> tuple[bool, int, str]:
    """Return where a module or package stands in the tree: packages last, the package's own ones as rows meet them."""
    known = path.name in _ROOMS and path.parent.name == "pia_batch"
    return path.is_dir(), _ROOMS.index(path.name) if known else 0, path.name


def _first_line(module: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].rstrip(".")


_ROOMS = (
    *("storage", "schema", "config", "manifest", "planning", "pipeline", "media", "engine", "weights", "journal"),
    *("driver", "report", "datasets", "evaluation", "cli", "tiny"),
)
"""Packages in the order in which a manifest's row meets them; `docs/architecture.md` walks through them."""

_TREE_COLUMN = 28
"""Width of the names in the tree, in characters."""


def _table(head: list[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


TABLES: dict[str, Callable[[], list[str]]] = {
    "config keys": config_keys,
    "columns of a request": request_columns,
    "columns of a result": result_columns,
    "error kinds": error_kinds,
    "evaluation errors": evaluation_errors,
    "exit codes": exit_codes,
    "export formats": export_formats,
    "measures": measures,
    "metrics": metrics,
    "kinds of sources": kinds_of_sources,
    "modules": modules,
    "progress fields": progress_fields,
    "run record fields": run_record_fields,
    "url schemes": url_schemes,
}
"""By the name that stands in the page."""

_PLACE = re.compile(r"(<!-- generated: ([\w ]+) -->\n\n).*?\n(\n<!-- end -->)", re.DOTALL)


def written(page: str) -> str:
    """Return a page's text with every table as the code has it now."""
    return _PLACE.sub(lambda place: f"{place[1]}{chr(10).join(TABLES[place[2]]())}\n{place[3]}", page)


def reference_config() -> str:
    """Return jobs/configs/reference.yaml: every key of a config below its meaning, as a comment with its default.

    The two keys without a default have a value.
    """
    lines = textwrap.wrap(_REFERENCE, 118, initial_indent="# ", subsequent_indent="# ")
    for key, field, depth in _nested(RunConfig, 0):
        indent = "  " * depth
        if field is None:
            lines += [f"{indent}#{key}:"] if depth else ["", f"{key}:"]  # a null inside of a section is no section
        elif field.is_required():
            lines += ["", *_wrapped(field, indent), f"{indent}{key}: s3://bucket/{_REQUIRED[key]}"]
        else:
            value = _yaml(field.get_default(call_default_factory=True))
            lines += [*_wrapped(field, indent), f"{indent}#{key}: {value}"]
    return "\n".join(lines) + "\n"


_REFERENCE = (
    "Every key of a config: copy those that you change. A value directly after a # is the default. This file is "
    "generated; the other configs of this folder are examples."
)
_REQUIRED = {"manifest": "requests/", "output": "animations"}


def _nested(section: type[BaseModel], depth: int) -> Iterator[tuple[str, FieldInfo | None, int]]:
    """Yield each key with its field, and each section's name before its keys; depth counts the sections around it."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, None, depth
            yield from _nested(field.annotation, depth + 1)
        else:
            yield name, field, depth


def _yaml(value: Any) -> str:
    """Return a default as YAML in one line."""
    if isinstance(value, str) and not re.fullmatch(r"\w+", value):
        return json.dumps(value)
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else _shown(value)


def _wrapped(field: FieldInfo, indent: str) -> list[str]:
    return textwrap.wrap(
        str(field.description),
        120,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def main() -> None:
    """Rewrite the tables of the pages next to this file, and jobs/configs/reference.yaml."""
    for path in sorted(HERE.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if written(page) != page:
            path.write_text(written(page), encoding="utf-8")
    (HERE.parent / "jobs/configs/reference.yaml").write_text(reference_config(), encoding="utf-8")


if __name__ == "__main__":
    main()
