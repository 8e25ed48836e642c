"""Base class of every section of a config: frozen, and strict about its keys."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen part of the config; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:  # any value that YAML can hold
        """Refuse true and false where a number belongs, which pydantic reads as 1 and 0."""
        types = _types_in(cls.model_fields[info.field_name or ""].annotation)
        given = [value, *value] if isinstance(value, list | tuple) else [value]
        if bool not in types and types & {int, float} and any(isinstance(each, bool) for each in given):
            shown = ("true" if value else "false") if isinstance(value, bool) else str(list(value)).lower()
            msg = f"must be {'numbers' if len(given) > 1 else 'a number'} (got {shown})"
            raise ValueError(msg)
        return value


def _types_in(annotation: Any) -> set[Any]:  # any type
    """Return the classes that an annotation is made of."""
    return {annotation}.union(*map(_types_in, get_args(annotation)))
