"""LoRAs: reads files of all supported layouts and applies them to the layers that they name.

diffusers and PEFT apply plain LoRAs, so that a clip equals that of the stock pipeline with the same LoRA. LoHa, LoKr,
Tucker and DoRA layers, full differences and norms have no cheap low-rank form: their deltas are computed by the
published formulas in float64 and merged into the weights. `weights.lora_files` knows the layouts; a file with a tensor
that does not fit is refused, where diffusers drops the tensor with a warning.

Sources of the formulas: KohakuBlueleaf/LyCORIS `lycoris/modules`, huggingface/peft `tuners/lora/dora.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import fuse_text_encoder_lora, set_adapters_for_text_encoder
from diffusers.utils import recurse_remove_peft_layers

from pia_batch.config import LoraConfig
from pia_batch.engine.lora_scales import PREFIX
from pia_batch.errors import ConfigError
from pia_batch.weights import components, lora_files, lora_shapes, peft_config
from pia_batch.weights.components import Component
from pia_batch.weights.lora_files import TEXT_ENCODER, UNET, LoraContent
from pia_batch.weights.network_layers import NetworkLayer, NetworkLayers
from pia_batch.weights.safetensors import unreadable

__all__ = ["TEXT_ENCODER", "UNET", "Lora", "apply", "read"]

_SCALED_BY_NORM = ("dora_scale", "magnitude")


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA, read from its file and sorted by the networks that it changes.

    Attributes:
        part: The file.
        scale: Factor with which it is applied.
        tensors: Tensors by network, then by layer name in the file, then by role: `down` (rank, in, ...), `up` (out,
            rank, ...), `alpha` (scalar; the delta is multiplied by alpha / rank), and others in `lora_files`.
        content: Names of the tensors.
        metadata: Metadata that PEFT stored in the file; None in most files.
        peft: Content of the `adapter_config.json` that PEFT stored next to the file; None in most cases.
        embeddings: Vectors of bundled textual inversions, (tokens, features), by their word.
    """

    part: Component
    scale: float
    tensors: dict[str, dict[str, dict[str, torch.Tensor]]]
    content: LoraContent
    metadata: dict[str, Any] | None = None
    peft: dict[str, Any] | None = None
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_adjustable(self) -> bool:
        """True if PEFT applies every layer, so that the scale may differ between rows."""
        return self.content.is_adjustable

    def touches(self, network: str, layers: str = "") -> bool:
        """Return True if it changes a layer of this network whose name contains `layers`."""
        return any(layers in name for name in self.tensors.get(network, {}))


@dataclass(frozen=True, slots=True)
class _Layer:
    """Layer that a LoRA changes.

    Attributes:
        lora: The LoRA.
        target: Name and shapes of the layer in the network.
        tensors: Tensors by role, as in the file.
        alpha: Number by which the delta is multiplied, times its rank; None if the file does not have one.
        factor: Number by which the delta is multiplied, besides the LoRA's scale.
    """

    lora: Lora
    target: NetworkLayer
    tensors: dict[str, torch.Tensor]
    alpha: float | None
    factor: float

    def is_plain(self, network: str, *, fuse: bool) -> bool:
        """Return True if PEFT can apply it."""
        if lora_files.is_embedding(network, self.target.name):
            return False
        return lora_files.is_plain(self.tensors) and (
            fuse or not lora_files.is_called_by_keyword(network, self.target.name)
        )


