"""Files of IP-Adapters and of their image encoders: names and shapes of their tensors. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pia_batch.errors import ConfigError

Shape = tuple[int, ...]

_GROUPS = {
    "image_proj": "image_proj",
    "image_proj_model": "image_proj",
    "ip_adapter": "ip_adapter",
    "adapter_modules": "ip_adapter",
}
"""Groups of an adapter's tensors: those of published files, and those of tencent-ailab/IP-Adapter's training."""

_FROZEN = "unet."
"""Prefix of the base's own weights, which training saves with the adapter."""

_TOWER = "vision_model."
_SPARE = ("text_model.", "text_projection.", "logit_scale")
"""Beginnings of names of CLIP's text tower, which a complete CLIP has and an image encoder does not need."""

_MOST_LISTED = 3


def adapter_tensors(names: Iterable[str]) -> dict[str, str]:
    """Return the names of an adapter's tensors in the file, by their names in published adapters.

    Tensors of the UNet that was frozen during training are left out. A name of another group stays as it is.
    """
    found = {}
    for name in names:
        own = name.removeprefix("module.")
        group, _, rest = own.partition(".")
        if not own.startswith(_FROZEN):
            found[f"{_GROUPS.get(group, group)}.{rest}"] = name
    return found


def encoder_tensors(names: Iterable[str]) -> dict[str, str]:
    """Return the names of an image encoder's tensors in the file, by their names without `vision_model.`."""
    found = {}
    for name in names:
        own = name.removeprefix("module.").removeprefix("image_encoder.")
        if not own.startswith(_SPARE) and not own.endswith("position_ids"):
            found[own.removeprefix(_TOWER)] = name
    return found


def check_encoder(shapes: Mapping[str, Shape], settings: Mapping[str, Any], where: str) -> None:
    """Check the tensors of an image encoder in a single file against its config.

    Args:
        shapes: Shapes by tensor name, as in the file.
        settings: Content of the encoder's `config.json`.
        where: Name of the file, for messages.

    Raises:
        ConfigError: A tensor is missing, of another shape, or none of this encoder's.
    """
    found = {name: shapes[stored] for name, stored in encoder_tensors(shapes).items()}
    expected = _expected(settings)
    missing = sorted(expected.keys() - found.keys())
    others = sorted(found.keys() - expected.keys())
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    for problem, listed in (("has no", missing), ("has unknown tensors", others), ("has other shapes:", wrong)):
        if listed:
            more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
            raise ConfigError(
                f"{where} is not the expected image encoder: it {problem} {', '.join(listed[:_MOST_LISTED])}{more}; "
                "use CLIP-ViT-H in the names of transformers, or put the encoder's config.json next to the file"
            )


def _expected(settings: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shapes of a CLIPVisionModelWithProjection; defaults are those of transformers' CLIPVisionConfig."""
    vision = settings.get("vision_config") or settings
    width, inner = int(vision.get("hidden_size", 768)), int(vision.get("intermediate_size", 3072))
    side, patch = int(vision.get("image_size", 224)), int(vision.get("patch_size", 32))
    channels = int(vision.get("num_channels", 3))
    projected = int(settings.get("projection_dim", vision.get("projection_dim", 512)))
    expected: dict[str, Shape] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, channels, patch, patch),
        "embeddings.position_embedding.weight": ((side // patch) ** 2 + 1, width),
        "visual_projection.weight": (projected, width),
    }
    matrices = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    matrices |= {f"self_attn.{each}_proj": (width, width) for each in ("q", "k", "v", "out")}
    norms = ["pre_layrnorm", "post_layernorm"]
    for index in range(int(vision.get("num_hidden_layers", 12))):
        outer = f"encoder.layers.{index}"
        norms += [f"{outer}.layer_norm1", f"{outer}.layer_norm2"]
        for name, shape in matrices.items():
            expected |= {f"{outer}.{name}.weight": shape, f"{outer}.{name}.bias": shape[:1]}
    return expected | {f"{norm}.{each}": (width,) for norm in norms for each in ("weight", "bias")}
