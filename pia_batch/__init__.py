"""Animate datasets of images and prompts with PIA, the Personalized Image Animator, at any scale.

A *manifest* has one *request* per row: an image, a prompt, and settings of its own.
Ray Data reads the manifest and distributes its requests over actors that each hold one PIA *engine*.
Every *animation* is stored as one object and every request gets one *result* row, committed to a *journal* at once.
A *run* can be killed at any moment. The same command finishes it, and no result is lost, duplicated or computed twice.

`run(RunConfig(...))` executes the whole job and `plan` returns what it would do. `prepare` makes a manifest
of a dataset. `animate` applies its stages to your
own Ray Dataset, and `PiaEngine` is the model alone. An import loads only what it needs: `plan` loads neither Ray nor
torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ModelConfig": ("config", "ModelConfig"),
    "PiaEngine": ("engine", "PiaEngine"),
    "RunConfig": ("config", "RunConfig"),
    "Shot": ("engine", "Shot"),
    "animate": ("pipeline.dataset", "animate"),
    "evaluate": ("evaluation.job", "evaluate"),
    "export": ("datasets.export", "export"),
    "plan": ("planning.plan", "make_plan"),
    "prepare": ("datasets.prepare", "prepare"),
    "run": ("driver.run", "run"),
}
"""Module and attribute by public name. `__init__.pyi` declares the same names for type checkers."""

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 - all of them are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module, attribute = _PUBLIC[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
