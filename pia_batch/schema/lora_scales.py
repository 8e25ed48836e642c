"""LoRA scales of a row: a scale for LoRAs of its model by their names, in the forms in which people write them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pydantic import AfterValidator, BeforeValidator

MAX_SCALE = 10.0
"""Largest absolute scale, that of `model.loras[].scale`."""


class LoraScale(NamedTuple):
    """Scale of one LoRA.

    Attributes:
        name: Name of the LoRA in the config.
        scale: Factor with which it is applied, in place of the config's.
    """

    name: str
    scale: float


LORA_SCALES_TYPE = pa.list_(pa.struct([("name", pa.string()), ("scale", pa.float64())]))
"""Arrow type of a column of LoRA scales. It is a list, and no map: few readers of Parquet take maps."""


def lora_scales(value: Any) -> Any:  # returned unchanged where it has none of the forms, for validation to refuse
    """Return LoRA scales as a tuple of `LoraScale`, sorted by name.

    Args:
        value: Mapping from names to numbers (None for a name that a row does not have), a sequence of pairs or of
            mappings with the names `name` and `scale`, or either as JSON text.
    """
    if isinstance(value, str):
        try:
            return lora_scales(json.loads(value)) if value.strip() else None
        except ValueError:
            return value
    if isinstance(value, Mapping):
        value = [pair for pair in value.items() if pair[1] is not None]
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        return value
    try:
        return tuple(sorted(map(_one, value)))
    except TypeError:
        return value


def is_read(scales: Any) -> bool:
    """Return True if `lora_scales` found one of its forms."""
    return isinstance(scales, tuple) and all(isinstance(each, LoraScale) for each in scales)


def problem_of(scales: Any) -> str | None:
    """Return what is wrong with LoRA scales, with the remedy; None if nothing is."""
    form = "names with numbers, such as [{name: zoom, scale: 0.5}]"
    if not is_read(scales):
        return form
    if any(not math.isfinite(each.scale) or abs(each.scale) > MAX_SCALE for each in scales):
        return f"scales from -{MAX_SCALE:g} to {MAX_SCALE:g}"
    if len({each.name for each in scales}) < len(scales):
        return "one scale for each name"
    return None


def _one(item: Any) -> LoraScale:
    if isinstance(item, Mapping) and set(item) == {"name", "scale"}:
        item = (item["name"], item["scale"])
    if isinstance(item, list | tuple) and len(item) == len(LoraScale._fields):
        name, scale = item
        if isinstance(name, str) and isinstance(scale, int | float) and not isinstance(scale, bool):
            return LoraScale(name, float(scale))
    raise TypeError(item)


def _checked(scales: tuple[LoraScale, ...]) -> tuple[LoraScale, ...]:
    problem = problem_of(scales)
    if problem:
        raise ValueError(f"allowed: {problem}")
    return scales


LoraScales = Annotated[tuple[LoraScale, ...], BeforeValidator(lora_scales), AfterValidator(_checked)]
"""Annotation of a setting of LoRA scales."""
