"""Help page: names the values of options, where Typer alone shows types of Python, for flags too."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup

_VALUES = {int: "N", float: "NUMBER"}
"""Names of the values of options that have no `metavar`, by type; a path is a PATH, one of some words has them, and
every other value is a TEXT."""


class Command(TyperCommand):
    """Command whose help shows `--json` and `--limit N`; Typer alone shows `--json <bool>` and `--limit <int>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with names for their values."""
        return _with_values(super().get_params(ctx), ctx)


class Group(TyperGroup):
    """Group of commands whose own options are shown alike."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with names for their values."""
        return _with_values(super().get_params(ctx), ctx)


def _with_values(parameters: list[Any], ctx: Any) -> list[Any]:
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):
            parameter.metavar = parameter.metavar or (parameter.name or "").upper()
            parameter.display_type_rich = _no_type  # type: ignore[method-assign]  # its name says what it is
        elif getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif parameter.metavar is None:
            parameter.metavar = _value(parameter, ctx)
    return parameters


def _value(option: Any, ctx: Any) -> str:
    kind = option.type_descriptor
    if kind.is_choice:
        return str(option.display_type(ctx)).strip("<>")
    return "PATH" if kind.is_path else _VALUES.get(kind.annotation, "TEXT")


def _no_type(ctx: Any) -> None:
    """Return no type for the column of types."""