def read(part: Component, config: LoraConfig) -> Lora:
    """Read the LoRA in a safetensors file.

    Raises:
        ConfigError: The file is broken, holds no LoRA, or one of an unsupported kind or for other networks.
    """
    path = part.path
    try:
        with safetensors.safe_open(path, "pt") as file:
            loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata = peft_config.in_metadata(file.metadata() or {}, str(path))
    except (OSError, safetensors.SafetensorError) as err:
        raise unreadable(path, err) from err
    except ValueError as err:
        raise ConfigError(f"cannot read {path}: {err}") from err
    shapes = {key: tuple(tensor.shape) for key, tensor in loaded.items()}
    kind = lora_files.unsupported(shapes)
    if kind is not None:
        raise ConfigError(f"{path} belongs to an unsupported kind of adapter: {kind}")
    content = lora_files.contents(shapes, str(path))
    left_out = set(content.left_out)
    for key, tensor in loaded.items():
        if key not in left_out and not bool(torch.isfinite(tensor.float()).all()):
            raise ConfigError(f"{path}: {key!r} holds NaN or infinity; the file is damaged, or its training failed")
    record = None if part.config is None else components.read_json(part.config.folder / peft_config.PEFT_CONFIG)
    for network in content.layers:
        found = record or peft_config.of_network(metadata, network)
        if found is not None:
            check = peft_config.check_peft if record is not None else peft_config.check_header
            check(found, str(path))
    return Lora(
        part,
        config.scale,
        {
            network: {layer: {role: loaded[key] for role, key in roles.items()} for layer, roles in layers.items()}
            for network, layers in content.layers.items()
        },
        content,
        metadata,
        record,
        {
            word: loaded[key].reshape(-1, loaded[key].shape[-1]) if loaded[key].ndim else loaded[key].reshape(1, 1)
            for word, key in content.embeddings.items()
        },
    )


def apply(loras: Sequence[Lora], network: str, target: Any, *, fuse: bool) -> None:
    """Apply all LoRAs that change `network`, in place and in the network's dtype.

    Layers that PEFT cannot apply are merged whatever `fuse` says. Each delta is computed from the base's own weight, so
    the order of LoRAs does not matter.

    Args:
        loras: LoRAs, in the order in which they are added.
        network: `unet` or `text_encoder`.
        target: The network.
        fuse: True to merge the LoRAs into the weights and remove their layers.

    Raises:
        ConfigError: A LoRA has layers or shapes that the network does not have.
    """
    chosen = {f"{PREFIX}{index}": lora for index, lora in enumerate(loras) if lora.touches(network)}
    if not chosen:
        return
    layers = NetworkLayers(network, {name: tuple(each.shape) for name, each in target.named_parameters()})
    modules = dict(target.named_modules())
    fitted = {name: list(_fit(lora, network, layers, modules)) for name, lora in chosen.items()}
    _merge([each for held in fitted.values() for each in held if not each.is_plain(network, fuse=fuse)], modules)
    injected = []
    for name, lora in chosen.items():
        plain = [each for each in fitted[name] if each.is_plain(network, fuse=fuse)]
        if plain:
            _inject(lora, name, network, target, plain, all_plain=len(plain) == len(fitted[name]))
            injected.append(name)
    if not injected:
        return
    scales = [chosen[name].scale for name in injected]
    if network == UNET:
        target.set_adapters(injected, scales)
    else:
        set_adapters_for_text_encoder(injected, target, scales)
    if fuse:
        if network == UNET:
            target.fuse_lora()
        else:
            fuse_text_encoder_lora(target)
        recurse_remove_peft_layers(target)


def _fit(lora: Lora, network: str, layers: NetworkLayers, modules: Mapping[str, Any]) -> Iterator[_Layer]:
    """Yield each layer of the network that a LoRA changes, with the LoRA's tensors."""
    where = str(lora.part.path)
    shapes = {
        key: tuple(lora.tensors[network][layer][role].shape)
        for layer, roles in lora.content.layers[network].items()
        for role, key in roles.items()
    }
    for named, found in lora_shapes.fit(lora.content, network, shapes, layers, where):
        tensors = lora.tensors[network][named]
        name = found.name if found.name in modules else f"text_model.{found.name}"  # transformers before 5.6
        rank = _rank(tensors)
        alpha = None if "alpha" not in tensors or rank is None else tensors["alpha"].item()
        factor = 1.0 if alpha is None or rank is None else alpha / rank
        record = lora.peft or peft_config.of_network(lora.metadata, network)
        if "alpha" not in tensors and record is not None:
            factor = peft_config.scale_of(record, found.name, rank)
            if lora.peft is not None and rank is not None:
                alpha = factor * rank
        if "scalar" in tensors:
            factor *= tensors["scalar"].item()
        yield _Layer(lora, NetworkLayer(name, found.weight, found.bias), tensors, alpha, factor)


