"""Shared weights: parts that several models have in common, created once and kept while one of the models is in use."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pia_batch.engine.offloading import DeviceSlot
from pia_batch.weights.components import Component

MOTION = "motion_modules"
"""Attribute under which diffusers keeps the motion modules of a UNet block."""


class SharedParts:
    """Parts of all models in use on one device, each identified by its recipe: a list of everything it was made from.

    A recipe is a list, nested at will, of `Component`s and values that JSON can hold. Equal recipes make equal parts.
    Code that changes a part in place must have created it under a recipe that no other part has.

    Attributes:
        slot: Device slot that offloaded networks of all these models take in turn.
    """

    def __init__(self, slot: DeviceSlot | None = None) -> None:
        self.slot = slot or DeviceSlot()
        self._parts: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def get(self, recipe: Sequence[Any], make: Callable[[], Any]) -> Any:
        """Return the part of this recipe that is in use; create it with `make` if there is none."""
        key = json.dumps(recipe, default=_identity, sort_keys=True)
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = make()
        return part

    def num_bytes(self) -> dict[torch.device, int]:
        """Return the number of bytes that the weights in use take of each device; shared weights count once."""
        tensors: dict[int, torch.Tensor] = {}
        for part in self._parts.values():
            if isinstance(part, torch.nn.Module):
                tensors |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
        sizes: dict[torch.device, int] = {}
        for tensor in tensors.values():
            sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.nbytes
        return sizes

    def share_motion(self, unet: Any, recipe: Sequence[Any]) -> None:
        """Replace the UNet's motion modules by equal ones of this recipe that are already in use."""
        own = [(name, modules) for name, modules in unet.named_modules() if name.split(".")[-1] == MOTION]
        for name, modules in own:
            block = unet.get_submodule(name.removesuffix(f".{MOTION}"))
            # Their structure depends on the base UNet, too; `repr` shows it.
            setattr(block, MOTION, self.get([*recipe, name, repr(modules)], partial(getattr, block, MOTION)))


def _identity(part: Any) -> Any:
    if not isinstance(part, Component):
        raise TypeError(f"recipe: unsupported type {type(part).__name__}; use Component or JSON values")
    # One hub commit holds many parts: folder and files distinguish them. Other identities are hashes of the files.
    return [part.identity(), *([part.folder.name, part.files] if part.commit else [])]
