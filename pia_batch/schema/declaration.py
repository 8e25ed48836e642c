"""Form of a setting's declaration: a dataclass field made by `setting`, and read by `declared`."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

from pia_batch.schema.identity import ALWAYS
from pia_batch.schema.key_prompts import KEY_PROMPTS_TYPE, KeyPrompt
from pia_batch.schema.lora_scales import LORA_SCALES_TYPE, LoraScale


def setting(
    default: Any,  # of the field's own type
    description: str,
    *,
    neutral: Any = ALWAYS,
    needs: str = "",
    formats: tuple[str, ...] = (),
    allowed: str = "",
    **limits: Any,
) -> Any:  # a dataclass field, which stands for its default
    """Declare a setting, as the value of a dataclass field.

    Args:
        default: Value where neither the row nor the config gives one.
        description: Meaning, unit and effect, for every table of the documentation.
        neutral: Value under which a clip is what it was before the setting existed. It is left out of the content key,
            and must never change. `ALWAYS`: the setting has been there from the first release, and is always hashed.
        needs: Name of another setting. Rows in which that one is neutral do not use this one; it is null there.
        formats: File formats that the setting affects; it is null in rows of other formats. Empty: all formats.
        allowed: Allowed values in words, where they do not follow from `limits` and the type.
        limits: Bounds for pydantic and for columns: `ge`, `gt`, `le`, `multiple_of`, `min_length`, `max_length`,
            `allow_inf_nan`.
    """
    declared = {"description": description, "neutral": neutral, "needs": needs, "formats": formats}
    return dataclasses.field(default=default, metadata=declared | {"allowed": allowed, "limits": limits})


@dataclass(frozen=True)
class Setting:
    """One declared setting.

    Attributes:
        name: Name of the column and of the config key.
        annotation: Type of a value in Python.
        data_type: Type of the column.
        default: Value where neither the row nor the config gives one.
        description: Meaning, unit and effect.
        neutral: Value that is left out of the content key; `ALWAYS`: none, but null.
        needs: Setting without which this one decides nothing; empty: none.
        formats: File formats that it affects; empty: all.
        allowed: Allowed values in words; empty: they follow from `choices` and `limits`.
        limits: Bounds, by pydantic's names.
        choices: Allowed values of a text; empty: any.
    """

    name: str
    annotation: Any
    data_type: pa.DataType
    default: Any
    description: str
    neutral: Any
    needs: str
    formats: tuple[str, ...]
    allowed: str
    limits: dict[str, Any]
    choices: tuple[str, ...]


def declared(*classes: type[Any]) -> tuple[Setting, ...]:
    """Return the settings that dataclasses declare, in order, each name once."""
    found: dict[str, Setting] = {}
    for each in classes:
        hints = get_type_hints(each, include_extras=True)
        for item in dataclasses.fields(each):
            annotation = hints[item.name]
            data_type, choices = _types(annotation)
            found.setdefault(
                item.name, Setting(item.name, annotation, data_type, item.default, choices=choices, **item.metadata)
            )
    return tuple(found.values())


def _types(annotation: Any) -> tuple[pa.DataType, tuple[str, ...]]:  # any type of a setting
    """Return the Arrow type and the choices of an annotation; `| None` makes no difference."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (each for each in get_args(annotation) if each is not types.NoneType)
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return pa.string(), get_args(annotation)
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        named = {KeyPrompt: KEY_PROMPTS_TYPE, LoraScale: LORA_SCALES_TYPE}
        return named[item] if item in named else pa.list_(pa.float64()), ()
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}[annotation], ()
