"""Messages about invalid configs: the key, its value, and for an unknown key the nearest known one."""

from __future__ import annotations

import difflib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pia_batch.storage import uris


def explain(err: ValidationError, root: type[BaseModel], source: str) -> str:
    """Return the errors of a config as one line for an operator.

    Args:
        err: Errors that pydantic found.
        root: Class of the whole config.
        source: Origin of the values, such as a file's path.
    """
    lines = []
    for problem, *others in _by_value(_causes(err.errors())):
        location = problem["loc"][:-1] if others else problem["loc"]
        key = ".".join(uris.redacted_uri(str(part)) for part in location)
        if problem["type"] == "extra_forbidden":
            near = nearest([str(part) for part in location], root)
            lines.append(f"{key}: unknown key" + (f"; did you mean {near!r}?" if near else ""))
        elif problem["type"] == "missing":
            flag = f"; give --{key}, or a config that has it" if key in _FLAGS else ""
            lines.append(f"{key}: required, and not given{flag}")
        else:
            text = _alternatives([problem, *others]) if others else _problem_text(problem)
            lines.append(f"{key}: {text}" if key else text)
    return f"{source}: " + "; ".join(lines)


_FLAGS = ("manifest", "output")
"""Required keys that have a flag of their own."""


def _causes(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """Return the errors without those of lists that are too short because pydantic left out their invalid items."""
    lists = {problem["loc"][:-1] for problem in problems}
    return [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in lists]


_TYPE_OF_UNION = re.compile(r"bool|int|float|str|literal\[.*\]")
"""Last part of an error's location where a value is of none of several types."""


def _by_value(problems: list[ErrorDetails]) -> Iterator[list[ErrorDetails]]:
    """Yield each error in a list; those about one value of several types, which follow each other, in one list."""

    def value_of(problem: ErrorDetails) -> tuple[int | str, ...]:
        location = problem["loc"]
        is_union = len(location) > 1 and _TYPE_OF_UNION.fullmatch(str(location[-1]))
        return location[:-1] if is_union else ("", *location)

    for _, group in itertools.groupby(problems, value_of):
        yield list(group)


def _alternatives(problems: list[ErrorDetails]) -> str:
    """Return one text for the errors of all types that a value may have."""
    texts = [_problem_text(problem).removeprefix("must be ").partition(" (got ")[0] for problem in problems]
    return f"must be {' or '.join(dict.fromkeys(texts))} (got {_shown(problems[0]['input'])})"


_TYPES = {
    "bool": "true or false",
    "dict": "a mapping of names to values",
    "float": "a number",
    "int": "a whole number",
    "model": "a section, with its keys below it",
    "string": "a text",
    "tuple": "a list, such as [a, b]",
}
"""Expected type of a value in words, by the first word of pydantic's error type."""


def _problem_text(problem: ErrorDetails) -> str:
    """Return an error and the value that caused it, in the terms of a config rather than of Python."""
    kind, text = problem["type"], problem["msg"]
    if kind == "value_error":  # raised by validators here, which name the value
        return text.removeprefix("Value error, ")
    expected, _, rest = kind.partition("_")
    if kind == "string_unicode":
        return (
            f"not text in the encoding of this process, {sys.getfilesystemencoding()} (got "
            f"{_shown(problem['input'])}); set PYTHONUTF8=1, or LC_ALL to a locale such as C.UTF-8"
        )
    if (expected, rest) == ("invalid", "key"):
        return f"a key must be a text; write it in quotes (got {_shown(problem['input'])})"
    if kind in ("too_short", "too_long"):
        way, limit = ("most", "max_length") if kind == "too_long" else ("least", "min_length")
        allowed = problem["ctx"][limit]
        found = len(problem["input"]) or "[]"
        return f"must have at {way} {allowed} item{'s' * (allowed > 1)} (got {found})"
    if expected in _TYPES and rest in ("type", "parsing", "from_float", "attributes_type"):
        text = f"must be {_TYPES[expected]}"
    if expected == "string" and rest == "type" and not isinstance(problem["input"], list | dict):
        hint = "a text that begins with #" if problem["input"] is None else "such a text"
        return f"{text} (got {_shown(problem['input'])}); in YAML, write {hint} in quotes"
    return f"{re.sub('^(Input|String) should', 'must', text)} (got {_shown(problem['input'])})"


def nearest(location: Sequence[str], root: type[BaseModel]) -> str | None:
    """Return the most likely key: of similar spelling in the same section, or known or similar in another; or None.

    Args:
        location: Parts of the unknown key, names and numbers of entries included.
        root: Class of the whole config.
    """
    *section, leaf = location
    siblings, known = _section_at(section, root).model_fields, list(_keys(root))
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    for alike in (0.8, 0.6):
        found = difflib.get_close_matches(leaf, siblings, n=1, cutoff=alike)
        if found:
            return ".".join([*section, *found])
        if leaf in leaves:
            return leaves[leaf]
    whole = difflib.get_close_matches(".".join(location), known, n=1, cutoff=0.8)
    elsewhere = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)]
    return next(iter([*whole, *elsewhere]), None)


def _section_at(location: Sequence[str], root: type[BaseModel]) -> type[BaseModel]:
    """Return the class of a section; parts that number or name entries of a list or mapping are skipped."""
    section = root
    for part in location:
        if part in section.model_fields:
            section = _model_in(section.model_fields[part].annotation) or section
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:  # any type
    """Return the section class in a field's type: itself, its entries', or one of a union's; or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a section and its subsections, but none of entries of lists and mappings."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _shown(value: object) -> str:
    """Return a value for a message, without the credentials of the URIs in it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, date):  # YAML reads a text such as 2026-11-22 as one
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return uris.redacted(repr(uris.redacted_uri(value) if isinstance(value, str) else value))
