"""LoRAs: files of three layouts, laid over the layers that they name.

diffusers and PEFT apply them, so that a clip is what the stock pipeline with the same LoRA draws. The files are read
here: diffusers drops what does not fit, with a warning; here every tensor has its place, or the file is refused.
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
"""How keys begin: in diffusers' and PEFT's files, then in kohya's."""

_ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "alpha": "alpha",
}
"""How keys end: in files of PEFT, diffusers and kohya."""

_OLD_NAMES = (
    (r"\.processor\.to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.lora_linear_layer\.", ".lora."),
)
"""Names of diffusers before 0.22, and the layer that each of them means."""

_CALLED_BY_KEYWORD = re.compile(r"motion_modules\.\d+\.proj_(in|out)")
"""Layers that diffusers 0.42.1 calls as `layer(input=...)`, which PEFT's wrapper of a layer does not understand."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA's file, sorted by the networks that it changes.

    Attributes:
        part: the file.
        scale: how strongly it is applied.
        tensors: network, then layer as the file names it, then `down` (rank, in, ...), `up` (out, rank, ...) and
            perhaps `alpha` (scalar; the product of the matrices counts alpha / rank times).
        metadata: what PEFT recorded about it; None in most files.
    """

    part: Component
    scale: float
    tensors: dict[str, dict[str, dict[str, torch.Tensor]]]
    metadata: dict[str, Any] | None

    def touches(self, network: str, layers: str = "") -> bool:
        """Whether it changes a layer of this network whose name holds `layers`."""
        return any(layers in name for name in self.tensors.get(network, {}))


def read(part: Component, config: LoraConfig) -> Lora:
    """The LoRA in a safetensors file.

    Raises:
        ConfigError: the file is broken, holds none, or one of another kind or for other networks.
    """
    path = part.path
    try:
        with safetensors.safe_open(path, "pt") as file:
            loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
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
    """Lay all LoRAs that change `network` over it, in place and in its dtype.

    Args:
        loras: in the order in which they are added up.
        network: `unet` or `text_encoder`.
        target: the network.
        fuse: merge them into the weights, so that nothing is left of them but that.

    Raises:
        ConfigError: a LoRA has layers or shapes that the network has not.
    """
    chosen = {f"lora{index}": lora for index, lora in enumerate(loras) if lora.touches(network)}
    if not chosen:
        return
    layers = {name: layer for name, layer in target.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for name, lora in chosen.items():
        fitted = dict(_fit(lora, network, layers))
        if network == UNET and not fuse and any(_CALLED_BY_KEYWORD.search(layer) for layer in fitted):
            raise ConfigError(
                f"{lora.part.path} changes proj_in or proj_out of motion modules, which works in merged form only; "
                "set model.fuse_loras to true"
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
    """Network, layer and role of a key; kohya's layers have underscores where others have dots."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
    if prefix is None:
        raise ConfigError(
            f"{path}: {key!r} is for no network of Stable Diffusion 1.5; a LoRA for another family, such as SDXL, "
            "does not fit, nor does another kind of file"
        )
    rest = key.removeprefix(prefix)
    for old, new in _OLD_NAMES:
        rest = re.sub(old, new, rest)
    ending = next((ending for ending in _ROLES if rest.endswith(f".{ending}")), None)
    if ending is None:
        raise ConfigError(f"{path}: {key!r} is of a kind of LoRA that is not read here (DoRA, LoHa, LoKr, CP-LoCon)")
    return _PREFIXES[prefix], rest.removesuffix(f".{ending}"), _ROLES[ending]


def _fit(lora: Lora, network: str, layers: dict[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The network's layers that a LoRA changes, and its matrices for them in the network's dtype."""
    known = {name: name for name in layers} | {name.replace(".", "_"): name for name in layers}
    if network == TEXT_ENCODER:  # transformers 5 has dropped a level that files still have
        known |= {f"text_model.{name}": name for name in layers}
        known |= {f"text_model_{name.replace('.', '_')}": name for name in layers}
    for named, tensors in lora.tensors[network].items():
        where = f"{lora.part.path}: {named!r} of the {network}"
        if named not in known:
            raise ConfigError(f"{where} is no layer of this model; is the LoRA for another family, such as SDXL?")
        if not {"down", "up"} <= set(tensors):
            raise ConfigError(f"{where} lacks one of its two matrices; the file is damaged")
        weight = layers[known[named]].weight
        rank = tensors["down"].shape[:1]
        wanted = {
            "down": (*rank, *weight.shape[1:]),
            "up": (weight.shape[0], *rank, *(1 for _ in weight.shape[2:])),
        }
        found = {role: tuple(tensors[role].shape) for role in wanted}
        if found != wanted:
            raise ConfigError(
                f"{where} has shapes {found['down']} and {found['up']}, and the layer needs {wanted['down']} and "
                f"{wanted['up']}; is the LoRA for another family, such as SDXL?"
            )
        # Copied, lest a tensor stay a window on the file, which may change.
        yield known[named], tensors | {role: tensors[role].to(weight.dtype, copy=True) for role in wanted}


def _inject(lora: Lora, name: str, network: str, target: Any, fitted: dict[str, dict[str, torch.Tensor]]) -> None:
    """Hand a LoRA to diffusers, under names that it needs not guess at."""
    state = {}
    for layer, tensors in fitted.items():
        state[f"{network}.{layer}.lora_A.weight"] = tensors["down"]
        state[f"{network}.{layer}.lora_B.weight"] = tensors["up"]
    options = {"adapter_name": name, "metadata": lora.metadata, "low_cpu_mem_usage": True}
    try:
        alphas = _alphas(network, fitted)
        with warnings.catch_warnings(action="ignore"):  # that there is a LoRA already: several are meant
            if network == UNET:
                StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, target, **options)
            else:
                StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, alphas, target, **options)
    except (RuntimeError, TypeError, ValueError) as err:
        raise ConfigError(f"cannot apply {lora.part.path}: {err}") from err


def _alphas(network: str, fitted: dict[str, dict[str, torch.Tensor]]) -> dict[str, float] | None:
    """The alpha of every layer, its rank where it has none; None where no layer has one."""
    if not any("alpha" in tensors for tensors in fitted.values()):
        return None
    return {
        f"{network}.{layer}.alpha": tensors["alpha"].item() if "alpha" in tensors else float(len(tensors["down"]))
        for layer, tensors in fitted.items()
    }
