"""Record that peft saves with an adapter: the kinds that are supported, and the scale of each layer. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pia_batch.errors import ConfigError

PEFT_CONFIG = "adapter_config.json"
"""Name of the file in which peft saves alpha and rank, next to the weights."""

_PEFT_TYPES = {"LORA", "LOHA", "LOKR"}


def check_peft(config: Mapping[str, Any], where: str) -> None:
    """Check the record that peft saves with an adapter.

    Raises:
        ConfigError: It is of a kind that no engine applies, or not a record of peft.
    """
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind not in _PEFT_TYPES:
        raise ConfigError(f"{where} is of peft type {kind}, which is not supported; supported are LORA, LOHA and LOKR")
    try:
        scale_of(config, "layer", 1)
    except (ArithmeticError, TypeError, ValueError, re.error) as err:
        raise ConfigError(f"{where} is not a valid record of peft: {err}") from err


def scale_of(config: Mapping[str, Any], layer: str, rank: int | None) -> float:
    """Return the factor of a layer's delta by peft's record: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Args:
        config: Content of `adapter_config.json`.
        layer: Name of the layer, with dots.
        rank: Rank of the layer's matrices; None if it has none, then the record's rank counts.

    Source: huggingface/peft `utils/other.py` `get_pattern_key`, `tuners/lora/layer.py`, `tuners/lycoris_utils.py`.
    """
    alpha = config.get("lora_alpha", config.get("alpha"))
    rank = _by_pattern(config.get("rank_pattern"), layer, config.get("r", 1)) if rank is None else rank
    alpha = _by_pattern(config.get("alpha_pattern"), layer, rank if alpha is None else alpha)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
