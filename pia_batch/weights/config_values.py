"""Values of the settings in a model's configs: what no library could build, or what would fail every row, is refused.

Names and shapes of tensors do not show these settings.

Sources: diffusers 0.42.1 `models`; huggingface/transformers `CLIPTextConfig`, `activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pia_batch.errors import ConfigError
from pia_batch.weights import networks


@dataclass(frozen=True, slots=True)
class Rule:
    """Values that a setting may have.

    Attributes:
        expected: Description of these values, for messages.
        accepts: Function that returns True for such a value, given the whole config.
        nullable: True if the setting may be null. A setting that is absent has the library's default.
    """

    expected: str
    accepts: Callable[[Any, Mapping[str, Any]], bool]
    nullable: bool = False


def check(name: str, settings: Mapping[str, Any], path: Path) -> None:
    """Check the settings of one config.

    Args:
        name: Name of the part: `unet`, `vae`, `text_encoder` or `motion_adapter`.
        settings: Content of the config.
        path: Path of the config, for messages.

    Raises:
        ConfigError: A setting has a value that cannot be used; the message names it and what it must be.
    """
    held = networks.text_settings(dict(settings)) if name == "text_encoder" else settings
    for key, rule in _RULES[name].items():
        value = held.get(key)
        if key not in held or (value is None and rule.nullable):
            continue
        if value is None or not rule.accepts(value, held):
            raise ConfigError(
                f"{path}: invalid {key} (got {value!r}, expected {rule.expected}); correct it, or fetch the file again"
            )


def is_number(value: Any) -> bool:
    """Return True for a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Return True for a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _channels(settings: Mapping[str, Any]) -> list[Any]:
    found = settings.get("block_out_channels")
    return found if isinstance(found, list) else []


def one_of(*values: str) -> Rule:
    """Return the rule for these texts."""
    return Rule(f"one of {', '.join(values)}", lambda value, _: value in values)


def _heads(width: str) -> Rule:
    def accepts(value: Any, settings: Mapping[str, Any]) -> bool:
        whole = settings.get(width)
        return is_count(value) and (not is_count(whole) or whole % value == 0)

    return Rule(f"a divisor of {width}", accepts)


_ACTIVATION = one_of("silu", "swish", "mish", "gelu", "relu")
POSITIVE = Rule("a number above 0", lambda value, _: is_number(value) and value > 0)
_FLOAT = Rule(
    "a number above 0 with a decimal point, such as 1.0",  # transformers refuses 1 here
    lambda value, _: isinstance(value, float) and is_number(value) and value > 0,
)
_FRACTION = Rule("a number from 0 to 1", lambda value, _: is_number(value) and 0 <= value <= 1)
COUNT = Rule("a whole number above 0", lambda value, _: is_count(value))
WHOLE = Rule("a whole number", lambda value, _: isinstance(value, int) and not isinstance(value, bool))
_TOKEN = Rule("null or a whole number", WHOLE.accepts, nullable=True)
YES_OR_NO = Rule("true or false", lambda value, _: isinstance(value, bool))
_GROUPS = Rule(
    "a divisor of all block_out_channels",
    lambda value, settings: (
        is_count(value) and all(is_count(each) and each % value == 0 for each in _channels(settings))
    ),
)
_NONE = Rule("null, as for Stable Diffusion 1.5", lambda *_: False, nullable=True)

_RULES: dict[str, dict[str, Rule]] = {
    "unet": {
        "act_fn": _ACTIVATION,
        "conv_in_kernel": COUNT,
        "conv_out_kernel": COUNT,
        "downsample_padding": WHOLE,
        "dropout": _FRACTION,
        "mid_block_scale_factor": POSITIVE,
        "norm_eps": POSITIVE,
        "norm_num_groups": _GROUPS,
        "num_attention_heads": Rule(
            "null, as attention_head_dim has their number",
            lambda _, settings: settings.get("_class_name") == "UNetMotionModel",
            nullable=True,
        ),
        "only_cross_attention": Rule("false", lambda value, _: value is not None),
        "resnet_time_scale_shift": one_of("default"),
        "reverse_transformer_layers_per_block": Rule(
            "null or a list", lambda value, _: isinstance(value, list), nullable=True
        ),
        "time_embedding_type": one_of("positional"),
    },
    "vae": {
        "act_fn": _ACTIVATION,
        "norm_num_groups": _GROUPS,
        "sample_size": Rule(
            "a whole number above 0, or a list of these",
            lambda value, _: all(map(is_count, value)) if isinstance(value, list) and value else is_count(value),
        ),
        "scaling_factor": POSITIVE,
        "shift_factor": _NONE,
        "latents_mean": _NONE,
        "latents_std": _NONE,
        "force_upcast": YES_OR_NO,
    },
    "text_encoder": {
        "attention_dropout": _FRACTION,
        "hidden_act": one_of("quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"),
        "initializer_factor": _FLOAT,
        "initializer_range": _FLOAT,
        "layer_norm_eps": _FLOAT,
        "num_attention_heads": _heads("hidden_size"),
        "projection_dim": COUNT,
        "bos_token_id": _TOKEN,
        "eos_token_id": _TOKEN,
        "pad_token_id": _TOKEN,
    },
    "motion_adapter": {
        "motion_norm_num_groups": _GROUPS,
    },
}
"""Rules by part and setting."""
