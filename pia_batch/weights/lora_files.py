"""LoRA files: network, layer and role of every tensor, and the checks that names and shapes allow. No torch.

`plan` and `doctor` check headers with this module; the engine reads the tensors by the same rules.

Sources of the layouts: kohya-ss/sd-scripts `networks/lora.py`, KohakuBlueleaf/LyCORIS `lycoris/modules`,
huggingface/peft `tuners`, huggingface/diffusers `loaders`, CompVis/stable-diffusion for original layer names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pia_batch.errors import ConfigError

UNET, TEXT_ENCODER = "unet", "text_encoder"

Shape = tuple[int, ...]

PEFT_CONFIG = "adapter_config.json"
"""Name of the file in which peft saves alpha and rank, next to the weights."""

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""Prefixes that data-parallel training, torch.compile and peft put before every name."""

_PEFT = "base_model.model."

_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("lora_unet_", UNET),
    ("lora_te1_", TEXT_ENCODER),
    ("lora_te_", TEXT_ENCODER),
    ("lycoris_unet_", UNET),
    ("lycoris_te_", TEXT_ENCODER),
    ("lycoris_", None),
    ("unet.", UNET),
    ("text_encoder.", TEXT_ENCODER),
    ("model.diffusion_model.", UNET),
    ("diffusion_model.", UNET),
    ("cond_stage_model.transformer.", TEXT_ENCODER),
    ("text_encoders.clip_l.transformer.", TEXT_ENCODER),
    ("clip_l.transformer.", TEXT_ENCODER),
)
"""Prefixes of networks. None, and names without a prefix: the first part of the layer's name decides."""

_FIRST_PARTS = (
    (UNET, ("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_norm_out", "conv_out", "time_embed")),
    (UNET, ("input_blocks", "middle_block", "output_blocks", "out.", "out_")),
    (TEXT_ENCODER, ("text_model", "encoder.layers", "encoder_layers", "embeddings", "final_layer_norm")),
)

_ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_B.bias": "up_bias",
    "lora_up.bias": "up_bias",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
    **{f"hada_{role}": f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{role}": f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
}
"""Suffixes of keys: those of peft, diffusers, kohya and LyCORIS."""

_OLD_NAMES = (
    (r"\.default(?=\.|$)", ""),
    (r"\.(?:processor\.)?to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.(?:processor\.)?to_out_lora\.", ".to_out.0.lora."),
    (r"\.self_attn\.to_(q|k|v|out)\.(?:0\.)?lora\.", r".self_attn.\1_proj.lora."),
    (r"\.lora_linear_layer\.", ".lora."),
)
"""Patterns of names in diffusers before 0.22 and in state dicts of peft, each with the current name, in order."""

_UNSUPPORTED = (
    (r"\.on_input$|\.ia3_l", "IA3"),
    (r"\.boft_", "BOFT"),
    (r"\.oft_(diag|[rR]$|[rR]\.|R_)", "OFT"),
    (r"\.[ab][12]\.weight$|\.glora_", "GLoRA"),
    (r"\.glokr_", "GLoKr"),
    (r"\.lora_embedding_[AB]", "embedding LoRA"),
    (r"\.vera_lambda_", "VeRA"),
    (r"\.lora_E$|\.lora_E\.", "AdaLoRA"),
    (r"\.hra_u", "HRA"),
    (r"\.fourierft_", "FourierFT"),
    (r"\.vblora_", "VB-LoRA"),
    (r"\.lokr_t1$", "LoKr with lokr_t1"),
)
_BLOCKS = ".oft_blocks"
_BOFT_NDIM = 4

_PEFT_TYPES = {"LORA", "LOHA", "LOKR"}

_BUNDLED = "bundle_emb."
_VECTORS = (".string_to_param.*", ".string_to_param", ".emb_params", ".clip_l", ".*")

_LEFT_OUT = ("position_ids",)
"""Ends of names of constants that some trainers save; they change no weight."""

_LATENT_CHANNELS = 4
_PIA_CHANNELS = 9
_IS_ANOTHER_FAMILY = "is the LoRA for another family, such as SDXL?"


@dataclass(frozen=True, slots=True)
class Key:
    """Meaning of one tensor's name.

    Attributes:
        network: `unet` or `text_encoder`.
        layer: Name of the layer, as the file spells it, without the network's prefix.
        role: Role of the tensor in its layer, such as `down`, `up`, `alpha` or `hada_w1_a`.
    """

    network: str
    layer: str
    role: str


