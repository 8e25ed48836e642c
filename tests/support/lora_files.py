"""LoRA files as trainers write them, and the stock pipeline that loaded them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import PIAPipeline
from pipelines import build
from safetensors.torch import save_file
from torch import nn

STYLE_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")


def of_style(name: str) -> bool:
    return "motion_modules" not in name and name.endswith(STYLE_LAYERS)


def matrices(
    network: nn.Module, chosen: Callable[[str], bool], rank: int = 2, seed: int = 0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random `down` and `up` for each chosen layer of a network."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and chosen(name):
            shape = layer.weight.shape
            down = torch.randn(rank, *shape[1:], generator=random) * 0.3
            up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=random) * 0.3
            made[name] = (down, up)
    return made


def write_lora(
    path: Path,
    layout: str,
    unet: Callable[[str], bool] = of_style,
    text: Callable[[str], bool] = lambda _: True,
    rank: int = 2,
    seed: int = 0,
    alpha: Callable[[int], float] | None = None,
) -> Path:
    """Write a LoRA for the pipeline of `build`, as a trainer of that layout writes it."""
    pipe = build()
    tensors = {}
    layers = [
        *(("unet", name, pair) for name, pair in matrices(pipe.unet, unet, rank, seed).items()),
        *(
            ("text_encoder", f"text_model.{name}", pair)
            for name, pair in matrices(pipe.text_encoder, text, rank, seed + 1).items()
        ),
    ]
    for index, (network, name, (down, up)) in enumerate(layers):
        if layout == "kohya":
            flat = f"lora_{'te' if network == 'text_encoder' else 'unet'}_{name.replace('.', '_')}"
            tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{flat}.alpha"] = torch.tensor(alpha(index))
        elif layout == "peft":
            tensors |= {f"{network}.{name}.lora_A.weight": down, f"{network}.{name}.lora_B.weight": up}
        else:
            named = _in_diffusers(network, name)
            tensors |= {f"{named}.down.weight": down, f"{named}.up.weight": up}
    save_file(tensors, path)
    return path


def stock_with(*loras: tuple[Path, float], fuse: bool = False) -> PIAPipeline:
    """Return the stock pipeline with these LoRAs, each with its scale."""
    pipe = build()
    for index, (path, _) in enumerate(loras):
        with warnings.catch_warnings(action="ignore"):  # diffusers warns about a second LoRA
            pipe.load_lora_weights(str(path), adapter_name=f"stock{index}")
    pipe.set_adapters([f"stock{index}" for index in range(len(loras))], [scale for _, scale in loras])
    if fuse:
        pipe.fuse_lora()
    return pipe


def _in_diffusers(network: str, name: str) -> str:
    """Return the name that diffusers wrote before PEFT: attention by its processor, other layers by their own names."""
    if network == "text_encoder":
        for short in ("q", "k", "v", "out"):
            name = name.replace(f"{short}_proj", f"to_{short}_lora")
        return f"{network}.{name}" if name.endswith("_lora") else f"{network}.{name}.lora_linear_layer"
    for short in ("q", "k", "v", "out.0"):
        if name.endswith(f".to_{short}"):
            return f"{network}.{name.removesuffix(f'to_{short}')}processor.to_{short.removesuffix('.0')}_lora"
    return f"{network}.{name}.lora"
