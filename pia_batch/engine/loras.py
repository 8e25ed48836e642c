"""LoRAs: reads files of three layouts and applies them to the layers that they name.

diffusers and PEFT apply the LoRAs, so that a clip equals that of the stock pipeline with the same LoRA. This module
reads the files: diffusers drops tensors that do not fit, with a warning; here a file with such a tensor is refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    fuse_text_encoder_lora,
    set_adapters_for_text_encoder,
)
from diffusers.utils import recurse_remove_peft_layers
from torch import nn

from pia_batch.config import LoraConfig
from pia_batch.errors import ConfigError
from pia_batch.weights.components import Component

UNET, TEXT_ENCODER = "unet", "text_encoder"

_PREFIXES = {
    "unet.": UNET,
    "text_encoder.": TEXT_ENCODER,
    "lora_unet_": UNET,
    "lora_te_": TEXT_ENCODER,
    "lora_te1_": TEXT_ENCODER,
}
"""Prefixes of keys: those of diffusers and PEFT, then those of kohya."""

_ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "alpha": "alpha",
}
"""Suffixes of keys: those of PEFT, diffusers and kohya."""

_OLD_NAMES = (
    (r"\.processor\.to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.lora_linear_layer\.", ".lora."),
)
"""Patterns of names in diffusers before 0.22, each with the current name."""

_CALLED_BY_KEYWORD = re.compile(r"motion_modules\.\d+\.proj_(in|out)")
"""Layers that diffusers 0.42.1 calls as `layer(input=...)`, which PEFT's layer wrapper does not support."""


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA, read from its file and sorted by the networks that it changes.

    Attributes:
        part: The file.
        scale: Factor with which it is applied.
        tensors: Tensors by network, then by layer name in the file, then by role: `down` (rank, in, ...), `up` (out,
            rank, ...) and optionally `alpha` (scalar; the product of the matrices is multiplied by alpha / rank).
        metadata: Metadata that PEFT stored in the file; None in most files.
    """

    part: Component
    scale: float
    tensors: dict[str, dict[str, dict[str, torch.Tensor]]]
    metadata: dict[str, Any] | None

    def touches(self, network: str, layers: str = "") -> bool:
        """Return True if it changes a layer of this network whose name contains `layers`."""
        return any(layers in name for name in self.tensors.get(network, {}))


def read(part: Component, config: LoraConfig) -> Lora:
    """Read the LoRA in a safetensors file.

    Raises:
        ConfigError: The file is broken, holds no LoRA, or one of an unsupported kind or for other networks.
    """
    path = part.path
    try:
        with safetensors.safe_open(path, "pt") as file:
            loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            recorded = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        metadata = None if recorded is None else dict(json.loads(recorded))
    except (OSError, TypeError, ValueError, safetensors.SafetensorError) as err:
        raise ConfigError(f"cannot read {path}: {err}") from err
    tensors: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in loaded.items():
        network, layer, role = _parse(key, path)
        tensors.setdefault(network, {}).setdefault(layer, {})[role] = tensor
    if not tensors:
        raise ConfigError(f"{path} holds no LoRA")
    return Lora(part, config.scale, tensors, metadata)


def apply(loras: Sequence[Lora], network: str, target: Any, *, fuse: bool) -> None:
    """Apply all LoRAs that change `network`, in place and in the network's dtype.

    Args:
        loras: LoRAs, in the order in which they are added.
        network: `unet` or `text_encoder`.
        target: The network.
        fuse: True to merge the LoRAs into the weights and remove their layers.

    Raises:
        ConfigError: A LoRA has layers or shapes that the network does not have.
    """
    chosen = {f"lora{index}": lora for index, lora in enumerate(loras) if lora.touches(network)}
    if not chosen:
        return
    layers = {name: layer for name, layer in target.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for name, lora in chosen.items():
        fitted = dict(_fit(lora, network, layers))
        if network == UNET and not fuse and any(_CALLED_BY_KEYWORD.search(layer) for layer in fitted):
            raise ConfigError(
                f"{lora.part.path} changes proj_in or proj_out of motion modules, which is supported for fused LoRAs "
                "only; set model.fuse_loras to true"
            )
        _inject(lora, name, network, target, fitted)
    scales = [lora.scale for lora in chosen.values()]
    if network == UNET:
        target.set_adapters(list(chosen), scales)
    else:
        set_adapters_for_text_encoder(list(chosen), target, scales)
    if fuse:
        if network == UNET:
            target.fuse_lora()
        else:
            fuse_text_encoder_lora(target)
        recurse_remove_peft_layers(target)


def _parse(key: str, path: Path) -> tuple[str, str, str]:
    """Return network, layer and role of a key; kohya's layer names have underscores in the place of dots."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
    if prefix is None:
        raise ConfigError(
            f"{path}: {key!r} does not belong to a network of Stable Diffusion 1.5; the file is not a LoRA, or a LoRA "
            "for another family, such as SDXL"
        )
    rest = key.removeprefix(prefix)
    for old, new in _OLD_NAMES:
        rest = re.sub(old, new, rest)
    ending = next((ending for ending in _ROLES if rest.endswith(f".{ending}")), None)
    if ending is None:
        raise ConfigError(f"{path}: {key!r} belongs to an unsupported kind of LoRA (DoRA, LoHa, LoKr, CP-LoCon)")
    return _PREFIXES[prefix], rest.removesuffix(f".{ending}"), _ROLES[ending]


