"""Add-on files with random weights for the networks of a benchmark: LoRAs, motion LoRAs and an IP-Adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

_RANK = 4
_PROJECTED, _TOKENS = 32, 4
"""Channels of the image encoder's result, and tokens that the adapter makes of it."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def write_lora(unet: nn.Module, path: Path) -> Path:
    """Write a LoRA for the attention over pixels and text of a UNet, in the layout of PEFT; return its path.

    Args:
        unet: `UNetMotionModel`; only the shapes of its weights are read, so that it may be on the meta device.
        path: File to write.
    """
    chosen = _matrices(unet, lambda name: "motion_modules" not in name and name.endswith(_ATTENTION))
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in chosen.items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path


def write_motion_lora(unet: nn.Module, path: Path) -> Path:
    """Write a LoRA for the attention over frames of a UNet, as AnimateDiff's are in diffusers; return its path."""
    chosen = _matrices(unet, lambda name: "motion_modules" in name and name.endswith(_ATTENTION))
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in chosen.items():
        processor = f"unet.{name.removesuffix('.0').replace('.to_', '.processor.to_')}_lora"
        tensors |= {f"{processor}.down.weight": down, f"{processor}.up.weight": up}
    save_file(tensors, path)
    return path


def write_ip_adapter(unet: Any, path: Path) -> Path:
    """Write an IP-Adapter in the layout of h94/IP-Adapter, and a small image encoder next to it; return its path.

    Args:
        unet: `UNetMotionModel` without an adapter; only the shapes of its weights are read.
        path: File to write. The encoder goes to `image_encoder/` in the same folder.
    """
    random = torch.Generator().manual_seed(3)
    texts = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(_TOKENS * texts, _PROJECTED, generator=random) / math.sqrt(_PROJECTED),
        "image_proj.proj.bias": torch.zeros(_TOKENS * texts),
        "image_proj.norm.weight": torch.ones(texts),
        "image_proj.norm.bias": torch.zeros(texts),
    }
    over_text = [name for name in unet.attn_processors if "attn2" in name and "motion_modules" not in name]
    for index, name in enumerate(over_text):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            weight = torch.randn(channels, texts, generator=random) / math.sqrt(texts)
            tensors[f"ip_adapter.{2 * index + 1}.{part}.weight"] = weight
    save_file(tensors, path)
    encoder = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
        projection_dim=_PROJECTED,
    )
    CLIPVisionModelWithProjection(encoder).save_pretrained(path.parent / "image_encoder")
    return path


def _matrices(unet: nn.Module, chosen: Callable[[str], bool]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random `down` and `up` for each chosen linear layer, small enough for half precision."""
    random = torch.Generator().manual_seed(2)
    made = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and chosen(name):
            wide, deep = layer.weight.shape
            down = torch.randn(_RANK, deep, generator=random) / math.sqrt(deep)
            made[name] = (down, 0.1 * torch.randn(wide, _RANK, generator=random))
    return made
