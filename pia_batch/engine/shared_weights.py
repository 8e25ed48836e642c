"""Parts that several models have in common: made once, and kept for as long as one of the models is in use."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pia_batch.engine.offloading import Berth
from pia_batch.weights.components import Component

MOTION = "motion_modules"
"""What diffusers calls the motion modules of each block of a UNet."""


class SharedParts:
    """The parts of all models in use on one device, each by its recipe: everything that it was made of.

    A recipe is a list, nested at will, of `Component`s and what JSON can hold. Equal recipes make equal parts. Whoever
    changes a part must have made it by a recipe of its own.

    Attributes:
        berth: where networks that wait on the CPU are taken in turn.
    """

    def __init__(self, berth: Berth | None = None) -> None:
        self.berth = berth or Berth()
        self._parts: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def get(self, recipe: Sequence[Any], make: Callable[[], Any]) -> Any:
        """The part of this recipe that is in use, or else a new one."""
        key = json.dumps(recipe, default=_identity, sort_keys=True)
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = make()
        return part

    def num_bytes(self) -> dict[torch.device, int]:
        """How much the weights in use take of each device, what is shared counted once."""
        tensors: dict[int, torch.Tensor] = {}
        for part in self._parts.values():
            if isinstance(part, torch.nn.Module):
                tensors |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
        sizes: dict[torch.device, int] = {}
        for tensor in tensors.values():
            sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.nbytes
        return sizes

    def share_motion(self, unet: Any, recipe: Sequence[Any]) -> None:
        """Put the motion modules of this recipe that are in use in place of the UNet's own, equal ones."""
        own = [(name, modules) for name, modules in unet.named_modules() if name.split(".")[-1] == MOTION]
        for name, modules in own:
            block = unet.get_submodule(name.removesuffix(f".{MOTION}"))
            # The base UNet has a say in their structure, which is in what they print.
            setattr(block, MOTION, self.get([*recipe, name, repr(modules)], partial(getattr, block, MOTION)))


def _identity(part: Any) -> Any:
    if not isinstance(part, Component):
        raise TypeError(f"{part!r} cannot be part of a recipe")
    # A commit holds many parts, told apart by their folder and files; elsewhere identities are hashes of the files.
    return [part.identity(), *([part.folder.name, part.files] if part.commit else [])]
