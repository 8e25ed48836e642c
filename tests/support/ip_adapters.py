"""Small IP-Adapters in the layouts of h94/IP-Adapter, as files that the real loaders read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import PIAPipeline
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

Layout = Literal["plain", "light", "plus", "full_face"]
LAYOUTS: tuple[Layout, ...] = ("plain", "light", "plus", "full_face")

_IMAGE_SIZE, _HIDDEN, _PROJECTED, _TEXT = 32, 24, 12, 16
_QUERIES, _DEPTH, _INNER, _HEAD = 5, 4, 8, 64


def write(folder: Path, layout: Layout = "plain", **changes: torch.Tensor) -> Path:
    """Write an adapter for `pipelines.build()` and its image encoder. `changes` replace some of its weights."""
    torch.manual_seed(LAYOUTS.index(layout))
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=_HIDDEN,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=_IMAGE_SIZE,
            patch_size=16,
            projection_dim=_PROJECTED,
        )
    )
    encoder.save_pretrained(folder / "image_encoder")
    path = folder / f"ip-adapter_{layout}.safetensors"
    save_file(weights(layout) | changes, path)
    return path


def weights(layout: Layout = "plain") -> dict[str, torch.Tensor]:
    """Return the content of such a file."""
    projection = {"plus": _resampler, "full_face": _mlp}.get(layout, _linear)()
    named = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
    # Cross-attention has the odd numbers: down, up, then the middle, with the channels of those blocks.
    for number, channels in zip((1, 3, 5, 7), (16, 16, 16, 32), strict=True):
        for name in ("to_k_ip", "to_v_ip"):
            named[f"ip_adapter.{number}.{name}.weight"] = torch.randn(channels, _TEXT) / 4
    return named


def load(pipe: PIAPipeline, path: Path) -> None:
    """Load it into the pipeline as its users do."""
    pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, local_files_only=True)


def _linear() -> dict[str, torch.Tensor]:
    return {
        "proj.weight": torch.randn(4 * _TEXT, _PROJECTED) / 3,
        "proj.bias": torch.randn(4 * _TEXT) / 3,
        **_norm("norm", _TEXT),
    }


def _mlp() -> dict[str, torch.Tensor]:
    return {
        "proj.0.weight": torch.randn(_HIDDEN, _HIDDEN) / 5,
        "proj.0.bias": torch.randn(_HIDDEN) / 5,
        "proj.2.weight": torch.randn(_TEXT, _HIDDEN) / 5,
        "proj.2.bias": torch.randn(_TEXT) / 5,
        **_norm("proj.3", _TEXT),
    }


def _resampler() -> dict[str, torch.Tensor]:
    named: dict[str, Any] = {
        "latents": torch.randn(1, _QUERIES, _INNER),
        "proj_in.weight": torch.randn(_INNER, _HIDDEN) / 5,
        "proj_in.bias": torch.randn(_INNER) / 5,
        "proj_out.weight": torch.randn(_TEXT, _INNER) / 3,
        "proj_out.bias": torch.randn(_TEXT) / 3,
        **_norm("norm_out", _TEXT),
    }
    for layer in (f"layers.{index}" for index in range(_DEPTH)):
        named |= _norm(f"{layer}.0.norm1", _INNER) | _norm(f"{layer}.0.norm2", _INNER) | _norm(f"{layer}.1.0", _INNER)
        named |= {
            f"{layer}.0.to_q.weight": torch.randn(_HEAD, _INNER) / 3,
            f"{layer}.0.to_kv.weight": torch.randn(2 * _HEAD, _INNER) / 3,
            f"{layer}.0.to_out.weight": torch.randn(_INNER, _HEAD) / 8,
            f"{layer}.1.1.weight": torch.randn(4 * _INNER, _INNER) / 3,
            f"{layer}.1.3.weight": torch.randn(_INNER, 4 * _INNER) / 6,
        }
    return named


def _norm(name: str, features: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + torch.randn(features) / 9, f"{name}.bias": torch.randn(features) / 9}
