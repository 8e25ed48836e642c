"""Animate datasets of images and prompts with PIA, the Personalized Image Animator, at any scale.

A *manifest* has one *request* per row: an image, a prompt, and settings of its own.
Ray Data reads it and maps it across actors that each hold one PIA *engine*.
Every *animation* becomes one object and every request one *result* row, committed to a *journal* as it is made.
A *run* can be killed at any moment; the same command again finishes it, and nothing is lost, doubled or computed twice.

`run(RunConfig(...))` is the whole job, `plan` what can be known before it, `animate` its stages over a Dataset of one's
own, `PiaEngine` the model by itself. Naming one of them loads no more than it needs: planning knows neither Ray nor
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
    "plan": ("planning.plan", "make_plan"),
    "run": ("driver.run", "run"),
}
"""By public name: the module that has it, and its name there. `__init__.pyi` tells type checkers the same."""

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 - all of them are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module, attribute = _PUBLIC[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
