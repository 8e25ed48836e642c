"""Device checks: GPUs as torch sees them, for what the config wants of them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from pia_batch.config import ModelConfig, PlacementConfig
from pia_batch.driver.preflight.finding import Finding, State
from pia_batch.errors import printable
from pia_batch.planning.child_python import child_environment, module_command
from pia_batch.weights.identity import resolved_dtype

AMPERE = 8
"""Major compute capability from which NVIDIA's GPUs compute in bfloat16."""

_PROBE_S = 300.0
"""Seconds that torch has to import and to try every device."""


def torch_facts() -> dict[str, Any]:
    """Return what `probes.torch_devices` prints: torch's version, its CUDA and its devices.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: Torch cannot be imported, or does not answer.
    """
    command = module_command("pia_batch.driver.probes.torch_devices")
    done = subprocess.run(  # noqa: S603 - ours
        command, env=child_environment(), capture_output=True, text=True, timeout=_PROBE_S, check=False
    )
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def check_devices(facts: dict[str, Any], place: PlacementConfig, models: dict[str, ModelConfig]) -> Iterator[Finding]:
    """Check the devices for what the config wants of them.

    Args:
        facts: Torch's version and devices as `torch_facts` returns them.
        place: Placement of the run.
        models: Models of the run by name.
    """
    torch = f"torch {facts['torch']}" + (f" for CUDA {facts['cuda']}" if facts["cuda"] else " without CUDA")
    driver = _nvidia_driver()
    for device in facts["devices"]:
        yield from _check_device(device, place, models, f"{torch}, driver {driver or 'unknown'}")
    if facts["devices"]:
        return
    if driver is not None:
        remedy = (
            f"install a torch for a CUDA that driver {driver} supports, or a newer driver; https://pytorch.org lists "
            "them"
        )
        state: State = "fail" if place.num_gpus else "warn"
        yield Finding(state, "devices", f"{torch} does not see the GPU of this machine", remedy)
    elif not place.num_gpus:
        yield Finding("ok", "devices", f"{torch}; no GPU, and placement.num_gpus asks for none")
    elif place.address == "local":
        message = f"no GPU, and placement.num_gpus is {place.num_gpus:g}"
        yield Finding(
            "fail", "devices", message, "set placement.num_gpus: 0, or name a cluster by placement.ray_address"
        )
    else:
        yield Finding("ok", "devices", f"{torch}; no GPU here: engines run on the cluster's")
    for name, model in models.items():
        if not place.num_gpus and resolved_dtype(model, on_gpu=False) != "float32":
            message = f"model {name!r} generates in {model.dtype} on a CPU, which is slow"
            yield Finding("warn", "devices", message, "set model.dtype: float32")


def _check_device(
    device: dict[str, Any], place: PlacementConfig, models: dict[str, ModelConfig], software: str
) -> Iterator[Finding]:
    shown = f"{device['name']}, {device['memory'] / 2**30:.0f} GiB, {software}"
    dtypes = {resolved_dtype(model, on_gpu=True) for model in models.values()}
    errors = [text for text in device["errors"] if text.partition(":")[0] in dtypes]
    if errors:
        remedy = "remove the GPU, restart the machine or repair its drivers; then run `doctor` again"
        yield Finding("fail", "devices", f"{shown}: {printable('; '.join(errors))}", remedy)
    elif not place.num_gpus:
        yield Finding("warn", "devices", f"{shown}: not used", "set placement.num_gpus: 1")
    elif "bfloat16" in dtypes and device["capability"] < AMPERE:
        message = f"{shown}: emulates bfloat16, which is slow"
        yield Finding("warn", "devices", message, "set model.dtype: float16")
    else:
        yield Finding("ok", "devices", f"{shown}: correct in {', '.join(sorted(dtypes))}")


def _nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver, or None if there is no driver or no device."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603 - ours
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