@dataclass(frozen=True, slots=True)
class Content:
    """Names of all tensors of a file, sorted.

    Attributes:
        layers: Names of tensors by network, layer and role.
        embeddings: Names of bundled textual inversions' tensors by the word that stands for them.
        left_out: Names of tensors that change no weight.
        is_peft: True if peft saved the file, whose scale is then in `adapter_config.json`.
    """

    layers: dict[str, dict[str, dict[str, str]]]
    embeddings: dict[str, str]
    left_out: tuple[str, ...]
    is_peft: bool


@dataclass(frozen=True, slots=True)
class Target:
    """Layer of a network.

    Attributes:
        name: Name of the layer in diffusers or transformers, without `text_model.`.
        weight: Shape of its weight.
        bias: Shape of its bias; None if it has none.
    """

    name: str
    weight: Shape
    bias: Shape | None


class Layers:
    """Layers of one network, found by any of their names."""

    def __init__(self, network: str, shapes: Mapping[str, Shape]) -> None:
        """Index the layers of a network.

        Args:
            network: `unet` or `text_encoder`.
            shapes: Shapes of its parameters, by their names in diffusers or transformers.
        """
        self._network = network
        self._by_name = {}
        for name, shape in shapes.items():
            if name.endswith(".weight"):
                layer = name.removesuffix(".weight").removeprefix("text_model.")
                bias = shapes.get(f"{name.removesuffix('.weight')}.bias")
                self._by_name[_current_motion(_flat(layer))] = Target(layer, shape, bias)
        self._per_block = _per_block(shapes)

    @property
    def is_known(self) -> bool:
        """True if the network's layers have names that this class can find."""
        return any(name in self._by_name for name in ("conv_in", "final_layer_norm"))

    @property
    def has_motion(self) -> bool:
        """True if there are layers of motion modules."""
        return any("motion_modules" in name for name in self._by_name)

    def find(self, named: str) -> Target | None:
        """Return the layer that a file names: with dots or underscores, by its original or its current name."""
        flat = _flat(named)
        if self._network == TEXT_ENCODER:
            return self._by_name.get(flat.removeprefix("text_model_"))
        if flat not in self._by_name:
            flat = _flat(from_original(named, self._per_block) or flat)
        return self._by_name.get(_current_motion(flat))


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _per_block(names: Iterable[str]) -> int:
    """Return the number of layers in each block of a UNet."""
    found = {int(match[1]) for name in names if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))}
    return len(found) or 2


def _current_motion(flat: str) -> str:
    """Return the current name of a layer of AnimateDiff's motion modules."""
    for old, new in (
        ("temporal_transformer_", ""),
        (r"attention_blocks_0_(processor_)?", "attn1_"),
        (r"attention_blocks_1_(processor_)?", "attn2_"),
        (r"norms_0$", "norm1"),
        (r"norms_1$", "norm2"),
        (r"ff_norm$", "norm3"),
    ):
        flat = re.sub(old, new, flat)
    return flat


_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)[._](\d+)[._](.+)")
_PART = re.compile(r"(\d+)[._](.+)")


def from_original(layer: str, per_block: int) -> str | None:
    """Return the name in diffusers of a UNet's layer with an original name; None for another name.

    Args:
        layer: Original name, with dots or underscores, such as `input_blocks.1.1.proj_in`.
        per_block: Number of layers in each block of the UNet.
    """
    match = _ORIGINAL.fullmatch(layer)
    if _flat(layer) in _OUTER or match is None:
        return _OUTER.get(_flat(layer))
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle_block":
        return f"mid_block.attentions.0.{rest}" if number == 1 else _resnet(f"mid_block.resnets.{number // 2}", rest)
    part = _PART.fullmatch(rest)
    if part is None:
        return None
    outer, number = ("down_blocks", number - 1) if side == "input_blocks" else ("up_blocks", number)
    block, index = divmod(number, per_block + 1)
    kind, rest = part[1], part[2]
    if rest in _SAMPLERS[outer]:
        return f"{outer}.{block}.{_SAMPLERS[outer][rest]}.0.conv"
    inner = f"{outer}.{block}"
    return _resnet(f"{inner}.resnets.{index}", rest) if kind == "0" else f"{inner}.attentions.{index}.{rest}"


_SAMPLERS = {"down_blocks": {"op": "downsamplers"}, "up_blocks": {"conv": "upsamplers"}}


def _resnet(outer: str, rest: str) -> str | None:
    inner = _RESNET.get(_flat(rest))
    return None if inner is None else f"{outer}.{inner}"


