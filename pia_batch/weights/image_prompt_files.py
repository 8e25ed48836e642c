"""Files of IP-Adapters and of their image encoders: names and shapes of their tensors. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pia_batch.errors import ConfigError
from pia_batch.weights.wrapped_names import unwrapped

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
        own = unwrapped(name)
        group, _, rest = own.partition(".")
        if not own.startswith(_FROZEN):
            found[f"{_GROUPS.get(group, group)}.{rest}"] = name
    return found


def check_adapter(shapes: Mapping[str, Shape], unet: Mapping[str, Shape], where: str) -> None:
    """Check the tensors of an adapter against a UNet: its cross-attention, whose odd numbers they have, and its width.

    Args:
        shapes: Shapes by the names of published adapters, as in `adapter_tensors`.
        unet: Shapes of the UNet's tensors.
        where: Name of the file, for messages.

    Raises:
        ConfigError: A tensor is missing, of another shape, or of an attention that the UNet does not have.
    """
    reads = [name for name in unet if name.endswith(".attn2.to_k.weight") and "motion_modules" not in name]
    reads.sort(key=lambda name: name.startswith("up_blocks") + 2 * name.startswith("mid_block"))
    expected = {
        f"ip_adapter.{2 * number + 1}.{each}.weight": unet[name]
        for number, name in enumerate(reads)
        for each in ("to_k_ip", "to_v_ip")
    }
    found = {name: shape for name, shape in shapes.items() if name.startswith("ip_adapter.")}
    problem = _difference(found, expected)
    if problem is not None:
        raise ConfigError(
            f"{where} does not fit the cross-attention of the base's UNet, which has {len(reads)} layers: it {problem}"
            "; use an adapter for `sd15`"
        )
    width = next(iter(expected.values()))[1] if expected else 0
    held = {_current(name): shape for name, shape in shapes.items() if name.startswith("image_proj.")}
    problem = _difference(held, _projection(held, width))
    if problem is not None:
        raise ConfigError(
            f"{where}: its image projection does not fit the base's UNet, which reads text embeddings of {width} "
            f"dimensions: it {problem}; use an adapter for `sd15`, or download the file again"
        )


def _current(name: str) -> str:
    """Return the name of a resampler's tensor in published adapters, from that in diffusers."""
    for pattern, published in _RESAMPLER_NAMES:
        name = re.sub(pattern, published, name)
    return name


_RESAMPLER_NAMES = (
    (r"(layers\.\d+)\.attn\.(to_\w+)\.", r"\1.0.\2."),
    (r"(layers\.\d+)\.ln0\.", r"\1.0.norm1."),
    (r"(layers\.\d+)\.ln1\.", r"\1.0.norm2."),
    (r"(layers\.\d+)\.ff\.0\.", r"\1.1.0."),
    (r"(layers\.\d+)\.ff\.1\.net\.0\.proj\.", r"\1.1.1."),
    (r"(layers\.\d+)\.ff\.1\.net\.2\.", r"\1.1.3."),
)
"""Names that diffusers also reads in a resampler, and those of published adapters."""

_TOKENS, _RESAMPLER_LAYERS, _HEAD_WIDTH, _WIDENING = 4, 4, 64, 4
"""Constants of IP-Adapters: tokens of the plain one; layers, head width and feed-forward factor of a resampler.

Source: diffusers 0.42.1 `_convert_ip_adapter_image_proj_to_diffusers`, `IPAdapterPlusImageProjection`.
"""


def _projection(found: Mapping[str, Shape], width: int) -> dict[str, Shape]:
    """Return the shapes of an image projection for a UNet.

    Its own widths, such as that of the image embedding, are those of the tensors found.

    Args:
        found: Shapes by the names of published adapters.
        width: Width of the UNet's text embeddings.
    """

    def side(name: str, index: int) -> int:
        shape = found.get(f"image_proj.{name}", ())
        return shape[index] if len(shape) > index else 0

    if "image_proj.proj.weight" in found:
        image = side("proj.weight", 1)
        named: dict[str, Shape] = {"proj.weight": (_TOKENS * width, image), "proj.bias": (_TOKENS * width,)}
        norms = {"norm": width}
    elif "image_proj.proj.3.weight" in found:
        image = side("proj.0.weight", 1)
        named = {"proj.0.weight": (image, image), "proj.0.bias": (image,), "proj.2.weight": (width, image)}
        named["proj.2.bias"] = (width,)
        norms = {"proj.3": width}
    else:
        image, inner = side("proj_in.weight", 1), side("latents", 2)
        heads = side("layers.0.0.to_q.weight", 0) // _HEAD_WIDTH * _HEAD_WIDTH
        named = {
            "latents": (1, side("latents", 1), inner),
            "proj_in.weight": (inner, image),
            "proj_in.bias": (inner,),
            "proj_out.weight": (width, inner),
            "proj_out.bias": (width,),
        }
        norms = {"norm_out": width}
        for layer in (f"layers.{index}" for index in range(_RESAMPLER_LAYERS)):
            norms |= {f"{layer}.0.norm1": inner, f"{layer}.0.norm2": inner, f"{layer}.1.0": inner}
            named |= {
                f"{layer}.0.to_q.weight": (heads, inner),
                f"{layer}.0.to_kv.weight": (2 * heads, inner),
                f"{layer}.0.to_out.weight": (inner, heads),
                f"{layer}.1.1.weight": (_WIDENING * inner, inner),
                f"{layer}.1.3.weight": (inner, _WIDENING * inner),
            }
    named |= {f"{name}.{each}": (size,) for name, size in norms.items() for each in ("weight", "bias")}
    return {f"image_proj.{name}": shape for name, shape in named.items()}


