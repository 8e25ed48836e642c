"""Layers of a network that a LoRA may change, found by any of their names. No torch.

Sources of the names: CompVis/stable-diffusion for original layer names, guoyww/AnimateDiff for motion modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pia_batch.weights.lora_files import TEXT_ENCODER, Shape


@dataclass(frozen=True, slots=True)
class NetworkLayer:
    """Layer of a network.

    Attributes:
        name: Name of the layer in diffusers or transformers, without `text_model.`.
        weight: Shape of its weight.
        bias: Shape of its bias; None if it has none.
    """

    name: str
    weight: Shape
    bias: Shape | None


class NetworkLayers:
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
                self._by_name[_current_motion(_flat(layer))] = NetworkLayer(layer, shape, bias)
        self._per_block = _per_block(shapes)

    @property
    def is_known(self) -> bool:
        """True if the network's layers have names that this class can find."""
        return any(name in self._by_name for name in ("conv_in", "final_layer_norm"))

    @property
    def has_motion(self) -> bool:
        """True if there are layers of motion modules."""
        return any("motion_modules" in name for name in self._by_name)

    def has_no_place_for(self, named: str) -> bool:
        """Return True for a layer of the middle block's motion module, if only the other blocks have such modules.

        PIA has none there; the motion LoRAs of AnimateDiff v2 were trained on networks that do.
        """
        return self.has_motion and _in_middle(_flat(named)) and not any(map(_in_middle, self._by_name))

    def find(self, named: str) -> NetworkLayer | None:
        """Return the layer that a file names: with dots or underscores, by its original or its current name."""
        flat = _flat(named)
        if self._network == TEXT_ENCODER:
            return self._by_name.get(flat.removeprefix("text_model_"))
        if flat not in self._by_name:
            flat = _flat(from_original(named, self._per_block) or flat)
        return self._by_name.get(_current_motion(flat))


def _in_middle(flat: str) -> bool:
    return flat.startswith("mid_block_motion_modules_")


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
