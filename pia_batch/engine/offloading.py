"""Less memory on the device, at the cost of time: networks that only visit it, and a VAE that works in small steps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

SMALL_DEVICE_BYTES = 10 * 2**30
"""A GPU with less than this is `small`: the model's 3 GB in half precision leave too little for a clip of 512 x 512."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Savings:
    """What `ModelConfig.memory` means on a device.

    Attributes:
        offload: networks wait on the CPU until they are used.
        slices: the VAE takes one frame at a time. Changes no pixel.
        tiles: the VAE takes one part of a frame at a time, of its own sample size. Frames no larger stay as they are;
            in others the seams are blended, so that they differ a little.
    """

    offload: bool
    slices: bool
    tiles: bool

    def apply_to_vae(self, vae: Any) -> None:
        """Set up an `AutoencoderKL`."""
        if self.slices:
            vae.enable_slicing()
        if self.tiles:
            vae.enable_tiling()


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of this machine's main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def savings(
    memory: Literal["auto", "max_speed", "low"],
    device: torch.device,
    total: Callable[[torch.device], int] = total_memory,
) -> Savings:
    """How to save memory on this device; `total` tells how much it has."""
    small = device.type == "cuda" and total(device) < SMALL_DEVICE_BYTES
    low = memory == "low" or (memory == "auto" and small)
    return Savings(offload=low and device.type != "cpu", slices=low, tiles=memory == "low")


def _move(network: Any, device: torch.device) -> None:
    network.to(device)


class Berth:
    """Room on a device for one network at a time. Who comes sends whom it finds back to the CPU."""

    def __init__(self, move: Callable[[Any, torch.device], None] = _move) -> None:
        self._move = move
        self._occupant: weakref.ref[Any] | None = None

    def admit(self, network: Any, device: torch.device) -> None:
        """Bring a network onto the device, unless it is there."""
        if self._occupant is not None and self._occupant() is network:
            return
        self.vacate()
        self._occupant = weakref.ref(network)
        try:
            self._move(network, device)
        except BaseException:
            self.vacate()  # half of it may have arrived
            raise

    def vacate(self) -> None:
        """Send the network that is there, if any, back to the CPU."""
        occupant = None if self._occupant is None else self._occupant()
        if occupant is not None:
            self._move(occupant, _CPU)
        self._occupant = None


class OnDemand:
    """A network that waits on the CPU, and is on `device` from when it is used until another one is.

    To its users it seems to be there always: `device` says where to send inputs, everything else is the network's own.
    """

    def __init__(self, network: Any, device: torch.device, berth: Berth) -> None:
        self.network = network
        self.device = device
        self._berth = berth

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def arrived(self) -> Any:
        """The network itself, on the device until another one is."""
        self._berth.admit(self.network, self.device)
        return self.network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own call, on the device."""
        return self.arrived()(*args, **kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """The VAE's `encode`, on the device."""
        return self.arrived().encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The VAE's `decode`, on the device."""
        return self.arrived().decode(*args, **kwargs)

    def float(self) -> OnDemand:
        """The same network in float32, in place, as `torch.nn.Module.float`."""
        self.network.float()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDemand:
        return OnDemand(copy.deepcopy(self.network, memo), self.device, self._berth)
