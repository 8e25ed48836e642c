"""Record that peft saves with an adapter: the kinds that are supported, and the scale of each layer. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pia_batch.errors import ConfigError, message_of

PEFT_CONFIG = "adapter_config.json"
"""Name of the file in which peft saves alpha and rank, next to the weights."""

_IN_METADATA = "lora_adapter_metadata"
"""Name of the record in a safetensors file. Source: diffusers 0.42.1 `LORA_ADAPTER_METADATA_KEY`."""

_PREFIX_OF_NETWORK = re.compile(r"^(unet|text_encoder)\.")

_PEFT_TYPES = {"LORA", "LOHA", "LOKR"}

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of values of `init_lora_weights` with which peft takes the first product out of the base's weights.

Source: huggingface/peft 0.21.2 `tuners/lora/layer.py`.
"""

_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Settings of variants of LoRA, whose delta is not the product of two matrices for all tokens."""

_KNOWN = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
        "velora_config",
    ]
)
"""Settings of `LoraConfig` that are in the tensors and the scale, or change only the training. Source: peft 0.21.2."""

_KNOWN_OF_LYCORIS = frozenset(
    [
        "alpha",
        "decompose_both",
        "decompose_factor",
        "init_weights",
        "module_dropout",
        "rank_dropout",
        "rank_dropout_scale",
        "use_effective_conv2d",
    ]
)
"""The same of `LoHaConfig` and `LoKrConfig`, apart from those that `LoraConfig` has, too."""


def check_header(record: Mapping[str, Any], where: str) -> None:
    """Check one network's part of a record in a file's metadata, which diffusers reads setting by setting.

    Raises:
        ConfigError: A reason of `check_peft`; or it has a setting of unknown effect that is neither null nor false.
    """
    check_peft(record, where)
    known = _KNOWN if _kind(record) == "LORA" else _KNOWN | _KNOWN_OF_LYCORIS
    unknown = next((key for key, value in record.items() if key not in known and value not in (None, False)), None)
    if unknown is not None:
        raise ConfigError(
            f"{where} has the setting {unknown!r}, whose effect is not known; save the adapter with an ordinary "
            "LoraConfig, or merge it into its base and set model.base to the result"
        )


def in_metadata(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    """Return the record that diffusers stores in a file's metadata, for all networks; None if there is none.

    Raises:
        ConfigError: It is no JSON object.
    """
    text = metadata.get(_IN_METADATA)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (RecursionError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {_IN_METADATA} in its header is no JSON object; save the file again without it")
    return found


def of_network(record: Mapping[str, Any] | None, network: str) -> dict[str, Any] | None:
    """Return the part of a record in metadata for one network, `unet` or `text_encoder`; None if there is none."""
    if record is None:
        return None
    prefix = f"{network}."
    found = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
    return found or (None if any(_PREFIX_OF_NETWORK.match(key) for key in record) else dict(record) or None)


def check_peft(config: Mapping[str, Any], where: str) -> None:
    """Check the record that peft saves with an adapter.

    Raises:
        ConfigError: It is of a kind that no engine applies, or not a record of peft.
    """
    kind = _kind(config)
    if kind not in _PEFT_TYPES:
        raise ConfigError(f"{where} is of peft type {kind}, which is not supported; supported are LORA, LOHA and LOKR")
    initial = str(config.get("init_lora_weights")).lower()
    if initial.startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{where} has init_lora_weights {initial!r}, with which peft also changed the base's weights; convert it "
            "to an ordinary LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion), or merge it "
            "into its base and set model.base to the result"
        )
    variant = next((key for key in _VARIANTS if config.get(key)), None)
    if variant is not None:
        raise ConfigError(
            f"{where} has {variant}, a variant of LoRA that no engine applies; merge it into its base and set "
            "model.base to the result"
        )
    try:
        _check_numbers(config)
    except (ArithmeticError, AttributeError, TypeError, ValueError, re.error) as err:
        raise ConfigError(f"{where} is not a valid record of peft: {message_of(err)}; save the adapter again") from err


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type", "LORA")).rpartition(".")[2].upper()  # some programs write `PeftType.LORA`


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Check every rank and every alpha, so that `scale_of` returns a finite number for each layer.

    Raises:
        ValueError: A rank is not positive, or an alpha not finite; or another exception of its conversion.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for pattern in (*ranks.keys(), *alphas.keys()):
        re.compile(pattern)
    for rank in (config.get("r", 1), *ranks.values()):
        if not 0 < float(rank) < math.inf:
            msg = f"a rank is {rank}"
            raise ValueError(msg)
    alpha = config.get("lora_alpha", config.get("alpha"))
    for each in (*([] if alpha is None else [alpha]), *alphas.values()):
        if not math.isfinite(float(each)):
            msg = f"an alpha is {each}"
            raise ValueError(msg)


def is_zero(config: Mapping[str, Any]) -> bool:
    """Return True if every alpha of a record is 0, with which its matrices change nothing; `check_peft` is first."""
    alpha = config.get("lora_alpha", config.get("alpha"))
    return alpha is not None and not any(map(float, (alpha, *(config.get("alpha_pattern") or {}).values())))


def scale_of(config: Mapping[str, Any], layer: str, rank: int | None) -> float:
    """Return the factor of a layer's delta by peft's record: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Args:
        config: Content of `adapter_config.json`.
        layer: Name of the layer, with dots, without `text_model.`.
        rank: Rank of the layer's matrices; None if it has none, then the record's rank counts.

    Source: huggingface/peft `utils/other.py` `get_pattern_key`, `tuners/lora/layer.py`, `tuners/lycoris_utils.py`.
    """
    alpha = config.get("lora_alpha", config.get("alpha"))
    rank = _by_pattern(config.get("rank_pattern"), layer, config.get("r", 1)) if rank is None else rank
    alpha = _by_pattern(config.get("alpha_pattern"), layer, rank if alpha is None else alpha)
    return float(alpha) / (math.sqrt(float(rank)) if config.get("use_rslora") else float(rank))


def _by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        # CLIP's layers are inside of `text_model` for most versions of transformers.
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (layer, f"text_model.{layer}")):
            return value
    return default
