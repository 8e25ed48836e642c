"""Base class of every section of a config: frozen, and strict about its keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the config; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
