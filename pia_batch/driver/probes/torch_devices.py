"""Torch probe: prints torch's version, its CUDA, and every device with the data types that it computes wrongly.

A process of its own runs it, because the driver never imports torch.
"""

from __future__ import annotations

import json
from typing import Any

import torch

_DTYPES = ("float32", "float16", "bfloat16")


def facts() -> dict[str, Any]:
    """Return `torch`, `cuda` and `devices`; of each device `name`, `capability`, `memory` (bytes) and `errors`."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": properties.major,
                "memory": properties.total_memory,
                "errors": _errors(index),
            }
        )
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": devices}


def _errors(index: int) -> list[str]:
    """Return `dtype: problem` for each data type in which the product of two matrices of ones is wrong."""
    errors = []
    for name in _DTYPES:
        try:
            ones = torch.ones(64, 64, device=index, dtype=getattr(torch, name))
            if (ones @ ones).sum().item() != 64**3:
                errors.append(f"{name}: a matrix product is wrong")
        except RuntimeError as err:
            errors.append(f"{name}: {err}")
    return errors


if __name__ == "__main__":
    print(json.dumps(facts()))  # noqa: T201 - its output
