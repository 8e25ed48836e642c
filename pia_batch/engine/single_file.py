"""Single-file networks: loads weights from one safetensors file, in the original layout or in that of diffusers.

Every tensor of the network comes from the file. A missing tensor, or one that the network does not have, is an error;
no weight stays random and none is dropped. Only the file and the part's config are read.
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
"""Sines and cosines of AnimateDiff; the network computes them if the file does not hold them."""


@dataclass(frozen=True)
class _Layout:
    """Names of the tensors of one kind of network in a file.

    Attributes:
        prefixes: Possible prefixes of the names; the first one that any name has is used.
        kept: True if names keep the prefix, because `convert` needs it.
        spare: Beginnings of names, without prefix, of tensors that are not weights of the network.
        convert: Function that converts tensors of the original layout, with the network's config, to the layout of
            diffusers.
    """

    prefixes: tuple[str, ...]
    kept: bool
    spare: tuple[str, ...]
    convert: Callable[[Tensors, Any], Tensors]


def _flat(tensors: Tensors, config: Any) -> Tensors:
    """Remove the prefix that CLIP's text tower had inside its model."""
    del config
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


_LAYOUTS: dict[Any, _Layout] = {
    diffusers.UNet2DConditionModel: _Layout(
        ("model.diffusion_model.",), kept=True, spare=(), convert=original.convert_ldm_unet_checkpoint
    ),
    diffusers.AutoencoderKL: _Layout(
        ("first_stage_model.", ""),
        kept=True,
        spare=("loss.", "model_ema."),  # used in training only
        convert=original.convert_ldm_vae_checkpoint,
    ),
    transformers.CLIPTextModel: _Layout(
        ("cond_stage_model.transformer.",),
        kept=False,
        # Constants, and tensors that CLIP uses for other outputs than hidden states.
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
    """Return the network of a part with the layout `single_file`, on the CPU, in its own memory.

    Args:
        kind: UNet2DConditionModel, AutoencoderKL or MotionAdapter of diffusers, or CLIPTextModel of transformers.
        part: Part of that kind; its config defines the size of the network.
        dtype: Dtype of the loaded weights, whatever the dtype in the file.

    Raises:
        ConfigError: Tensors are missing, unexpected, or of another shape.
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
    # Copy: a tensor of the right dtype would otherwise remain a view of the file, which may change.
    own = {name: tensor.to(dtype, copy=True) for name, tensor in converted.items()}
    network.load_state_dict(own, strict=False, assign=True)
    return network.to(dtype)


def _converted(part: Component, layout: _Layout, held: Tensors, config: Any) -> Tensors:
    """Convert to the names of diffusers.

    For missing tensors, the conversion of diffusers returns None in some cases and raises KeyError in others.
    """
    try:
        converted = layout.convert(dict(held), config)
    except KeyError as err:
        raise ConfigError(
            f"{part.path}: missing tensor {err.args[0]}; the file is incomplete, or {_remedy(part)}"
        ) from None
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def _empty(kind: Any, part: Component) -> Any:
    """Return the network without memory for its weights, but with the buffers that it computes."""
    folder = part.folder if part.config is None else part.config.folder
    with accelerate.init_empty_weights():
        if kind is transformers.CLIPTextModel:
            return kind(transformers.CLIPTextConfig.from_pretrained(folder, local_files_only=True))
        return kind.from_config(kind.load_config(folder, local_files_only=True))


def _tensors(part: Component, layout: _Layout) -> Tensors:
    """Return this network's tensors in the file, as views of it."""
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
            f"{part.path}: missing tensors of the {kind.__name__}: {_listed(missing)}; the file is incomplete, or "
            f"{_remedy(part)}"
        )
    placed = {tensor.data_ptr() for name, tensor in converted.items() if name in expected}
    others = [name for name in held if held[name].data_ptr() not in placed and not name.endswith(_POSITIONS)]
    if others:
        raise ConfigError(f"{part.path}: unexpected tensors for a {kind.__name__}: {_listed(others)}; {_remedy(part)}")
    wrong = [
        f"{name} ({_sides(converted[name])} instead of {_sides(expected[name])})"
        for name in expected
        if name in converted and converted[name].shape != expected[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"{part.path}: tensors with other shapes than in the {kind.__name__}: {_listed(wrong)}; {_remedy(part)}"
        )


def _remedy(part: Component) -> str:
    folder = part.folder if part.config is None else part.config.folder
    return f"it does not match the config in {folder}; set model.config to the matching one"


def _sides(tensor: torch.Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
