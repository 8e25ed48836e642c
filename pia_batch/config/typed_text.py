"""Typed text: reads the text of one `--set` as the type of its key asks for it.

YAML alone reads `#00ff80` as a comment, `007` as a number and `2026-11-22` as a date, whatever the key holds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from pia_batch.config import yaml_text

_ABSENT = {"", "null"}
"""Texts that mean no value for a key of type text that may be null."""

_MAY_BE_EMPTY = ("defaults.negative_prompt",)
"""Keys of that type at which an empty text is a value, too."""


def read(text: str, dotted: str, root: type[BaseModel]) -> Any:  # any value that YAML can hold
    """Return the value of `--set KEY=TEXT` for validation.

    A key whose type is text takes the text as it is; only `null`, or no text, means null where the key may be null.
    Numbers, booleans, lists, mappings and sections are read as YAML, and the texts in those are taken as they are, too.
    Text that is no YAML of that kind is returned unchanged, so that the message about it shows what was written.

    Args:
        text: Text after the equals sign.
        dotted: Key, such as `placement.batch_size`.
        root: Class of the whole config.

    Raises:
        ValueError: The key holds a list, a mapping or a section, and the text is not YAML.
    """
    alternatives = _alternatives_at(dotted.split("."), root)
    if _is_text(alternatives):
        absent = _ABSENT - {""} if dotted in _MAY_BE_EMPTY else _ABSENT
        return None if type(None) in alternatives and text in absent else text
    try:
        value, texts = yaml_text.parse(text), yaml_text.parse_texts(text)
    except ValueError:
        if any(map(_is_nested, alternatives)):
            raise
        return text
    if isinstance(value, list | dict):
        return _typed(value, texts, alternatives) if any(map(_is_nested, alternatives)) else text
    if value is None and (text.strip() or type(None) not in alternatives):
        return None if text.strip().lower() in ("null", "~") else text
    return value if value is None or isinstance(value, bool | int | float | str) else text


def _alternatives_at(location: list[str], root: type[BaseModel]) -> tuple[Any, ...]:
    """Return the types that the value at a key may have; none for an unknown key."""
    found: tuple[Any, ...] = (root,)
    for part in location:
        found = next(filter(None, (_child(each, part) for each in found)), ())
    return found


def _child(kind: Any, part: str) -> tuple[Any, ...]:
    """Return the types of the entry `part` of a section, a mapping or a list; none if it has no such entry."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _alternatives(kind.model_fields[part].annotation) if part in kind.model_fields else ()
    if get_origin(kind) is dict:
        return _alternatives(get_args(kind)[1])
    return _alternatives(get_args(kind)[0]) if get_origin(kind) is tuple else ()


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, those of unions in it included, without the metadata of `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (None, dict, list, tuple, Literal):
        return (annotation,)
    return tuple(each for member in get_args(annotation) for each in _alternatives(member))


def _is_text(alternatives: tuple[Any, ...]) -> bool:
    """Return True if a value must be text, or one of some texts, or null."""
    kinds = [each for each in alternatives if each is not type(None)]
    return bool(kinds) and all(
        each is str or (get_origin(each) is Literal and all(isinstance(word, str) for word in get_args(each)))
        for each in kinds
    )


def _is_nested(kind: Any) -> bool:
    return get_origin(kind) in (dict, tuple) or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _typed(value: Any, texts: Any, alternatives: tuple[Any, ...]) -> Any:
    """Return a value that YAML has read, with every scalar that must be text as it was written.

    Args:
        value: Value of YAML's own types.
        texts: The same value with every scalar as its text.
        alternatives: Types that the value may have; none if they are not known.
    """
    if isinstance(value, dict) and isinstance(texts, dict) and len(value) == len(texts):  # no merge keys, no tags
        pairs = zip(value.values(), texts.items(), strict=True)
        return {name: _typed(each, text, _entry(alternatives, name)) for each, (name, text) in pairs}
    if isinstance(value, list) and isinstance(texts, list) and len(value) == len(texts):
        return [_typed(each, text, _entry(alternatives, "")) for each, text in zip(value, texts, strict=True)]
    if _is_text(alternatives) and isinstance(texts, str):
        return None if value is None and type(None) in alternatives else texts
    return value


def _entry(alternatives: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    return next(filter(None, (_child(each, name) for each in alternatives)), ())
