"""Column `lora_scales`: read in all its forms, checked against the LoRAs of each row's model, and made effective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pia_batch.config import ModelConfig, RunConfig
from pia_batch.config.model_limits import Limits, ModelLimits
from pia_batch.manifest.arrow_types import has_part
from pia_batch.schema.lora_scales import LORA_SCALES_TYPE, LoraScale, is_read, lora_scales, problem_of

NAME = "lora_scales"


def read(raw: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Return the column in its own type, the rows that have none of the forms, and those with values out of range.

    Args:
        raw: Lists of structs with `name` and `scale`, maps, or JSON text of either.
    """
    if has_part(raw.type, pa.types.is_temporal):  # some dates and time zones have no value in Python
        return column_of([None] * len(raw)), raw.is_valid(), pa.repeat(False, len(raw))
    found = [None if value is None else lora_scales(value) for value in raw.to_pylist()]
    unread = [scales is not None and not is_read(scales) for scales in found]
    wrong = [is_read(scales) and problem_of(scales) is not None for scales in found]
    values = column_of(scales if is_read(scales) and problem_of(scales) is None else None for scales in found)
    return values, pa.array(unread, pa.bool_()), pa.array(wrong, pa.bool_())


def column_of(values: Iterable[tuple[LoraScale, ...] | None]) -> pa.Array:
    """Return a column of LoRA scales."""
    rows = [None if scales is None else [each._asdict() for each in scales] for scales in values]
    return pa.array(rows, LORA_SCALES_TYPE)


def rejected(column: pa.Array, models: pa.Array, config: RunConfig, limits: Limits) -> dict[str, pa.Array]:
    """Return the rows whose names are no adjustable LoRA of their model, by what is allowed there.

    Args:
        column: Scales as `read` returns them.
        models: Name of each row's model.
        config: Config of the run.
        limits: Limits of the models, by their names.
    """
    masks: dict[str, list[bool]] = {}
    for index, (value, model) in enumerate(zip(column.to_pylist(), models.to_pylist(), strict=True)):
        found = config.all_models.get(model)
        fixed = limits.get(model, ModelLimits()).fixed_loras
        allowed = None if not value or found is None else _problem([each["name"] for each in value], found, fixed)
        if allowed is not None:
            masks.setdefault(allowed, [False] * len(column))[index] = True
    return {allowed: pa.array(mask) for allowed, mask in masks.items()}


def _problem(names: list[str], model: ModelConfig, fixed: frozenset[str]) -> str | None:
    known = Counter(each.label for each in model.loras)
    if not known:
        return f"null; model {model.name!r} has no LoRAs"
    if model.fuse_loras:
        return f"null where model {model.name!r} has fuse_loras: true"
    if any(known[name] != 1 for name in names):
        unique = ", ".join(sorted(name for name, count in known.items() if count == 1))
        return f"names of LoRAs of model {model.name!r} ({unique or 'none is unique'}); set `name` in its `loras`"
    merged = sorted(fixed & set(names))
    if merged:
        return (
            f"names of plain LoRAs: {', '.join(merged)} of model {model.name!r} has layers of another kind (LoHa, "
            "LoKr, DoRA, Tucker, full differences), which are merged into the weights; set its scale in `loras`"
        )
    return None


def fill(column: pa.Array, models: pa.Array, config: RunConfig) -> pa.Array:
    """Return the effective scales: defaults filled in, and without those that the config has anyway; null if none.

    Args:
        column: Valid scales.
        models: Name of each row's model.
        config: Config of the run.
    """
    default = config.defaults.lora_scales
    if column.null_count == len(column) and not default:
        return column
    own = {name: _own(model) for name, model in config.all_models.items()}
    values = []
    for value, model in zip(column.to_pylist(), models.to_pylist(), strict=True):
        given: Any = default or () if value is None else lora_scales(value)
        kept = tuple(each for each in given if own[model].get(each.name, each.scale) != each.scale)
        values.append(kept or None)
    return column_of(values)


def _own(model: ModelConfig) -> dict[str, float]:
    return {} if model.fuse_loras else {each.label: each.scale for each in model.loras}
