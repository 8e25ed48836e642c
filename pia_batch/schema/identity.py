"""Neutral values: the part of a declaration that keeps content keys and engine ids stable across releases.

A content key and an engine id are hashes of everything that decides the pixels. An option at its *neutral value*, the
value under which a clip is what it was before the option existed, is left out of the hash. A release that adds an
option therefore changes no key that exists. The neutral value belongs to the declaration of an option, need not be its
default, and must never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ALWAYS: Final = ...
"""The neutral value of an option that has none: it is part of every key, unless it is null."""


@dataclass(frozen=True, slots=True)
class Decides:
    """Mark of a config key that decides the pixels or the bytes of a file, for `Annotated`.

    Attributes:
        neutral: The value that is left out of the hash; `ALWAYS` where every value but null is hashed.
        formats: The encoders that the option affects, as `EncodingConfig.identity` names them; empty: all of them.
    """

    neutral: Any = ALWAYS
    formats: tuple[str, ...] = ()


def is_neutral(value: object, neutral: object) -> bool:
    """Return True if `value` is left out of a hash; null always is."""
    return value is None or (neutral is not ALWAYS and value == neutral)


def decisive(section: BaseModel, file_format: str | None = None) -> dict[str, Any]:
    """Return the values of a config section that decide a clip, ready for JSON, without the neutral ones.

    Args:
        section: Any section. Its keys count if they are declared as `Annotated[..., Decides(...)]`.
        file_format: Name of a file format; keys that affect other formats only are left out. None: all keys count.
    """
    found = {}
    for name, field in type(section).model_fields.items():
        mark = _mark(field)
        if mark is None or (mark.formats and file_format is not None and file_format not in mark.formats):
            continue
        value = getattr(section, name)
        if not is_neutral(value, mark.neutral):
            found[name] = decisive(value) if isinstance(value, BaseModel) else _plain(value)
    return found


def _mark(field: FieldInfo) -> Decides | None:
    return next((each for each in field.metadata if isinstance(each, Decides)), None)


def _plain(value: Any) -> Any:  # any value of a config
    return list(value) if isinstance(value, tuple) else value
