"""Limits of models that only their files know: frames of motion modules, fixed scales of LoRAs, factors of upscalers.

The plan reads them from headers, so that rows are checked without loading a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pia_batch.config.contexts import POSITIONS


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Limits of one model.

    Attributes:
        positions: Number of frames that the motion modules know.
        fixed_loras: Names of the LoRAs that are merged into the weights, so that rows cannot change their scales.
        upscale: Factor of the config's upscaler; that of a row is at most this.
    """

    positions: int = POSITIONS
    fixed_loras: frozenset[str] = frozenset()
    upscale: int = 8


Limits = Mapping[str, ModelLimits]
"""Limits by the model's name; a model without an entry has the limits of PIA's published adapter and no fixed LoRA."""

NO_LIMITS: Limits = {}
