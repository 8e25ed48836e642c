"""Presets: names for sets of config keys. What the config writes itself wins over a preset's keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel

from pia_batch.config.arithmetic import NEGATIVE_PROMPT
from pia_batch.config.layers import merge

Preset = Literal["paper", "per_frame_vae", "bf16_vae", "paper_negative_prompt"]

PRESETS: tuple[Preset, ...] = get_args(Preset)

_PER_FRAME_VAE = {"model": {"vae_decode": "per_frame"}}
_BF16_VAE = {"model": {"vae_dtype": "bfloat16"}}
_NEGATIVE_PROMPT = {"defaults": {"negative_prompt": NEGATIVE_PROMPT["original"]}}
_SCRIPT = {
    "model": {"arithmetic": "original", "scheduler": {"name": "ddim"}},
    "defaults": {
        "num_frames": 16,
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
        "size": "auto",
        "long_side": 512,
        "fps": 8,
        "format": "gif",
    },
}
"""Source: open-mmlab/PIA `inference.py`, `example/config/base.yaml` and `animatediff/utils/util.py`."""

_LAYERS: dict[Preset, tuple[dict[str, Any], ...]] = {
    "paper": (_SCRIPT, _PER_FRAME_VAE, _BF16_VAE, _NEGATIVE_PROMPT),
    "per_frame_vae": (_PER_FRAME_VAE,),
    "bf16_vae": (_BF16_VAE,),
    "paper_negative_prompt": (_NEGATIVE_PROMPT,),
}


def as_names(value: Any) -> Any:  # whatever was written
    """Return one name as a sequence of one; anything else is for pydantic to check."""
    return (value,) if isinstance(value, str) else value


def under(data: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a config on top of those of its presets; unknown presets are left to pydantic.

    Args:
        data: Content of a config. Sections that are already objects count with the keys that were set.
    """
    names = as_names(data.get("preset"))
    known = [name for name in names if name in PRESETS] if isinstance(names, Sequence) else []
    layers = [layer for name in known for layer in _LAYERS[name]]
    below: dict[str, Any] = {}
    for layer in layers:
        below = merge(below, layer)
    written = {
        key: value.model_dump(exclude_unset=True) if key in below and isinstance(value, BaseModel) else value
        for key, value in data.items()
    }
    return merge(below, written)