@dataclass(frozen=True, slots=True)
class EncoderTensor:
    """Tensor of an image encoder in its file.

    Attributes:
        name: Name in the file.
        third: Number of the third of the stored tensor, along its first side, that this is; None: all of it.
        is_transposed: True if the file has the matrix with its sides exchanged.
    """

    name: str
    third: int | None = None
    is_transposed: bool = False

    def shape(self, stored: Shape) -> Shape:
        """Return the shape of this tensor, from that of the stored one."""
        if self.is_transposed:
            return stored[::-1]
        return stored if self.third is None or not stored else (stored[0] // 3, *stored[1:])


_OPEN_CLIP = "visual."
_OPEN_CLIP_SPARE = (
    "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale",
    "logit_bias", "attn_mask", "text.",
)  # fmt: skip
"""Beginnings of names of the text tower and the loss of open_clip."""

_OPEN_CLIP_NAMES = (
    (r"class_embedding", "embeddings.class_embedding"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"conv1\.", "embeddings.patch_embedding."),
    (r"ln_pre\.", "pre_layrnorm."),
    (r"ln_post\.", "post_layernorm."),
    (r"transformer\.resblocks\.(\d+)\.ln_(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"encoder.layers.\1.self_attn.*."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"proj$", "visual_projection.weight"),
)
"""Names in open_clip's and OpenAI's vision towers, and in transformers.

Source: huggingface/transformers `models/clip/convert_clip_original_pytorch_to_hf.py`; mlfoundations/open_clip
`transformer.py` for the rest.
"""


def encoder_tensors(names: Iterable[str]) -> dict[str, EncoderTensor]:
    """Return the tensors of an image encoder in a file, by their names without `vision_model.`.

    Names may be those of transformers, or those of open_clip and OpenAI, which keep query, key and value as one.
    """
    stored = list(names)
    is_open_clip = any(_bare(name).startswith(f"{_OPEN_CLIP}transformer.") for name in stored)
    found: dict[str, EncoderTensor] = {}
    for name in stored:
        own = _bare(name)
        if is_open_clip:
            if not own.startswith(_OPEN_CLIP_SPARE):
                found |= _of_open_clip(name, own.removeprefix(_OPEN_CLIP))
        elif not own.startswith(_SPARE) and not own.endswith("position_ids"):
            found[own.removeprefix(_TOWER)] = EncoderTensor(name)
    return found


def _bare(name: str) -> str:
    return unwrapped(name).removeprefix("image_encoder.")


def _of_open_clip(stored: str, own: str) -> dict[str, EncoderTensor]:
    for pattern, current in _OPEN_CLIP_NAMES:
        renamed, count = re.subn(f"^{pattern}", current, own)
        if count and ".*." in renamed:
            outer, _, ending = renamed.partition(".*.")
            return {f"{outer}.{each}_proj.{ending}": EncoderTensor(stored, k) for k, each in enumerate("qkv")}
        if count:
            return {renamed: EncoderTensor(stored, is_transposed=own == "proj")}
    return {own: EncoderTensor(stored)}


def check_encoder(shapes: Mapping[str, Shape], settings: Mapping[str, Any], where: str) -> None:
    """Check the tensors of an image encoder in a single file against its config.

    Args:
        shapes: Shapes by tensor name, as in the file.
        settings: Content of the encoder's `config.json`.
        where: Name of the file, for messages.

    Raises:
        ConfigError: A tensor is missing, of another shape, or none of this encoder's.
    """
    found = {name: one.shape(shapes[one.name]) for name, one in encoder_tensors(shapes).items()}
    problem = _difference(found, _expected(settings))
    if problem is not None:
        raise ConfigError(
            f"{where} is not the expected image encoder: it {problem}; use CLIP-ViT-H in the names of transformers or "
            "open_clip, or put the encoder's config.json next to the file"
        )


def _difference(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str | None:
    """Return how the tensors differ from the expected ones, or None."""
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
            return f"{problem} {', '.join(listed[:_MOST_LISTED])}{more}"
    return None


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
