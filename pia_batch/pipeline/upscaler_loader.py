"""Interface of the upscaler that a worker holds, and the loader that makes it. The driver imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pia_batch.config import RunConfig


class Upscaler(Protocol):
    """The part of `pia_batch.engine.upscaling.Upscaler` that finishing uses."""

    def __call__(self, picture: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
        """Return a picture, uint8, shape (H, W, 3), `factor` times as wide and as high."""


LoadUpscaler = Callable[[RunConfig, str], Upscaler | None]
"""Function that gives a worker its upscaler on a device; None if the config names none."""


def load_upscaler(config: RunConfig, device: str) -> Upscaler | None:
    """Return the upscaler that the config names, on the device of the engines; None if it names none."""
    if config.upscale.model is None:
        return None
    from pia_batch.engine.upscaling import Upscaler as Network

    return Network.load(config.upscale, device, config.upscale.resolved_dtype(on_gpu=config.placement.num_gpus > 0))
