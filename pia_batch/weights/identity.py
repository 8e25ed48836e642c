"""Identity of an engine: a hash of everything that decides the pixels apart from a request."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from pia_batch.config import ModelConfig
from pia_batch.config.speed_presets import PRESETS
from pia_batch.weights.resolve import Weights

ENGINE_VERSION = "1"
"""Part of every engine id. Raised when the engine draws other pixels from the same weights and settings."""


def engine_id(model: ModelConfig, weights: Weights, dtype: str) -> str:
    """What draws the pixels, as 32 hexadecimal digits: weights, what is laid over them, scheduler, dtype, version.

    A path, a URI and the model's name are no part of it: the same weights elsewhere have the same id. Of
    `model.memory` only `low` is, as its tiles may change pixels. Of `model.speed`, what a preset other than `exact`
    leaves out.

    Args:
        model: the config that `weights` were resolved from.
        weights: as `resolve` returned them.
        dtype: as `resolved_dtype` returned it.
    """
    identity: dict[str, Any] = {
        "version": ENGINE_VERSION,
        "weights": {name: part.identity() for name, part in weights.components.items()},
        "scheduler": model.scheduler.model_dump(mode="json"),
        "dtype": dtype,
    }
    if weights.loras:
        pairs = zip(model.loras, weights.loras, strict=True)
        identity["loras"] = [{"weights": part.identity(), "scale": entry.scale} for entry, part in pairs]
        identity["fuse_loras"] = model.fuse_loras
    if weights.textual_inversions:
        words = zip(model.textual_inversions, weights.textual_inversions, strict=True)
        identity["textual_inversions"] = [{"weights": part.identity(), "token": entry.token} for entry, part in words]
    if weights.ip_adapter is not None and weights.image_encoder is not None:
        identity["ip_adapter"] = [weights.ip_adapter.identity(), weights.image_encoder.identity()]
    if model.freeu is not None:
        identity["freeu"] = model.freeu.model_dump(mode="json")
    if model.memory == "low":
        identity["memory"] = "low"
    if model.speed != "exact":
        identity["shortcuts"] = dataclasses.asdict(PRESETS[model.speed])
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def resolved_dtype(model: ModelConfig, *, on_gpu: bool) -> str:
    """`float32`, `float16` or `bfloat16`: what `auto` means on this device."""
    if model.dtype != "auto":
        return model.dtype
    return "float16" if on_gpu else "float32"
