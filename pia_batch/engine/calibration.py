"""What a device can do at most, measured by three kernels, and what its datasheet says."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

DATASHEET_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "T4": 65.0,
}
"""Dense float16 tensor operations, 10**12 a second, by what a device's name holds; the first that fits counts.

Source: NVIDIA's datasheets of H200 SXM, H100 PCIe and SXM, A100, L40S, L4 and T4, sparsity not counted; A10G from
AWS's description of G5 instances.
"""

_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Calibration:
    """What kernels reach on a device, medians.

    Attributes:
        matmul_tflops: of a square product in the benchmark's dtype, 10**12 operations a second.
        copy_gbps: of a copy within the device's memory, 10**9 bytes a second, read and written ones counted.
        attention_tflops: of scaled dot products as at the UNet's finest level, 10**12 operations a second.
        datasheet_tflops: what the maker says; None where `DATASHEET_TFLOPS` does not know the device.
    """

    matmul_tflops: float
    copy_gbps: float
    attention_tflops: float
    datasheet_tflops: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def calibrate(device: torch.device, dtype: torch.dtype) -> Calibration:
    """Run the three kernels: below a second on a GPU, some seconds on a CPU."""
    large = device.type == "cuda"
    side = 8192 if large else 1024
    batch, length = (32, 4096) if large else (2, 1024)
    heads, channels = 8, 40
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 if large else 2**25, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    query = torch.randn(batch, heads, length, channels, device=device, dtype=dtype)
    return Calibration(
        matmul_tflops=2 * side**3 / seconds(device, lambda: left @ right) / 1e12,
        copy_gbps=2 * len(source) / seconds(device, lambda: target.copy_(source)) / 1e9,
        attention_tflops=4
        * (batch * heads * length**2 * channels)
        / seconds(device, lambda: functional.scaled_dot_product_attention(query, query, query))
        / 1e12,
        datasheet_tflops=datasheet_tflops(device_name(device)) if large else None,
    )


def seconds(device: torch.device, call: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """The median of several calls, after one that is not counted; each waits for the device."""
    call()
    taken = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or how many threads compute on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def datasheet_tflops(name: str) -> float | None:
    """Of a GPU's name, as in `DATASHEET_TFLOPS`."""
    return next((tflops for part, tflops in DATASHEET_TFLOPS.items() if part in name), None)
