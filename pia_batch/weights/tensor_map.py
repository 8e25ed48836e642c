"""Map of a network's tensors to the tensors of its files, from names and shapes in their headers; without torch.

A file may use the names of diffusers and transformers of any release, or those of the original programs. Every tensor
of the network must be in a file, and every tensor of a file must have a place or a known reason to be left out. The
engine reads tensors by the same map, so that a file that is found here also loads.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pia_batch.errors import ConfigError
from pia_batch.weights import networks, quantized_names, safetensors, spare_tensors, wrapped_names
from pia_batch.weights.components import CONFIG, Component
from pia_batch.weights.networks import POSITIONS, Settings, Shape

UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
"""Beginnings of the names in a checkpoint of the original layout."""

VAE_PREFIXES = (VAE_PREFIX, "vae.")
TEXT_PREFIXES = (
    f"{TEXT_PREFIX}transformer.", f"{TEXT_PREFIX}clip_l.transformer.", "text_encoders.clip_l.transformer.",
    "conditioner.embedders.0.transformer.",
)  # fmt: skip
"""Beginnings of the VAE's and the text encoder's names: in the original layout, in files that ComfyUI saved, and in
those of Stability-AI/generative-models (`sgm/models/diffusion.py` `DiffusionEngine`)."""

LCM_REMEDY = "use the ordinary checkpoint with an LCM LoRA in model.loras and scheduler `lcm`"

_MOST_LISTED = 5

_SPATIAL = re.compile(
    r"time_embedding\..+|conv_norm_out\..+|conv_out\..+|(down_blocks\.\d+|up_blocks\.\d+|mid_block)\."
    r"(resnets|attentions|downsamplers|upsamplers)\..+"
)
"""Names of a UNet's own tensors in a file that also has motion modules, as PIA's training writes it."""

_WHOLE_UNET = ("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_out.weight")


@dataclass(frozen=True)
class Stored:
    """Tensor of a file that becomes a tensor of a network.

    Attributes:
        path: File.
        name: Name in the file.
        shape: Shape that the network needs; the file may add or leave out the sides of a 1 x 1 convolution.
    """

    path: Path
    name: str
    shape: Shape


@dataclass(frozen=True)
class TensorMap:
    """Map of one network's tensors.

    Attributes:
        tensors: Stored tensors by their names in the network.
        left_out: Number of tensors of the files that are not used, by the reason.
    """

    tensors: dict[str, Stored]
    left_out: Counter[str] = field(default_factory=Counter)


def unwrapped(names: Iterable[str], path: Path) -> dict[str, str]:
    """Return the names in a file by these names without the wrappers of trainers.

    Raises:
        ConfigError: Two names are the same without them.
    """
    found: dict[str, str] = {}
    for name in names:
        inner = wrapped_names.unwrapped(name)
        if inner in found:
            raise ConfigError(f"{path}: tensors {found[inner]} and {name} have the same place; keep one of them")
        found[inner] = name
    return found


def build(name: str, part: Component) -> TensorMap:
    """Map the tensors of a network.

    Args:
        name: Name of the part: `unet`, `vae`, `text_encoder` or `motion_adapter`.
        part: Part with its config.

    Raises:
        ConfigError: A tensor is missing, has no place, or has another shape or dtype; or the config is invalid.
    """
    settings = part.settings
    expected = _expected(name, part, settings)
    headers = [safetensors.read(part.folder / file) for file in part.files if file.endswith(safetensors.SUFFIX)]
    held = _held(name, part, headers)
    candidates = _CANDIDATES[name](settings)
    tensors, missing = dict[str, Stored](), list[str]()
    for wanted, shape in expected.items():
        found = next((each for each in candidates(wanted) if each in held), None)
        if found is not None:
            path, stored = held.pop(found)
            tensors[wanted] = Stored(path, stored, shape)
        elif not wanted.endswith(POSITIONS):
            missing.append(wanted)
    outer = _outer_name(missing, candidates, held)
    if outer is not None:
        raise ConfigError(
            f"{_named(part, headers)}: the names of its tensors have {outer!r} before those of the {_KINDS[name]}; "
            "remove it from the names, or use a file without it"
        )
    counts, unexpected = _left_out(name, held)
    _check(name, part, headers, missing, unexpected)
    _check_shapes(name, part, headers, tensors)
    return TensorMap(tensors, counts)


def _expected(name: str, part: Component, settings: Settings) -> networks.Shapes:
    try:
        return networks.shapes_of(name, settings)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
        raise ConfigError(
            f"{_config_path(part)} is not the config of a {_KINDS[name]} that PIA can use: {err}; use a "
            "checkpoint of Stable Diffusion 1.5"
        ) from err


def _held(name: str, part: Component, headers: Sequence[safetensors.SafetensorsHeader]) -> dict[str, tuple[Path, str]]:
    """Return the file and the name in it of this network's tensors, by their names without prefix.

    Raises:
        ConfigError: Two files have the same tensor.
    """
    every: dict[str, tuple[Path, str]] = {}
    for header in headers:
        for inner, outer in unwrapped(header.shapes, header.path).items():
            if inner in every:
                raise ConfigError(
                    f"tensor {inner} is in {every[inner][0]} and in {header.path.name}: shards of different downloads "
                    "are mixed; download the folder again"
                )
            every[inner] = (header.path, outer)
    prefixes = _PREFIXES[name] if part.layout == "single_file" else ("",)
    prefix = next((each for each in prefixes if any(inner.startswith(each) for inner in every)), prefixes[0])
    return {inner.removeprefix(prefix): value for inner, value in every.items() if inner.startswith(prefix)}


def _outer_name(missing: Sequence[str], candidates: Candidates, held: Iterable[str]) -> str | None:
    """Return the same beginning before the names of all missing tensors in a file; None if there is none."""
    names = set(held)
    for candidate in candidates(missing[0]) if missing else ():
        for stored in names:
            outer = stored.removesuffix(candidate)
            if (
                outer.endswith(".")
                and outer != stored
                and all(any(outer + each in names for each in candidates(wanted)) for wanted in missing)
            ):
                return outer
    return None


def _left_out(name: str, held: Iterable[str]) -> tuple[Counter[str], list[str]]:
    """Return the counts of tensors with a reason to be left out, and the names of those without."""
    names = list(held)
    whole = name == "motion_adapter" and set(_WHOLE_UNET) <= set(names)
    counts: Counter[str] = Counter()
    unexpected = []
    for each in names:
        if whole and _SPATIAL.fullmatch(each):
            counts["UNet without motion modules"] += 1
            continue
        known, reason = spare_tensors.left_out(each)
        if each.endswith(POSITIONS) and name in ("motion_adapter", "unet"):
            continue
        if not known:
            unexpected.append(each)
        elif reason is not None:
            counts[reason] += 1
    return counts, unexpected


def _check(
    name: str,
    part: Component,
    headers: Sequence[safetensors.SafetensorsHeader],
    missing: list[str],
    unexpected: list[str],
) -> None:
    named = _named(part, headers)
    quantized_names.refuse(unexpected, named)
    for each in unexpected:
        known = next((text for ending, text in _FOREIGN if re.search(ending, each)), None)
        if known is not None:
            raise ConfigError(f"{named}: tensor {each} belongs to {known}")
    if missing:
        raise ConfigError(
            f"{named}: missing tensors of the {_KINDS[name]}: {_listed(missing)}; the file is incomplete, or "
            f"{_remedy(part)}"
        )
    if unexpected:
        raise ConfigError(f"{named}: unexpected tensors for a {_KINDS[name]}: {_listed(unexpected)}; {_remedy(part)}")


def _check_shapes(
    name: str, part: Component, headers: Sequence[safetensors.SafetensorsHeader], tensors: dict[str, Stored]
) -> None:
    shapes = {(header.path, each): shape for header in headers for each, shape in header.shapes.items()}
    dtypes = {(header.path, each): dtype for header in headers for each, dtype in header.dtypes.items()}
    wrong = [
        f"{wanted} ({_sides(shapes[stored.path, stored.name])} instead of {_sides(stored.shape)})"
        for wanted, stored in tensors.items()
        if not _fits(shapes[stored.path, stored.name], stored.shape)
    ]
    if wrong:
        raise ConfigError(
            f"{_named(part, headers)}: tensors with other shapes than in the {_KINDS[name]}: {_listed(wrong)}; "
            f"{_remedy(part)}"
        )
    for stored in tensors.values():
        dtype = dtypes.get((stored.path, stored.name), "F32")
        if dtype not in safetensors.WEIGHT_DTYPES:
            raise ConfigError(
                f"{stored.path}: tensor {stored.name} has dtype {dtype}; quantized weights are not supported: use a "
                "file in F16, BF16 or F32"
            )


def _fits(found: Shape, wanted: Shape) -> bool:
    """Return True for the shape itself, and for a 1 x 1 convolution in the place of a linear layer or vice versa."""
    if found == wanted:
        return True
    longer, shorter = (found, wanted) if len(found) > len(wanted) else (wanted, found)
    return longer == (*shorter, 1, 1) and len(shorter) == 2 and math.prod(longer) > 0  # noqa: PLR2004 - a matrix


_FOREIGN = (
    (
        r"(time_embedding\.cond_proj|time_embed\.cond_proj)\.",
        "an LCM-distilled UNet (time_cond_proj_dim), whose guidance embedding PIA does not use; " + LCM_REMEDY,
    ),
    (r"(add_embedding|label_emb)\.", "a UNet of Stable Diffusion XL; PIA animates Stable Diffusion 1.5 only"),
    (r"class_embedding\.", "a UNet with class labels, such as an upscaler; PIA animates Stable Diffusion 1.5 only"),
    (r"encoder_hid_proj\.", "a UNet of another family; PIA animates Stable Diffusion 1.5 only"),
    (r"\.fuser\.", "a UNet with GLIGEN layers, which PIA does not use; use the checkpoint without them"),
    (
        r"condition_encoder\.",
        "an asymmetric VAE (AsymmetricAutoencoderKL), which PIA cannot use; use an AutoencoderKL",
    ),
    (
        r"^(encoder|decoder)\.layers\.\d+\.(weight|bias|conv\.)",
        "a tiny VAE (TAESD, AutoencoderTiny), which PIA cannot use; use an AutoencoderKL",
    ),
    (r"^quantize\.", "a VQ model; use an AutoencoderKL of Stable Diffusion 1.5"),
)
"""Names that occur in one kind of network only, with what to do."""


def _remedy(part: Component) -> str:
    if part.config is None:
        return f"it does not match its {CONFIG}; download the folder again"
    return f"it does not match the config in {part.config.folder}; set model.config to the matching one"


def _named(part: Component, headers: Sequence[safetensors.SafetensorsHeader]) -> Path:
    return headers[0].path if len(headers) == 1 else part.folder


def _config_path(part: Component) -> Path:
    return (part.folder if part.config is None else part.config.folder) / CONFIG


def _sides(shape: Shape) -> str:
    return "x".join(str(side) for side in shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more


_KINDS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "motion_adapter": "MotionAdapter",
}

_PREFIXES = {
    "unet": (UNET_PREFIX,),
    "vae": (*VAE_PREFIXES, ""),
    "text_encoder": (*TEXT_PREFIXES, TEXT_PREFIX),
    "motion_adapter": ("unet.", ""),
}
"""Possible prefixes in a single file; the first that any name has is used."""


# --- other names of a tensor ----------------------------------------------------------------------------------------

Candidates = Callable[[str], Sequence[str]]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}


def _unet_names(settings: Settings) -> Candidates:
    """Return names of CompVis/stable-diffusion, which numbers the blocks of all sizes in one row."""
    layers: Any = settings.get("layers_per_block", 2)
    attends = [str(each).startswith("CrossAttn") for each in settings.get("up_block_types") or _UP_BLOCKS]
    if not isinstance(layers, int):  # the original layout has one number of layers for all blocks
        return lambda name: (name,)
    return lambda name: (name, _original_unet_name(name, layers, attends))


_UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def _original_unet_name(name: str, layers: int, attends: list[bool]) -> str:
    for ours, original in _UNET_ENDS.items():
        if name.startswith(ours):
            return original + name.removeprefix(ours)
    if name.startswith("mid_block."):
        _, kind, number, rest = name.split(".", 3)
        place = 2 * int(number) if kind == "resnets" else 2 * int(number) + 1
        return f"middle_block.{place}.{_original_layer(kind, rest)}"
    side, block, kind, number, rest = name.split(".", 4)
    first = int(block) * (layers + 1)
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + int(number) + 1}.{int(kind != 'resnets')}.{_original_layer(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if attends[int(block)] else 1}.{rest}"
    return f"output_blocks.{first + int(number)}.{int(kind != 'resnets')}.{_original_layer(kind, rest)}"


def _original_layer(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    layer, _, ending = rest.partition(".")
    return f"{_RESNET[layer]}.{ending}"


_VAE_ATTENTION = {
    "group_norm": ("group_norm", "norm"),
    "to_q": ("to_q", "query", "q"),
    "to_k": ("to_k", "key", "k"),
    "to_v": ("to_v", "value", "v"),
    "to_out.0": ("to_out.0", "proj_attn", "proj_out"),
}
"""Names of the VAE's attention: of diffusers today, of its releases before 0.14, and of CompVis.