def unsupported(shapes: Mapping[str, Shape]) -> str | None:
    """Return the name of the kind of adapter in a file if no engine applies that kind, else None."""
    for name, shape in shapes.items():
        if name.endswith(_BLOCKS):
            return "BOFT" if len(shape) == _BOFT_NDIM else "OFT"
        for pattern, kind in _UNSUPPORTED:
            if re.search(pattern, name):
                return kind
    return None


def parse(name: str) -> Key | None:
    """Return the meaning of a tensor's name, or None if it does not belong to a network of Stable Diffusion 1.5.

    Raises:
        ValueError: It belongs to a network, but no supported kind of LoRA has such a tensor.
    """
    rest, network = _unwrapped(name), None
    for prefix, owner in _PREFIXES:
        if rest.startswith(prefix):
            rest, network = _unwrapped(rest.removeprefix(prefix)), owner
            break
    if network is None:
        network = next((owner for owner, parts in _FIRST_PARTS if rest.startswith(parts)), None)
    if network is None:
        return None
    for old, new in _OLD_NAMES:
        rest = re.sub(old, new, rest)
    ending = next((ending for ending in _ROLES if rest.endswith(f".{ending}")), None)
    if ending is None:
        raise ValueError(name)
    return Key(network, rest.removesuffix(f".{ending}"), _ROLES[ending])


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = next(name.removeprefix(wrapper) for wrapper in _WRAPPERS if name.startswith(wrapper))
    return name


def contents(named: Mapping[str, Shape], where: str) -> Content:
    """Sort the tensors of a file by network, layer and role.

    Args:
        named: Shapes by tensor name.
        where: Name of the file, for messages.

    Raises:
        ConfigError: There is a tensor of unknown meaning, or none at all.
    """
    layers: dict[str, dict[str, dict[str, str]]] = {}
    embeddings: dict[str, str] = {}
    left_out = [name for name in named if name.endswith(_LEFT_OUT)]
    for name in (name for name in named if not name.endswith(_LEFT_OUT)):
        if name.startswith(_BUNDLED):
            word = _bundled(name, where)
            if word in embeddings:
                raise ConfigError(f"{where}: the textual inversion {word!r} has two tensors ({name!r})")
            embeddings[word] = name
            continue
        key = _known(name, where)
        roles = layers.setdefault(key.network, {}).setdefault(key.layer, {})
        if key.role in roles:
            raise ConfigError(f"{where}: {name!r} and {roles[key.role]!r} are the same tensor of the same layer")
        roles[key.role] = name
    for held in layers.values():
        empty = [layer for layer, roles in held.items() if set(roles) == {"alpha"}]
        left_out += [held.pop(layer)["alpha"] for layer in empty]
    layers = {network: held for network, held in layers.items() if held}
    if not layers and not embeddings:
        raise ConfigError(f"{where} holds no LoRA")
    return Content(layers, embeddings, tuple(left_out), is_peft=any(_PEFT in name for name in named))


def _known(name: str, where: str) -> Key:
    try:
        key = parse(name)
    except ValueError:
        raise ConfigError(
            f"{where}: {name!r} belongs to an unsupported kind of LoRA; supported are LoRA, LoCon, LoHa, LoKr, DoRA "
            "and full differences"
        ) from None
    if key is None:
        raise ConfigError(
            f"{where}: {name!r} does not belong to a network of Stable Diffusion 1.5; the file is not a LoRA, or a "
            "LoRA for another family, such as SDXL"
        )
    return key


def _bundled(name: str, where: str) -> str:
    """Return the word of a bundled textual inversion."""
    ending = next((each for each in _VECTORS if name.endswith(each)), None)
    word = "" if ending is None else name.removeprefix(_BUNDLED).removesuffix(ending)
    if not word:
        raise ConfigError(f"{where}: {name!r} is not a textual inversion of Stable Diffusion 1.5; remove it")
    return word


