"""Finding: the result of one preflight check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        state: `fail` where a run could not work.
        subject: Part of the system that was checked, in one word.
        message: Result in words.
        remedy: Next step for the operator; empty where none is needed.
    """

    state: State
    subject: str
    message: str
    remedy: str = ""
