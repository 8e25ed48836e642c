"""A fake device: its tensors claim to be on it, compute on the CPU, and report when the host waits."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

PLACE = torch.device("meta")
"""A device that torch knows without its hardware, other than the host."""

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_linalg_check_errors"}
"""Operations of ATen that read numbers on the device."""

FACTORIES = {torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.linspace}
"""Functions that make a tensor on the device without data of the host."""


_SMALL = 1024
"""Size in bytes up to which CUDA copies without waiting: 64 kB."""


class Remote(torch.Tensor):
    """A tensor of the device; `here` holds its numbers."""

    here: torch.Tensor
    waits: list[str]

    @staticmethod
    def __new__(cls, here: torch.Tensor, waits: list[str]) -> Any:
        self = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=PLACE
        )
        self.here, self.waits = here, waits
        return self

    def __repr__(self, **_: Any) -> str:
        return f"Remote({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, found = dict(kwargs or {}), []

        def local(each: Any) -> Any:
            if isinstance(each, Remote):
                found.append(each.waits)
                return each.here
            return each

        given, named = tree_map(local, args), tree_map(local, kwargs)
        name = func.overloadpacket.__name__
        target = next((each for each in (kwargs.get("device"), *args) if isinstance(each, torch.device)), None)
        leaves = target is not None and torch.device(target) != PLACE
        copied_home = name == "copy_" and not isinstance(args[0], Remote)
        queued = copied_home and (args[2:] == (True,) or kwargs.get("non_blocking", False))
        if name in READS or leaves or (copied_home and not queued):
            found[0].append(str(func))
        if target is not None:
            given, named = tree_map(_as_host, (given, named))
        result = func(*given, **named)
        if leaves or copied_home:
            return result
        if isinstance(args[0], Remote) and result is given[0]:
            return args[0]
        return tree_map(lambda each: Remote(each, found[0]) if isinstance(each, torch.Tensor) else each, result)


def _as_host(each: Any) -> Any:
    return torch.device("cpu") if isinstance(each, torch.device) else each


class Machine(TorchFunctionMode):
    """Provide the fake device inside a block.

    Attributes:
        waits: Operations that made the host wait for it, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: list[torch.Tensor] = []

    def remote(self, here: torch.Tensor) -> Remote:
        """Return a copy on the device."""
        made: Remote = Remote(here.clone(), self.waits)
        return made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        from_host = bool(args) and isinstance(args[0], torch.Tensor) and not isinstance(args[0], Remote)
        if func is torch.Tensor.to and from_host and PLACE in (*args[1:], kwargs.get("device")):
            result = self._moved(args, kwargs)
        elif func is torch.Tensor.pin_memory:
            result = self._pin(args[0].clone())
        elif func is torch.empty and kwargs.pop("pin_memory", False):
            result = self._pin(func(*args, **kwargs))
        elif func is torch.Tensor.__getitem__ and not from_host and isinstance(args[1], list):
            self.waits.append("an index of the host")
            result = args[0][torch.tensor(args[1])]
        elif (func in FACTORIES or func is torch.tensor) and kwargs.get("device") == PLACE:
            if func is torch.tensor:
                self.waits.append("a table of the host")
            result = self.remote(func(*args, **kwargs | {"device": "cpu"}))
        else:
            result = func(*args, **kwargs)
        return result

    def _moved(self, args: Any, kwargs: Any) -> Remote:
        """Copy like `Tensor.to`. A small tensor is sent with the copy command, so the host does not wait."""
        queued = kwargs.pop("non_blocking", False)
        if not (queued and (args[0].nbytes <= _SMALL or any(args[0] is each for each in self._pinned))):
            self.waits.append("a copy to the device")
        rest = [each for each in args[1:] if each != PLACE]
        kwargs.pop("device", None)
        return self.remote(args[0].to(*rest, **kwargs) if rest or kwargs else args[0])

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.append(tensor)
        return tensor