def fit(
    content: Content, network: str, shapes: Mapping[str, Shape], layers: Layers, where: str
) -> Iterator[tuple[str, Target]]:
    """Yield each layer in a file, as it is spelled, with the network's layer that it changes.

    Args:
        content: Tensors of the file.
        network: `unet` or `text_encoder`.
        shapes: Shapes by tensor name.
        layers: Layers of the network.
        where: Name of the file, for messages.

    Raises:
        ConfigError: The network has no such layer, or one of another shape; a tensor is missing.
    """
    taken: dict[str, str] = {}
    for named, roles in content.layers.get(network, {}).items():
        here = f"{where}: {named!r} of the {network}"
        target = layers.find(named)
        if target is None:
            if "motion_modules" in named and not layers.has_motion:
                continue  # the header of the motion adapter has names that only the engine converts
            raise ConfigError(f"{here} is not a layer of this model; {_IS_ANOTHER_FAMILY}")
        if target.name in taken:
            raise ConfigError(f"{here} and {taken[target.name]!r} are the same layer; the file holds it twice")
        taken[target.name] = named
        check({role: shapes[name] for role, name in roles.items()}, target, here)
        yield named, target


def channels(roles: Mapping[str, Shape], target: Target) -> Shape:
    """Return the shape of the weight that a file changes.

    It is that of the layer, except for the first layer of PIA. That layer has nine input channels; a LoRA trained on
    Stable Diffusion has four, which are the first four.
    """
    weight = target.weight
    if target.name != "conv_in" or len(weight) < 2 or weight[1] != _PIA_CHANNELS:  # noqa: PLR2004 - out, in, ...
        return weight
    smaller = (weight[0], _LATENT_CHANNELS, *weight[2:])
    return smaller if _misfit(roles, weight) is not None and _misfit(roles, smaller) is None else weight


def check(roles: Mapping[str, Shape], target: Target, where: str) -> None:
    """Check the shapes of a layer's tensors against the layer.

    Raises:
        ConfigError: A tensor is missing, belongs to another kind of LoRA, or has another shape.
    """
    problem = _incomplete(set(roles))
    if problem is not None:
        raise ConfigError(f"{where}: {problem}; the file is damaged")
    if math.prod(roles.get("alpha", ())) != 1:
        raise ConfigError(f"{where}: alpha must be one number (got shape {roles['alpha']}); the file is damaged")
    misfit = _misfit(roles, channels(roles, target))
    if misfit is not None:
        raise ConfigError(f"{where}: invalid shapes ({misfit}); {_IS_ANOTHER_FAMILY}")
    for role in ("diff_b", "b_norm", "up_bias"):
        if role in roles and (target.bias is None or math.prod(roles[role]) != math.prod(target.bias)):
            raise ConfigError(
                f"{where}: its bias is {roles[role]}, that of the layer {target.bias}; {_IS_ANOTHER_FAMILY}"
            )


_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def _incomplete(roles: set[str]) -> str | None:
    kinds = [any(role in each for role in roles) for each in ({"down", "up"}, _HADA)]
    kinds += [any(role.startswith("lokr_") for role in roles), "diff" in roles, "w_norm" in roles]
    if sum(kinds) > 1:
        return "tensors of several kinds of LoRA change one layer"
    if (roles & {"down", "up", "mid", "up_bias"}) and not {"down", "up"} <= roles:
        return "one of the two matrices is missing"
    if roles & (_HADA | {"hada_t1", "hada_t2"}) and not (roles >= _HADA and len(roles & {"hada_t1", "hada_t2"}) != 1):
        return "a matrix of its LoHa is missing"
    if any(role.startswith("lokr_") for role in roles) and not _has_both_factors(roles):
        return "a factor of its LoKr is missing"
    if roles & {"dora_scale", "magnitude"} and not any(kinds[:4]):
        return "it has a DoRA magnitude but no matrices"
    return None


def _has_both_factors(roles: set[str]) -> bool:
    for factor in ("lokr_w1", "lokr_w2"):
        parts = {f"{factor}_a", f"{factor}_b"}
        if (factor in roles) == bool(parts & roles) or (parts & roles and not parts <= roles):
            return False
    return "lokr_t2" not in roles or "lokr_w2_a" in roles


