"""Engine identity: a hash of everything that decides the pixels, apart from the request."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pia_batch.config import ModelConfig
from pia_batch.config.speed_presets import PRESETS
from pia_batch.schema.identity import decisive
from pia_batch.weights.resolve import Weights

ENGINE_VERSION = "1"
"""Part of every engine id. Raise it only if the engine generates other pixels from the same weights and settings."""


def engine_id(model: ModelConfig, weights: Weights, dtype: str) -> str:
    """Return the identity of what generates the pixels, 32 hexadecimal digits: weights, options, dtype, engine version.

    Paths, URIs and the model's name are not part of it: the same weights elsewhere have the same id. Options at their
    neutral value are left out, so that a release that adds one changes no id. Of `model.memory` only `low` counts, as
    its tiles may change pixels. Of `model.speed`, the work that a preset other than `exact` leaves out counts.

    Args:
        model: Config that `weights` were resolved from.
        weights: Result of `resolve`.
        dtype: Result of `resolved_dtype`.
    """
    identity: dict[str, Any] = {
        "version": ENGINE_VERSION,
        "weights": {name: part.identity() for name, part in weights.components.items()},
        "dtype": dtype,
    }
    identity |= decisive(model)
    if weights.loras:
        identity["loras"] = [
            {"weights": part.identity()} | decisive(entry)
            for entry, part in zip(model.loras, weights.loras, strict=True)
        ]
        if model.fuse_loras:
            identity["fuse_loras"] = True
    if weights.textual_inversions:
        identity["textual_inversions"] = [
            {"weights": part.identity()} | decisive(entry)
            for entry, part in zip(model.textual_inversions, weights.textual_inversions, strict=True)
        ]
    if model.ip_adapter is not None and weights.ip_adapter is not None and weights.image_encoder is not None:
        parts = {"weights": weights.ip_adapter.identity(), "image_encoder": weights.image_encoder.identity()}
        identity["ip_adapter"] = parts | decisive(model.ip_adapter)
    if model.memory == "low":
        identity["memory"] = "low"
    if model.speed != "exact":
        preset = PRESETS[model.speed]
        identity["speed"] = {"reach": preset.reach, "layers": preset.layers}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def resolved_dtype(model: ModelConfig, *, on_gpu: bool) -> str:
    """Return the dtype that `model.dtype` means on this device: `float32`, `float16` or `bfloat16`."""
    if model.dtype != "auto":
        return model.dtype
    return "float16" if on_gpu else "float32"