def _rank(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Return the rank by which alpha is divided; None if there is none, as for two full factors of LoKr."""
    role = lora_files.rank_role(tensors)
    return None if role is None else len(tensors[role])


def _inject(lora: Lora, name: str, network: str, target: Any, fitted: list[_Layer], *, all_plain: bool) -> None:
    """Pass a LoRA to diffusers, with full layer names so that diffusers does not have to guess them."""
    state = {}
    for layer in fitted:
        weight = target.get_submodule(layer.target.name).weight
        down, up = (layer.tensors[role] for role in ("down", "up"))
        sides = lora_shapes.channels({"down": tuple(down.shape), "up": tuple(up.shape)}, layer.target)
        # Copy: a tensor would otherwise remain a view of the file, which may change.
        down = down.to(weight.dtype, copy=True).reshape(len(down), *sides[1:])
        up = up.to(weight.dtype, copy=True).reshape(*up.shape[:2], *(1 for _ in weight.shape[2:]))
        # diffusers does not read PEFT's names of a text encoder's LoRA that changes no attention.
        endings = ("lora_A", "lora_B") if network == UNET else ("lora_linear_layer.down", "lora_linear_layer.up")
        for ending, matrix in zip(endings, (_padded(down, weight.shape[1]), up), strict=True):
            state[f"{network}.{layer.target.name}.{ending}.weight"] = matrix
    # The scale of PEFT's record is in the alphas. The record may describe other layers, or lack what diffusers reads.
    alphas = _alphas(network, fitted, exact=not all_plain or lora.metadata is not None)
    options = {"adapter_name": name, "metadata": None, "low_cpu_mem_usage": True}
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # diffusers warns if there is a LoRA already; several are intended
            if network == UNET:
                StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, target, **options)
            else:
                StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, alphas, target, **options)
    except (RuntimeError, TypeError, ValueError) as err:
        raise ConfigError(f"cannot apply {lora.part.path}: {err}") from err


def _alphas(network: str, fitted: list[_Layer], *, exact: bool) -> dict[str, float] | None:
    """Return the alpha of every layer, or its rank if it has none; None if no layer has an alpha.

    Args:
        network: `unet` or `text_encoder`.
        fitted: Layers that PEFT applies.
        exact: True to return alphas in every case, because PEFT's record also describes other layers.
    """
    if not exact and all(layer.alpha is None for layer in fitted):
        return None
    return {
        f"{network}.{layer.target.name}.alpha": float(len(layer.tensors["down"])) * layer.factor
        if layer.alpha is None
        else layer.alpha
        for layer in fitted
    }


# --- deltas that are merged ------------------------------------------------------------------------------------------


def _merge(layers: Sequence[_Layer], modules: Mapping[str, Any]) -> None:
    """Add the deltas of all layers to the weights and biases; one rounding per weight."""
    for name in dict.fromkeys(layer.target.name for layer in layers):
        module = modules[name]
        base = module.weight.data.double()
        own_bias = getattr(module, "bias", None)  # an embedding has none
        total, bias = base.clone(), None if own_bias is None else own_bias.data.double()
        for layer in (each for each in layers if each.target.name == name):
            delta = _delta(layer, base)
            if delta is not None and delta.ndim == 1:  # a norm
                total += delta
            elif delta is not None:
                total[:, : delta.shape[1]] += delta
            if bias is not None:
                bias += _bias_delta(layer)
        module.weight.data = total.to(module.weight.dtype)
        if bias is not None:
            module.bias.data = bias.to(module.bias.dtype)


def _bias_delta(layer: _Layer) -> torch.Tensor | float:
    change: torch.Tensor | float = 0.0
    for role, factor in (("diff_b", 1.0), ("b_norm", 1.0), ("up_bias", layer.factor)):
        if role in layer.tensors:
            change = change + layer.tensors[role].double().flatten() * (factor * layer.lora.scale)
    return change


def _delta(layer: _Layer, base: torch.Tensor) -> torch.Tensor | None:
    """Return the change of a weight, in float64; None if it does not change."""
    if layer.lora.scale == 0:  # LyCORIS would add the matrices of a DoRA without their norm
        return None
    tensors = {role: tensor.double() for role, tensor in layer.tensors.items()}
    sides = lora_shapes.channels({role: tuple(tensor.shape) for role, tensor in tensors.items()}, layer.target)
    delta = _unscaled(tensors)
    if delta is None:
        return None
    scale = layer.lora.scale
    delta = delta.reshape(sides) * layer.factor
    role = next((role for role in _SCALED_BY_NORM if role in tensors), None)
    if role is None:
        return delta * scale
    own = base[:, : sides[1]]
    magnitude = tensors[role]
    if role == "magnitude":
        return _decomposed(own, own + delta * scale, magnitude, by_input=False, scale=1.0) - own
    has_row = magnitude.ndim > 1 and len(magnitude) == 1 and magnitude.shape[1] == own.shape[1]
    by_input = has_row or magnitude.numel() != len(own)
    return _decomposed(own, own + delta, magnitude, by_input=by_input, scale=scale) - own


def _unscaled(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the delta without alpha and scale; it has the elements of the weight, but may be flattened."""
    whole = next((tensors[role] for role in ("diff", "w_norm") if role in tensors), None)
    if whole is not None:
        return whole
    if "down" in tensors:
        down, up = tensors["down"].flatten(1), tensors["up"].flatten(1)
        return _tucker(tensors["mid"], up.T, down) if "mid" in tensors else up @ down
    if "hada_w1_a" in tensors:
        first, second = (_factor(tensors, f"hada_w{each}", f"hada_t{each}") for each in "12")
        return first * second
    if any(role.startswith("lokr_") for role in tensors):
        left, right = _factor(tensors, "lokr_w1", ""), _factor(tensors, "lokr_w2", "lokr_t2")
        return torch.kron(left.flatten(1), right.flatten(1).contiguous())
    return None


def _factor(tensors: Mapping[str, torch.Tensor], name: str, core: str) -> torch.Tensor:
    """Return a factor of LoHa or LoKr: stored whole, as a product of two matrices, or with a core between them."""
    if name in tensors:
        return tensors[name]
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return _tucker(tensors[core], left, right) if core in tensors else left.flatten(1) @ right.flatten(1)


def _tucker(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product of a core (i, j, ...) with matrices (i, out) and (j, in): (out, in, ...)."""
    return torch.einsum("ij...,ip,jr->pr...", core, left, right)


def _decomposed(
    own: torch.Tensor, changed: torch.Tensor, magnitude: torch.Tensor, *, by_input: bool, scale: float
) -> torch.Tensor:
    """Return the weight of DoRA: the direction of `changed`, with the trained magnitude.

    The norm is that of each output, or of each input for files of older LyCORIS, whose magnitude has the shape (1, in).
    With a scale other than 1, PEFT scales the matrices before this; LyCORIS since 3.1 interpolates the factor instead.
    """
    axis = 1 if by_input else 0
    others = [each for each in range(own.ndim) if each != axis]
    norm = changed.square().sum(others, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    sides = [1] * own.ndim
    sides[axis] = own.shape[axis]
    factor = magnitude.reshape(sides) / norm
    return changed * (scale * (factor - 1) + 1)


def _padded(down: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the matrix with zeros for the input channels that it does not have."""
    if down.shape[1] == channels:
        return down
    padded = down.new_zeros(down.shape[0], channels, *down.shape[2:])
    padded[:, : down.shape[1]] = down
    return padded
