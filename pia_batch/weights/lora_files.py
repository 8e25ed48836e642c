"""LoRA files: network, layer and role of every tensor, by its name. No torch.

`plan` and `doctor` check headers with this module; the engine reads the tensors by the same rules.

Sources of the layouts: kohya-ss/sd-scripts `networks/lora.py`, KohakuBlueleaf/LyCORIS `lycoris/modules`,
huggingface/peft `tuners`, huggingface/diffusers `loaders`, CompVis/stable-diffusion for original layer names.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from pia_batch.errors import ConfigError
from pia_batch.weights import spare_tensors, wrapped_names

UNET, TEXT_ENCODER = "unet", "text_encoder"

Shape = tuple[int, ...]

_OUTER = ("base_model.model.", "_orig_mod_")
"""Beginnings of names by peft, and by torch.compile in names without dots; for others see `wrapped_names`."""

_PEFT = "base_model.model."

_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("lora_unet_", UNET),
    ("lora_te1_", TEXT_ENCODER),
    ("lora_te_", TEXT_ENCODER),
    ("lora_unet.", UNET),
    ("lora_te1.", TEXT_ENCODER),
    ("lora_te.", TEXT_ENCODER),
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
    (TEXT_ENCODER, ("text_projection",)),
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
    "scalar": "scalar",
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
    (r"\.(lora_[AB])\.[^.]+\.(weight|bias)$", r".\1.\2"),
    (r"\.(lora_magnitude_vector)\.[^.]+\.weight$", r".\1.weight"),
    (r"\.lora_layer\.", ".lora."),
    (r"\.(?:processor\.)?to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.(?:processor\.)?to_out_lora\.", ".to_out.0.lora."),
    (r"_processor_to_([qkv])_lora\.", r"_to_\1.lora."),
    (r"_processor_to_out_lora\.", "_to_out_0.lora."),
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
    (r"\.wd_for_diff$", "DoRA of the difference (LyCORIS: wd_for_diff)"),
    (r"\.(q_layer|p_layer)\.weight$|\.lambda_layer$", "T-LoRA"),
    (r"\.abba_", "ABBA"),
    (r"\.spectral_shifts$", "SVDiff"),
    (r"\.(to_\w+_)?custom_diffusion", "Custom Diffusion"),
    (r"\.set_weight$", "patch that replaces whole weights (ComfyUI: set_weight)"),
    (r"\.reshape_weight$", "LoRA that reshapes its layers (ComfyUI: reshape_weight)"),
    (r"\.base_layer\.weight$", "LoRA together with the weights of its base (peft: base_layer)"),
    (r"\.modules_to_save\.", "LoRA with modules that were trained whole (peft: modules_to_save)"),
    (r"\.ln_tuning_layers\.", "LN tuning"),
    (r"(^|\.)(internal_)?xlora_", "X-LoRA"),
    (r"\.trainable_tokens_", "trainable tokens of peft"),
    (r"\.bone_", "Bone"),
    *(
        (rf"\.{prefix}_", kind)
        for prefix, kind in {
            "adamss": "AdaMSS", "beft": "BEFT", "c3a": "C3A", "deft": "DEFT", "delora": "DeLoRA", "frod": "FRoD",
            "gralora": "GraLoRA", "hira": "HiRA", "lily": "Lily", "miss": "MiSS", "osf": "OSF", "peanut": "PEANuT",
            "poly": "Poly", "psoft": "PSOFT", "pvera": "PVeRA", "randlora": "RandLoRA", "road": "RoAd",
            "shadow": "Shadow", "shira": "SHiRA", "tinylora": "TinyLoRA", "unilora": "UniLoRA", "waveft": "WaveFT",
        }.items()
    ),
)  # fmt: skip
"""Patterns of names in adapters of other kinds, with the kind. Source: peft 0.21.2 `PEFT_TYPE_TO_PREFIX_MAPPING`."""

_BLOCKS = ".oft_blocks"
_BOFT_NDIM = 4

_BUNDLED = "bundle_emb."
_VECTORS = (".string_to_param.*", ".string_to_param", ".emb_params", ".clip_l", ".*")

NUMBERS = ("alpha", "scalar")
"""Roles of single numbers by which a layer's delta is multiplied; LyCORIS before 2.0 stored a trained `scalar`."""

_RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Roles of the tensors whose first side is the rank of a layer, in the order in which they decide."""

_PLAIN = {"down", "up", "alpha"}
"""Roles of the tensors of a layer that stays a layer of its own, as PEFT applies it."""

_CALLED_BY_KEYWORD = re.compile(r"motion_modules[._]\d+[._](temporal_transformer[._])?proj_(in|out)$")
"""Layers that diffusers 0.42.1 calls as `layer(input=...)`, which PEFT's layer wrapper does not support."""

_EMBEDDING = re.compile(r"(token|position)_embedding$")

_MARKS = re.compile(r"v_pred|ztsnr|edm_(mean|std)|edm_vpred\.sigma_(max|min)")
"""Names of marks of a training, as in checkpoints. `lora_marks` compares them with the scheduler."""

