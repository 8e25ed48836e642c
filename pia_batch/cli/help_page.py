"""Help page: shows flags without a type, because they take no value."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """Command whose help shows `--json`, where Typer alone shows `--json <bool>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with no name of a type for flags."""
        return _without_types(super().get_params(ctx))


class Group(TyperGroup):
    """Group of commands whose own flags are shown without a type."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with no name of a type for flags."""
        return _without_types(super().get_params(ctx))


def _without_types(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters
