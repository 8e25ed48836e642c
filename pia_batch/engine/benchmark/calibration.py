"""Calibration: peak performance of a device, measured with a few kernels and taken from its datasheet."""

from __future__ import annotations

import itertools
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

DATASHEET_TFLOPS = {
    r"\bH200$": 989.4,
    r"\bH100 PCIe\b": 756.0,
    r"\bH100 .*HBM3\b": 989.4,
    r"\bA100\b": 312.0,
    r"\bL40S\b": 362.05,
    r"\bL40\b": 181.05,
    r"\bL4\b": 121.0,
    r"\bA10G\b": 70.0,
    r"\bT4\b": 65.0,
    r"\bRTX 4090$": 165.2,
}
"""Dense float16 tensor performance with float32 sums, in TFLOP/s, by a pattern of the device's name.

The first matching pattern counts. Source: NVIDIA's datasheets of H200 SXM, H100 PCIe and SXM, A100, L40S, L40, L4 and
T4, and its Ada whitepaper for the RTX 4090, without sparsity; A10G from AWS's description of G5 instances. Other forms
of these chips (NVL, laptops, the 4090 D) run at other clocks, and are not listed.
"""

_REPEATS = 7

_STATE = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured performance of kernels on a device; medians. On a CPU the kernels' sizes are smaller.

    Attributes:
        matmul_tflops: Square matrix product in the benchmark's dtype, in 10**12 operations per second.
        copy_gbps: Copy within the device's memory, in 10**9 bytes per second, reads and writes counted.
        attention_tflops: Scaled dot products of the size of the UNet's finest level, in 10**12 operations per second.
        convolution_tflops: 3 x 3 convolutions of that level, channels last, in 10**12 operations per second.
        datasheet_tflops: Peak by the manufacturer, in 10**12 operations per second; None if `DATASHEET_TFLOPS` does not
            list the device.
    """

    matmul_tflops: float
    copy_gbps: float
    attention_tflops: float
    convolution_tflops: float
    datasheet_tflops: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values."""
        return asdict(self)


@torch.inference_mode()
def calibrate(device: torch.device, dtype: torch.dtype) -> Calibration:
    """Measure the kernels; takes some seconds."""
    large = device.type == "cuda"
    return Calibration(
        matmul_tflops=_matmul(device, dtype, 8192 if large else 1024) / 1e12,
        copy_gbps=_copy(device, 2**28 if large else 2**25) / 1e9,
        attention_tflops=_attention(device, dtype, *((32, 4096) if large else (2, 1024))) / 1e12,
        convolution_tflops=_convolution(device, dtype, 32 if large else 1) / 1e12,
        datasheet_tflops=datasheet_tflops(device_name(device)) if large else None,
    )


def _matmul(device: torch.device, dtype: torch.dtype, side: int) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(device, lambda: left @ right)


def _copy(device: torch.device, size: int) -> float:
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / seconds(device, lambda: target.copy_(source))


def _attention(device: torch.device, dtype: torch.dtype, batch: int, length: int) -> float:
    heads, channels = 8, 40
    query, key, value = (torch.randn(batch, heads, length, channels, device=device, dtype=dtype) for _ in range(3))
    taken = seconds(device, lambda: functional.scaled_dot_product_attention(query, key, value))
    return 4 * batch * heads * length**2 * channels / taken


def _convolution(device: torch.device, dtype: torch.dtype, batch: int) -> float:
    channels, side = 320, 64 if device.type == "cuda" else 32
    image = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    image, weight = (each.contiguous(memory_format=torch.channels_last) for each in (image, weight))
    taken = seconds(device, lambda: functional.conv2d(image, weight, padding=1))
    return 2 * batch * side**2 * 9 * channels**2 / taken


def seconds(device: torch.device, call: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """Return the median duration of several calls, in seconds, after one call that is not counted.

    On a GPU, use its events and queue the calls, so that the host's time to launch them counts only if the device waits
    for it.
    """
    call()
    synchronize(device)
    if device.type != "cuda":
        return statistics.median(_wall_seconds(call) for _ in range(repeats))
    marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
    synchronize(device)
    milliseconds = [float(begin.elapsed_time(end)) for begin, end in itertools.pairwise(marks)]
    return statistics.median(milliseconds) / 1000


def _wall_seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def datasheet_tflops(name: str) -> float | None:
    """Return the datasheet peak for a GPU's name, in TFLOP/s; None if `DATASHEET_TFLOPS` does not list it."""
    return next((tflops for pattern, tflops in DATASHEET_TFLOPS.items() if re.search(pattern, name)), None)


def state(device: torch.device) -> dict[str, str] | None:
    """Return the GPU's driver, clock in MHz, power in W and temperature in degrees Celsius, as from `nvidia-smi`.

    The values help to explain a slow GPU; nothing depends on them. None on a CPU, or if `nvidia-smi` is missing or
    fails.
    """
    if device.type != "cuda":
        return None
    identity = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    return query_nvidia_smi(["nvidia-smi", f"--id=GPU-{identity}"])


def query_nvidia_smi(command: list[str]) -> dict[str, str] | None:
    """Return the state of one GPU from `nvidia-smi`, or a program with its interface; None if the program fails."""
    query = [f"--query-gpu={','.join(_STATE.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*command, *query], capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    values = [each.strip() for each in done.stdout.strip().split(",")]
    return dict(zip(_STATE, values, strict=True)) if len(values) == len(_STATE) else None
