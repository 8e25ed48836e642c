"""Asynchronous transfers: torch calls that would make the host wait for the GPU, replaced by calls that do not.

The host must run ahead of the device; otherwise the device is idle while the host prepares the next call. diffusers'
schedulers make the host wait: for noise that they sample on the CPU and move to the device, for small tables that they
build on the device, and for the check of a linear system. The results are the same without waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class AsyncTransfers(TorchFunctionMode):
    """Context in which host-to-device copies are queued from pinned memory and linear systems are solved unchecked.

    Tensors that stay on the CPU are not affected.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or an equivalent that does not wait for the device."""
        kwargs = kwargs or {}
        if func is torch.Tensor.to and _is_host(args[0].device) and not _is_host(_target(args[1:], kwargs)):
            return func(args[0].pin_memory(), *args[1:], **kwargs | {"non_blocking": True})
        if func is torch.tensor and not _is_host(kwargs.get("device")):
            here = func(*args, **kwargs | {"device": "cpu"})
            return here.pin_memory().to(kwargs["device"], non_blocking=True)
        if func is torch.linalg.solve and not _is_host(args[0].device):
            return torch.linalg.solve_ex(*args, **kwargs).result
        return func(*args, **kwargs)


def _target(args: Any, kwargs: Any) -> Any:
    """Return the device that the arguments of `Tensor.to` name, or None."""
    named = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.device | str | torch.Tensor)]
    return next((each.device if isinstance(each, torch.Tensor) else each for each in named), None)


def _is_host(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"