_UNUSED_LAYERS = ("text_projection", "text_model.text_projection", "logit_scale")
"""Layers of CLIP after the text encoder that Stable Diffusion 1.5 reads; a change of them changes no clip."""


@dataclass(frozen=True, slots=True)
class LoraTensorName:
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
class LoraContent:
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

    @property
    def is_adjustable(self) -> bool:
        """True if PEFT applies every layer, so that the scale may differ between rows."""
        return all(
            is_plain(roles) and not is_called_by_keyword(network, layer) and not is_embedding(network, layer)
            for network, layers in self.layers.items()
            for layer, roles in layers.items()
        )


def unsupported(shapes: Mapping[str, Shape]) -> str | None:
    """Return the name of the kind of adapter in a file if no engine applies that kind, else None."""
    for name, shape in shapes.items():
        if name.endswith(_BLOCKS):
            return "BOFT" if len(shape) == _BOFT_NDIM else "OFT"
        for pattern, kind in _UNSUPPORTED:
            if re.search(pattern, name):
                return kind
    return None


def is_plain(roles: Iterable[str]) -> bool:
    """Return True if a layer with these tensors is a plain low-rank product."""
    return {"down", "up"} <= set(roles) <= _PLAIN


def rank_role(roles: Container[str]) -> str | None:
    """Return the role whose first side is the rank, by which alpha is divided; None if alpha does not count.

    Layers without a rank are full differences, norms and two full factors of LoKr.
    """
    return next((role for role in _RANKED if role in roles), None)


def is_called_by_keyword(network: str, layer: str) -> bool:
    """Return True for layers of the UNet that PEFT's wrapper does not support; `layer` is a name in a file or in it."""
    return network == UNET and _CALLED_BY_KEYWORD.search(layer) is not None


def is_embedding(network: str, layer: str) -> bool:
    """Return True for the text encoder's tables of tokens and positions, whose deltas are always merged."""
    return network == TEXT_ENCODER and _EMBEDDING.search(layer) is not None


def parse(name: str) -> LoraTensorName | None:
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
    return LoraTensorName(network, rest.removesuffix(f".{ending}"), _ROLES[ending])


def _unwrapped(name: str) -> str:
    name = wrapped_names.unwrapped(name)
    while name.startswith(_OUTER):
        name = wrapped_names.unwrapped(next(name.removeprefix(each) for each in _OUTER if name.startswith(each)))
    return name


def contents(named: Mapping[str, Shape], where: str) -> LoraContent:
    """Sort the tensors of a file by network, layer and role.

    Args:
        named: Shapes by tensor name.
        where: Name of the file, for messages.

    Raises:
        ConfigError: There is a tensor of unknown meaning, or none at all.
    """
    layers: dict[str, dict[str, dict[str, str]]] = {}
    embeddings: dict[str, str] = {}
    left_out = [name for name in named if _is_spare(name)]
    for name in (name for name in named if not _is_spare(name)):
        if name.startswith(_BUNDLED):
            word = _bundled(name, where)
            if word in embeddings:
                raise ConfigError(f"{where}: the textual inversion {word!r} has two tensors ({name!r})")
            embeddings[word] = name
            continue
        key = _known(name, where)
        if key.network == TEXT_ENCODER and key.layer in _UNUSED_LAYERS:
            left_out.append(name)
            continue
        roles = layers.setdefault(key.network, {}).setdefault(key.layer, {})
        if key.role in roles:
            raise ConfigError(f"{where}: {name!r} and {roles[key.role]!r} are the same tensor of the same layer")
        roles[key.role] = name
    for held in layers.values():
        empty = [layer for layer, roles in held.items() if set(roles) <= set(NUMBERS)]
        left_out += [name for layer in empty for name in held.pop(layer).values()]
    layers = {network: held for network, held in layers.items() if held}
    if not layers and not embeddings:
        raise ConfigError(f"{where} holds no LoRA")
    return LoraContent(layers, embeddings, tuple(left_out), is_peft=any(_PEFT in name for name in named))


_WHOLE = {
    ".weight": "the whole weight of a layer, as peft saves modules_to_save",
    ".bias": "a trained bias of the base, as peft saves it with the setting `bias`",
}
"""Ends of names of parameters of the base itself, with what they are in a LoRA."""


def _is_spare(name: str) -> bool:
    """Return True for a tensor that belongs to no layer: a constant, a mark or state of a training."""
    own = _unwrapped(name)
    prefix = next((prefix for prefix, owner in _PREFIXES if owner == TEXT_ENCODER and own.startswith(prefix)), "")
    return spare_tensors.left_out(own.removeprefix(prefix))[0] or _MARKS.fullmatch(own) is not None


def _known(name: str, where: str) -> LoraTensorName:
    try:
        key = parse(name)
    except ValueError:
        for ending, what in _WHOLE.items():
            if name.endswith(ending):
                raise ConfigError(
                    f"{where}: {name!r} is {what}, which no engine applies; merge the LoRA into its base, and set "
                    "model.base to the result"
                ) from None
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
