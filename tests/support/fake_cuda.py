"""A fake GPU of torch's fake tensors: shapes, dtypes, strides and the device `cuda:0`, and no numbers.

Where a GPU would raise, it raises: tensors of two devices in one operation, two precisions in one product, more heads
than a kernel takes. Where the host would wait for a GPU, that is noted. What the host reads comes as ones.

A build of torch without CUDA cannot guard a device that it does not know. Its functions that want to are done here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")

MOST = 65_535
"""Limit of CUDA's grid in its second and third dimension, in which attention counts batches and heads."""

OF_A_KIND = {
    "addmm",
    "baddbmm",
    "bmm",
    "conv2d",
    "convolution",
    "group_norm",
    "layer_norm",
    "linear",
    "matmul",
    "mm",
    "native_group_norm",
    "native_layer_norm",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
}
"""Operations of ATen whose operands share a dtype and a device. Fake tensors look at neither in all of them."""

_SMALL = 64 * 1024
"""Bytes that CUDA copies from pageable memory without waiting."""


class _Kernels(TorchDispatchMode):
    """A mode that raises where a GPU has no kernel: for two precisions, or operands on other devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in OF_A_KIND:
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            for found in ({each.dtype for each in given}, {each.device for each in given}):
                if len(found) > 1:
                    raise RuntimeError(f"{func} of {' and '.join(sorted(map(str, found)))}")
        return func(*args, **(kwargs or {}))


class FakeCuda(TorchFunctionMode):
    """Provide the fake GPU inside a block.

    Attributes:
        waits: Operations that made the host wait for it, in order.
        attended: Shape of the queries of every attention, and true if it may go to cuDNN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.attended: set[tuple[torch.Size, bool]] = set()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: list[torch.Tensor] = []
        self._own = {
            torch.Tensor.__bool__: lambda given, *_: self._read(given).bool().item(),
            torch.Tensor.__getitem__: self._item,
            torch.Tensor.__setitem__: self._set_item,
            torch.Tensor.contiguous: self._contiguous,
            torch.Tensor.copy_: self._copy,
            torch.Tensor.cpu: self._read,
            torch.Tensor.item: lambda given: self._read(given).item(),
            torch.Tensor.to: self._to,
            functional.interpolate: self._interpolate,
            functional.scaled_dot_product_attention: self._attend,
        }

    def place(self, network: Any, dtype: torch.dtype = torch.float16, device: torch.device = CUDA) -> Any:
        """Return the same network with weights on this GPU, or with zeros off it."""
        for module in network.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(self._placed(weight, dtype, device), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self._placed(buffer, dtype, device)
        return network

    def _placed(self, weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        options = {"dtype": dtype if weight.is_floating_point() else weight.dtype, "device": device}
        if device != CUDA:
            return torch.zeros(weight.shape, **options)
        with self._fake:
            return torch.empty_strided(weight.shape, weight.stride(), **options)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = tree_leaves((args, kwargs))
        if any(isinstance(each, FakeTensor) for each in given):
            if func in self._own:
                return self._own[func](*args, **kwargs)
        elif func is torch.Tensor.pin_memory or kwargs.pop("pin_memory", False):
            self._pinned.append(args[0].clone() if func is torch.Tensor.pin_memory else func(*args, **kwargs))
            return self._pinned[-1]
        elif func is torch.Tensor.to and _names_gpu(given):
            return self._from_host(*args, **kwargs)
        elif func is torch.tensor and _names_gpu(given):
            return self._from_host(func(*args, **kwargs | {"device": "cpu"}), CUDA)
        elif not _names_gpu(given):
            return func(*args, **kwargs)
        with self._fake, _Kernels():
            return func(*args, **kwargs)

    def _from_host(self, here: torch.Tensor, *how: Any, non_blocking: bool = False, **named: Any) -> torch.Tensor:
        queued = non_blocking and (here.nbytes <= _SMALL or self._is_pinned(here))
        if not queued:
            self.waits.append("a copy to the device")
        dtypes = [each.dtype if isinstance(each, torch.Tensor) else each for each in (*how, *named.values())]
        dtype = next((each for each in dtypes if isinstance(each, torch.dtype)), here.dtype)
        with self._fake:
            return torch.empty_strided(here.shape, here.stride(), dtype=dtype, device=CUDA)

    def _is_pinned(self, here: torch.Tensor) -> bool:
        """Return True for a pinned tensor, and for a part of one."""
        memory = here.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == memory for each in self._pinned)

    def _read(self, given: torch.Tensor) -> torch.Tensor:
        self.waits.append("a look at the device")
        return torch.ones(given.shape, dtype=given.dtype)

    def _to(self, given: Any, *how: Any, **named: Any) -> torch.Tensor:
        if not isinstance(given, FakeTensor):  # to where another tensor is
            return self._from_host(given, *how, **named)
        target = next((each for each in (*how, named.get("device")) if isinstance(each, str | torch.device)), CUDA)
        if torch.device(target).type == "cpu":
            return self._read(given)
        with self._fake:
            return given.to(*how, **named)

    def _contiguous(self, given: Any, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        with self._fake:
            whole = given.is_contiguous(memory_format=memory_format)
            return given if whole else torch.ops.aten.clone(given, memory_format=memory_format)

    def _copy(self, target: torch.Tensor, source: Any, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(target, FakeTensor):
            with self._fake:
                return torch.ops.aten.copy_(target, source)
        if not (non_blocking and self._is_pinned(target)):
            self.waits.append("a copy from the device")
        return target

    def _item(self, given: Any, index: Any) -> torch.Tensor:
        index = [self._plain(each) for each in (index if isinstance(index, tuple) else (index,))]
        named = sum(each is not None and each is not Ellipsis for each in index)
        dim, places = 0, []
        with self._fake:
            for each in index:
                if each is Ellipsis:
                    dim += given.dim() - named
                elif each is None:
                    given, dim = given.unsqueeze(dim), dim + 1
                elif isinstance(each, int):
                    given = given.select(dim, each)
                elif isinstance(each, slice):
                    given = torch.ops.aten.slice(given, dim, each.start, each.stop, each.step or 1)
                    dim += 1
                else:
                    places += [None] * (dim - len(places)) + [each]
                    dim += 1
            return torch.ops.aten.index(given, places) if places else given

    def _plain(self, index: Any) -> Any:
        """Return a number of the host for a tensor of one element, else a tensor on the device."""
        if isinstance(index, torch.Tensor) and index.dim() == 0:
            return int(self._read(index) if isinstance(index, FakeTensor) else index)
        if isinstance(index, list) or (isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor)):
            return self._from_host(torch.as_tensor(index))
        return index

    def _set_item(self, given: Any, index: Any, value: Any) -> None:
        part = self._item(given, index)
        with self._fake:
            torch.ops.aten.copy_(part, value) if isinstance(value, torch.Tensor) else torch.ops.aten.fill_(part, value)

    def _interpolate(self, given: Any, size: Any = None, scale_factor: Any = None, **how: Any) -> Any:
        assert how.get("mode", "nearest") == "nearest"
        size = size or [int(side * scale_factor) for side in given.shape[2:]]
        last = given.is_contiguous(memory_format=torch.channels_last) and not given.is_contiguous()
        form = torch.channels_last if last else torch.contiguous_format
        with self._fake:
            return torch.empty((*given.shape[:2], *size), dtype=given.dtype, device=CUDA, memory_format=form)

    def _attend(self, query: Any, key: Any, value: Any, attn_mask: Any = None, **named: Any) -> torch.Tensor:
        """Choose the kernel that CUDA has for it, except the one that keeps every product in memory."""
        batch, heads, _, channels = query.shape
        if max(batch, heads) > MOST:
            raise RuntimeError(f"CUDA error: invalid configuration argument, {batch} batches of {heads} heads")
        if any(each.stride(-1) != 1 for each in (query, key, value)):
            raise RuntimeError("the channels of a head lie apart, which no kernel but the slowest takes")
        self.attended.add((query.shape, torch.backends.cuda.cudnn_sdp_enabled()))
        causal = named.get("is_causal", False)
        with self._fake, _Kernels():
            if attn_mask is None and channels <= 256:  # what flash attention takes
                return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[0]
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            return efficient(query, key, value, attn_mask, False, 0.0, causal)[0]


def _names_gpu(given: list[Any]) -> bool:
    return any(isinstance(each, str | torch.device) and str(each).startswith("cuda") for each in given)
