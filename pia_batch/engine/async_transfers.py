"""Calls of torch that would wait for the GPU, made so that they do not.

The host must run ahead of the device, or the device idles while the next call is prepared. diffusers' schedulers make
it wait: for noise that they draw on the CPU and move, for small tables that they build on the device, for the check of
a linear system. All of that comes out the same without waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class AsyncTransfers(TorchFunctionMode):
    """Inside, copies from the host to a device are queued, from pinned memory, and linear systems solved unchecked.

    Without effect on tensors that stay on the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`func`, or what does the same without waiting."""
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
    """The device that the arguments of `Tensor.to` name; None: they name none."""
    named = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.device | str | torch.Tensor)]
    return next((each.device if isinstance(each, torch.Tensor) else each for each in named), None)


def _is_host(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"