def _fit(lora: Lora, network: str, layers: dict[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each layer of the network that a LoRA changes, with the LoRA's matrices in the network's dtype."""
    known = {name: name for name in layers} | {name.replace(".", "_"): name for name in layers}
    if network == TEXT_ENCODER:  # transformers 5 has removed a level that files still have
        known |= {f"text_model.{name}": name for name in layers}
        known |= {f"text_model_{name.replace('.', '_')}": name for name in layers}
    for named, tensors in lora.tensors[network].items():
        where = f"{lora.part.path}: {named!r} of the {network}"
        if named not in known:
            raise ConfigError(f"{where} is not a layer of this model; is the LoRA for another family, such as SDXL?")
        if not {"down", "up"} <= set(tensors):
            raise ConfigError(f"{where}: one of the two matrices is missing; the file is damaged")
        weight = layers[known[named]].weight
        rank = tensors["down"].shape[:1]
        wanted = {
            "down": (*rank, *weight.shape[1:]),
            "up": (weight.shape[0], *rank, *(1 for _ in weight.shape[2:])),
        }
        found = {role: tuple(tensors[role].shape) for role in wanted}
        if found != wanted:
            raise ConfigError(
                f"{where}: invalid shapes (got {found['down']} and {found['up']}, expected {wanted['down']} and "
                f"{wanted['up']}); is the LoRA for another family, such as SDXL?"
            )
        # Copy: a tensor would otherwise remain a view of the file, which may change.
        yield known[named], tensors | {role: tensors[role].to(weight.dtype, copy=True) for role in wanted}


def _inject(lora: Lora, name: str, network: str, target: Any, fitted: dict[str, dict[str, torch.Tensor]]) -> None:
    """Pass a LoRA to diffusers, with full layer names so that diffusers does not have to guess them."""
    state = {}
    for layer, tensors in fitted.items():
        state[f"{network}.{layer}.lora_A.weight"] = tensors["down"]
        state[f"{network}.{layer}.lora_B.weight"] = tensors["up"]
    options = {"adapter_name": name, "metadata": lora.metadata, "low_cpu_mem_usage": True}
    try:
        alphas = _alphas(network, fitted)
        with warnings.catch_warnings(
            action="ignore"
        ):  # diffusers warns if there is a LoRA already; several are intended
            if network == UNET:
                StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, target, **options)
            else:
                StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, alphas, target, **options)
    except (RuntimeError, TypeError, ValueError) as err:
        raise ConfigError(f"cannot apply {lora.part.path}: {err}") from err


def _alphas(network: str, fitted: dict[str, dict[str, torch.Tensor]]) -> dict[str, float] | None:
    """Return the alpha of every layer, or its rank if it has none; None if no layer has an alpha."""
    if not any("alpha" in tensors for tensors in fitted.values()):
        return None
    return {
        f"{network}.{layer}.alpha": tensors["alpha"].item() if "alpha" in tensors else float(len(tensors["down"]))
        for layer, tensors in fitted.items()
    }
