"""Networks whose weights are in one safetensors file, in the original layout or in that of diffusers.

Every tensor of the network comes from the file: one that is missing, or that the network has no place for, is an
error, never a random or a dropped weight. Nothing but the file and the part's config is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils as original
from safetensors import SafetensorError, safe_open

from pia_batch.errors import ConfigError
from pia_batch.weights.components import Component

Tensors = dict[str, torch.Tensor]

_MOST_LISTED = 5
_POSITIONS = ("pos_embed.pe", "pos_encoder.pe")
"""Sines and cosines of AnimateDiff, which the network computes where its file does not have them."""


@dataclass(frozen=True)
class _Layout:
    """How the tensors of one kind of network are found in a file.

    Attributes:
        prefixes: what the names of this network's tensors begin with; the first that any name begins with counts.
        kept: whether names keep the prefix, for `convert` to see.
        spare: beginnings of names, without prefix, of what is no weight of the network.
        convert: tensors in the original layout and the network's config to tensors in that of diffusers.
    """

    prefixes: tuple[str, ...]
    kept: bool
    spare: tuple[str, ...]
    convert: Callable[[Tensors, Any], Tensors]


def _flat(tensors: Tensors, config: Any) -> Tensors:
    """CLIP's text tower without the name that it once had inside its model."""
    del config
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


_LAYOUTS: dict[Any, _Layout] = {
    diffusers.UNet2DConditionModel: _Layout(
        ("model.diffusion_model.",), kept=True, spare=(), convert=original.convert_ldm_unet_checkpoint
    ),
    diffusers.AutoencoderKL: _Layout(
        ("first_stage_model.", ""),
        kept=True,
        spare=("loss.", "model_ema."),  # of its training
        convert=original.convert_ldm_vae_checkpoint,
    ),
    transformers.CLIPTextModel: _Layout(
        ("cond_stage_model.transformer.",),
        kept=False,
        # Constants, and what CLIP needs for other ends than its hidden states.
        spare=("text_model.embeddings.position_ids", "embeddings.position_ids", "text_projection", "logit_"),
        convert=_flat,
    ),
    diffusers.MotionAdapter: _Layout(
        ("module.", ""),
        kept=False,
        spare=(),
        convert=lambda tensors, _: original.convert_animatediff_checkpoint_to_diffusers(tensors),
    ),
}


def read(kind: Any, part: Component, dtype: torch.dtype) -> Any:
    """The network of a part with the layout `single_file`, on the CPU, in memory of its own.

    Args:
        kind: UNet2DConditionModel, AutoencoderKL or MotionAdapter of diffusers, or transformers' CLIPTextModel.
        part: of that kind; its config says how large the network is.
        dtype: of the weights, whatever the file's is.

    Raises:
        ConfigError: the file lacks tensors, has others, or some of another shape.
    """
    layout = _LAYOUTS[kind]
    network = _empty(kind, part)
    expected = network.state_dict()
    held = _tensors(part, layout)
    fits = {name for name in expected if not name.endswith(_POSITIONS)} <= set(held)
    converted = dict(held) if fits else _converted(part, layout, held, network.config)
    if "text_model.final_layer_norm.weight" in expected:  # transformers before 5.6
        converted = {f"text_model.{name}": tensor for name, tensor in converted.items()}
    _check(part, kind, held, converted, expected)
    # Copied, as a tensor of the right dtype would otherwise stay a window on the file, which may change.
    own = {name: tensor.to(dtype, copy=True) for name, tensor in converted.items()}
    network.load_state_dict(own, strict=False, assign=True)
    return network.to(dtype)


def _converted(part: Component, layout: _Layout, held: Tensors, config: Any) -> Tensors:
    """In the names of diffusers, whose conversion meets some missing tensors with None, and others with a KeyError."""
    try:
        converted = layout.convert(dict(held), config)
    except KeyError as err:
        raise ConfigError(f"{part.path} lacks {err.args[0]}; it is not whole, or {_remedy(part)}") from None
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def _empty(kind: Any, part: Component) -> Any:
    """The network without memory for its weights, but with the buffers that it computes."""
    folder = part.folder if part.config is None else part.config.folder
    with accelerate.init_empty_weights():
        if kind is transformers.CLIPTextModel:
            return kind(transformers.CLIPTextConfig.from_pretrained(folder, local_files_only=True))
        return kind.from_config(kind.load_config(folder, local_files_only=True))


def _tensors(part: Component, layout: _Layout) -> Tensors:
    """What the file has of this network, as windows on it."""
    try:
        with safe_open(part.path, "pt") as file:
            names = list(file.keys())
            prefix = next((each for each in layout.prefixes if any(name.startswith(each) for name in names)), None)
            if prefix is None:
                return {}
            cut = "" if layout.kept else prefix
            return {
                name.removeprefix(cut): file.get_tensor(name)
                for name in names
                if name.startswith(prefix) and not name.removeprefix(prefix).startswith(layout.spare)
            }
    except (OSError, SafetensorError) as err:
        raise ConfigError(f"cannot read {part.path}: {err}") from err


def _check(part: Component, kind: Any, held: Tensors, converted: Tensors, expected: Tensors) -> None:
    missing = [name for name in expected if name not in converted and not name.endswith(_POSITIONS)]
    if missing:
        raise ConfigError(
            f"{part.path} lacks {_listed(missing)} of the {kind.__name__}; it is not whole, or {_remedy(part)}"
        )
    placed = {tensor.data_ptr() for name, tensor in converted.items() if name in expected}
    others = [name for name in held if held[name].data_ptr() not in placed and not name.endswith(_POSITIONS)]
    if others:
        raise ConfigError(
            f"{part.path} has {_listed(others)}, for which the {kind.__name__} has no place; {_remedy(part)}"
        )
    wrong = [
        f"{name} ({_sides(converted[name])} instead of {_sides(expected[name])})"
        for name in expected
        if name in converted and converted[name].shape != expected[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"{part.path} has tensors of another shape than the {kind.__name__}: {_listed(wrong)}; {_remedy(part)}"
        )


def _remedy(part: Component) -> str:
    folder = part.folder if part.config is None else part.config.folder
    return f"it does not belong to the config in {folder}; name the right one in model.config"


def _sides(tensor: torch.Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