def _misfit(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    """Return how the shapes differ from those that a weight of this shape needs, or None."""
    if any(role.startswith("lokr_") for role in roles):
        return _lokr_misfit(roles, weight)
    wanted = _wanted(roles, weight)
    found = {role: roles[role] for role in wanted}
    alike = all(_alike(found[role], shape) for role, shape in wanted.items())
    if not alike or any(0 in shape for shape in found.values()):
        return f"got {_listed(found)}, expected {_listed(wanted)}"
    return _magnitude_misfit(roles, weight)


def _wanted(roles: Mapping[str, Shape], weight: Shape) -> dict[str, Shape]:
    """Return the shapes of the matrices that a weight of this shape needs, for the rank that the file has."""
    out, taken, kernel = weight[0], weight[1:2], weight[2:]
    if "down" in roles:
        rank = roles["down"][:1]
        if "mid" in roles:
            return {"down": (*rank, *taken), "up": (out, *rank), "mid": (*rank, *rank, *kernel)}
        return {"down": (*rank, *weight[1:]), "up": (out, *rank, *(1 for _ in kernel))}
    wanted: dict[str, Shape] = {}
    for each in "12" if "hada_w1_a" in roles else "":
        rank = roles[f"hada_w{each}_b"][:1]
        if f"hada_t{each}" in roles:
            wanted |= {f"hada_w{each}_a": (*rank, out), f"hada_w{each}_b": (*rank, *taken)}
            wanted[f"hada_t{each}"] = (*rank, *rank, *kernel)
        else:
            wanted |= {f"hada_w{each}_a": (out, *rank), f"hada_w{each}_b": (*rank, math.prod(weight[1:]))}
    return wanted | {role: weight for role in ("diff", "w_norm") if role in roles}


def _magnitude_misfit(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    for role, sizes in (("dora_scale", weight[:2]), ("magnitude", weight[:1])):
        if role in roles and math.prod(roles[role]) not in sizes:
            return f"got {role} {roles[role]}, expected {weight[0]} numbers"
    return None


def _lokr_misfit(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    first = roles.get("lokr_w1") or _product(roles["lokr_w1_a"], roles["lokr_w1_b"])
    if "lokr_t2" in roles:
        core, left, right = (roles[f"lokr_{each}"] for each in ("t2", "w2_a", "w2_b"))
        two = 2
        known = len(core) > two and len(left) == len(right) == two and core[:2] == (left[0], right[0])
        second: Shape | None = (left[1], right[1] * math.prod(core[2:])) if known else None
    else:
        whole = roles.get("lokr_w2")
        second = _product(roles["lokr_w2_a"], roles["lokr_w2_b"]) if whole is None else _matrix(whole)
    wanted = (weight[0], math.prod(weight[1:]))
    first = None if first is None else _matrix(first)
    found = None if first is None or second is None else (first[0] * second[0], first[1] * second[1])
    if found != wanted or 0 in wanted:
        return f"got LoKr factors {first} and {second}, expected a product of {wanted}"
    return _magnitude_misfit(roles, weight)


def _product(left: Shape, right: Shape) -> Shape | None:
    left_matrix, right_matrix = _matrix(left), _matrix(right)
    if left_matrix is None or right_matrix is None or left_matrix[1] != right_matrix[0]:
        return None
    return (left_matrix[0], right_matrix[1])


def _matrix(shape: Shape) -> Shape | None:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else None


def _alike(found: Shape, wanted: Shape) -> bool:
    """Return True for equal shapes, apart from sides of 1 at the end, or a kernel that is flattened."""
    return _trimmed(found) == _trimmed(wanted) or (
        len(found) == 2 < len(wanted) and found == (wanted[0], math.prod(wanted[1:]))  # noqa: PLR2004 - a matrix
    )


def _trimmed(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _listed(shapes: Mapping[str, Shape]) -> str:
    return " and ".join(str(shape) for shape in shapes.values())


# --- peft's record ---------------------------------------------------------------------------------------------------


def check_peft(config: Mapping[str, Any], where: str) -> None:
    """Check the record that peft saves with an adapter.

    Raises:
        ConfigError: It is of a kind that no engine applies, or not a record of peft.
    """
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind not in _PEFT_TYPES:
        raise ConfigError(f"{where} is of peft type {kind}, which is not supported; supported are LORA, LOHA and LOKR")
    try:
        scale_of(config, "layer", 1)
    except (ArithmeticError, TypeError, ValueError, re.error) as err:
        raise ConfigError(f"{where} is not a valid record of peft: {err}") from err


def scale_of(config: Mapping[str, Any], layer: str, rank: int | None) -> float:
    """Return the factor of a layer's delta by peft's record: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Args:
        config: Content of `adapter_config.json`.
        layer: Name of the layer, with dots.
        rank: Rank of the layer's matrices; None if it has none, then the record's rank counts.

    Source: huggingface/peft `utils/other.py` `get_pattern_key`, `tuners/lora/layer.py`, `tuners/lycoris_utils.py`.
    """
    alpha = config.get("lora_alpha", config.get("alpha"))
    rank = _by_pattern(config.get("rank_pattern"), layer, config.get("r", 1)) if rank is None else rank
    alpha = _by_pattern(config.get("alpha_pattern"), layer, rank if alpha is None else alpha)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
