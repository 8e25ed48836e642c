"""Offloading: saves device memory at the cost of time; networks wait on the CPU, and the VAE works in parts."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

SMALL_DEVICE_BYTES = 10 * 2**30
"""Size below which a GPU counts as small: 3 GB of weights in half precision leave too little for a 512 x 512 clip."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Savings:
    """Memory savings on a device, as `ModelConfig.memory` requests them.

    Attributes:
        offload: True if networks wait on the CPU until they are used.
        slices: True if the VAE processes one frame at a time. Does not change pixels.
        tiles: True if the VAE processes one tile of a frame at a time, of its own sample size. Frames no larger than a
            tile do not change; in others the seams are blended, so that pixels differ a little.
    """

    offload: bool
    slices: bool
    tiles: bool

    def apply_to_vae(self, vae: Any) -> None:
        """Enable slicing and tiling of an `AutoencoderKL`, as requested."""
        if self.slices:
            vae.enable_slicing()
        if self.tiles:
            vae.enable_tiling()


def total_memory(device: torch.device) -> int:
    """Return the size of the GPU's memory, or of this machine's main memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def savings(
    memory: Literal["auto", "max_speed", "low"],
    device: torch.device,
    total: Callable[[torch.device], int] = total_memory,
) -> Savings:
    """Return the memory savings for this device; `total` returns the size of its memory in bytes."""
    small = device.type == "cuda" and total(device) < SMALL_DEVICE_BYTES
    low = memory == "low" or (memory == "auto" and small)
    return Savings(offload=low and device.type != "cpu", slices=low, tiles=memory == "low")


def _move(network: Any, device: torch.device) -> None:
    network.to(device)


class DeviceSlot:
    """Slot on a device for one network at a time. Placing a network moves the previous one back to the CPU."""

    def __init__(self, move: Callable[[Any, torch.device], None] = _move) -> None:
        self._move = move
        self._occupant: weakref.ref[Any] | None = None

    def place(self, network: Any, device: torch.device) -> None:
        """Move a network to the device, unless it is there already."""
        if self._occupant is not None and self._occupant() is network:
            return
        self.clear()
        self._occupant = weakref.ref(network)
        try:
            self._move(network, device)
        except BaseException:
            self.clear()  # a part of it may be on the device
            raise

    def clear(self) -> None:
        """Move the network that is on the device, if any, back to the CPU."""
        occupant = None if self._occupant is None else self._occupant()
        if occupant is not None:
            self._move(occupant, _CPU)
        self._occupant = None


class OnDemand:
    """Network that waits on the CPU; using it moves it to `device`, until another network is used.

    Callers need not know: `device` is the device for inputs, and all other attributes are the network's own.
    """

    def __init__(self, network: Any, device: torch.device, slot: DeviceSlot) -> None:
        self.network = network
        self.device = device
        self._slot = slot

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def on_device(self) -> Any:
        """Return the network itself, on the device until another network is placed there."""
        self._slot.place(self.network, self.device)
        return self.network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network on the device."""
        return self.on_device()(*args, **kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Call the VAE's `encode` on the device."""
        return self.on_device().encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Call the VAE's `decode` on the device."""
        return self.on_device().decode(*args, **kwargs)

    def float(self) -> OnDemand:
        """Convert the network to float32 in place, as `torch.nn.Module.float` does."""
        self.network.float()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDemand:
        return OnDemand(copy.deepcopy(self.network, memo), self.device, self._slot)