Converters of all years mixed them: fine-tuned VAEs have `mid.attn_1.query`, others `mid.attn_1.to_q`.
"""


def _vae_names(settings: Settings) -> Candidates:
    last = len(settings.get("block_out_channels") or (64,)) - 1
    return lambda name: tuple(_other_vae_names(name, last))


def _other_vae_names(name: str, last: int) -> Iterable[str]:
    attention = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
    if attention is not None:
        side, layer, ending = attention.groups()
        for place, other in itertools.product(("mid_block.attentions.0", "mid.attn_1"), _VAE_ATTENTION[layer]):
            yield f"{side}.{place}.{other}.{ending}"
        return
    yield name
    renamed = re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", name)
    renamed = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample.", renamed)
    renamed = re.sub(r"\.up_blocks\.(\d+)\.resnets\.", lambda found: f".up.{last - int(found[1])}.block.", renamed)
    renamed = re.sub(
        r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f".up.{last - int(found[1])}.upsample.", renamed
    )
    renamed = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}.", renamed)
    yield renamed.replace(".conv_norm_out.", ".norm_out.").replace(".conv_shortcut.", ".nin_shortcut.")


_MOTION_LAYERS = (
    (".transformer_blocks.", ".temporal_transformer.transformer_blocks."),
    (".attn1.", ".attention_blocks.0."),
    (".attn2.", ".attention_blocks.1."),
    (".norm1.", ".norms.0."),
    (".norm2.", ".norms.1."),
    (".norm3.", ".ff_norm."),
)


def _motion_names(settings: Settings) -> Candidates:
    """Return names of AnimateDiff and PIA, which put each motion module into a `temporal_transformer`."""
    del settings
    return lambda name: (name, _original_motion_name(name))


def _original_motion_name(name: str) -> str:
    renamed = re.sub(r"(motion_modules\.\d+\.)(norm|proj_in|proj_out)\.", r"\1temporal_transformer.\2.", name)
    for ours, original in _MOTION_LAYERS:
        renamed = renamed.replace(ours, original)
    return renamed


def _text_names(settings: Settings) -> Candidates:
    """Return the name with the prefix that CLIP's text tower has inside its model, and without."""
    del settings
    return lambda name: (name, f"text_model.{name}")


_CANDIDATES: dict[str, Callable[[Settings], Candidates]] = {
    "unet": _unet_names,
    "vae": _vae_names,
    "text_encoder": _text_names,
    "motion_adapter": _motion_names,
}
