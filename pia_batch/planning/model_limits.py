"""Limits of a config's models, from the headers of their files."""

from __future__ import annotations

from pia_batch.config import ModelConfig, RunConfig
from pia_batch.config.model_limits import ModelLimits
from pia_batch.weights import upscaler_files
from pia_batch.weights.resolve import resolve


def limits_of(config: RunConfig) -> dict[str, ModelLimits]:
    """Return the limits of every model by its name.

    Raises:
        ConfigError: A model or the upscaler cannot be found.
    """
    upscaler = upscaler_files.resolve(config.upscale)
    factor = ModelLimits().upscale if upscaler is None else upscaler.network.scale
    return {name: _limits(model, factor) for name, model in config.all_models.items()}


def _limits(model: ModelConfig, upscale: int) -> ModelLimits:
    found = resolve(model)
    pairs = zip(model.loras, found.are_adjustable, strict=True)
    fixed = frozenset(entry.label for entry, adjustable in pairs if model.fuse_loras or not adjustable)
    return ModelLimits(found.positions, fixed, upscale)
