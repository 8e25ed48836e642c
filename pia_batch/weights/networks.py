"""Tensors of the networks of a model, by name and shape, from a network's config; without torch.

The names are those of diffusers and transformers. Tests compare them with the networks that these libraries build.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Settings = dict[str, Any]

_FEED_FORWARD = 4
"""Width of a transformer's feed-forward layer, in widths of the transformer."""

_GATED = 2 * _FEED_FORWARD
"""Width of its first layer: GEGLU has a value and a gate."""

MAX_TENSORS = 100_000
"""Largest number of tensors of a network. That of Stable Diffusion 1.5 with motion modules has some 1,300; a config
whose counts are damaged would otherwise have no end."""

POSITIONS = ("pos_embed.pe", "pos_encoder.pe")
"""Endings of the names of frame positions, which are constants: the network computes them if a file lacks them."""


def shapes_of(name: str, settings: Settings) -> Shapes:
    """Return the shapes of all tensors of a network, by their names in diffusers or transformers.

    Args:
        name: Name of the part: `unet`, `vae`, `text_encoder` or `motion_adapter`.
        settings: Content of the network's `config.json`.

    Raises:
        ValueError: The config names a block that this function does not know, or lists of different lengths.
        TypeError: A setting has another type than it must have.
    """
    return _NETWORKS[name](settings)


def per_block(value: Any, count: int) -> list[Any]:
    """Return one value per block: a single value stands for all blocks.

    Raises:
        ValueError: There are fewer or more values than blocks.
    """
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        msg = f"got {len(value)} values for {count} blocks"
        raise ValueError(msg)
    return list(value)


def _layer(shapes: Shapes, name: str, outputs: int, *inputs: int, bias: bool = True) -> None:
    if len(shapes) > MAX_TENSORS:
        msg = f"it has more than {MAX_TENSORS} tensors"
        raise ValueError(msg)
    shapes[f"{name}.weight"] = (outputs, *inputs)
    if bias:
        shapes[f"{name}.bias"] = (outputs,)


def _norm(shapes: Shapes, name: str, channels: int) -> None:
    _layer(shapes, name, channels)


def _resnet(shapes: Shapes, name: str, inputs: int, outputs: int, time: int | None) -> None:
    _norm(shapes, f"{name}.norm1", inputs)
    _layer(shapes, f"{name}.conv1", outputs, inputs, 3, 3)
    if time is not None:
        _layer(shapes, f"{name}.time_emb_proj", outputs, time)
    _norm(shapes, f"{name}.norm2", outputs)
    _layer(shapes, f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        _layer(shapes, f"{name}.conv_shortcut", outputs, inputs, 1, 1)


def _transformer_block(shapes: Shapes, name: str, width: int, context: int) -> None:
    """Add self-attention, attention to `context` and a feed-forward network."""
    for norm in ("norm1", "norm2", "norm3"):
        _norm(shapes, f"{name}.{norm}", width)
    for attention, reads in (("attn1", width), ("attn2", context)):
        _layer(shapes, f"{name}.{attention}.to_q", width, width, bias=False)
        _layer(shapes, f"{name}.{attention}.to_k", width, reads, bias=False)
        _layer(shapes, f"{name}.{attention}.to_v", width, reads, bias=False)
        _layer(shapes, f"{name}.{attention}.to_out.0", width, width)
    _layer(shapes, f"{name}.ff.net.0.proj", _GATED * width, width)
    _layer(shapes, f"{name}.ff.net.2", width, _FEED_FORWARD * width)


def _motion_module(shapes: Shapes, name: str, channels: int, depth: int, heads: int, frames: int) -> None:
    width = channels // heads * heads
    _norm(shapes, f"{name}.norm", channels)
    _layer(shapes, f"{name}.proj_in", width, channels)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        _transformer_block(shapes, block, width, width)
        shapes[f"{block}.pos_embed.pe"] = (1, frames, width)
    _layer(shapes, f"{name}.proj_out", channels, width)


class _UNet:
    """Builder of the tensors of a UNet, with or without motion modules."""

    def __init__(self, settings: Settings) -> None:
        get = settings.get
        self.shapes: Shapes = {}
        self.moves = get("_class_name") == "UNetMotionModel"
        self.channels: list[int] = list(get("block_out_channels") or (320, 640, 1280, 1280))
        count = len(self.channels)
        self.layers = per_block(get("layers_per_block", 2), count)
        self.depths = per_block(get("transformer_layers_per_block", 1), count)
        self.context: int = get("cross_attention_dim", 1280)
        heads = get("num_attention_heads") or (8 if self.moves else get("attention_head_dim", 8))
        self.heads = per_block(heads, count)
        self.linear = bool(get("use_linear_projection"))
        self.time = 4 * self.channels[0]
        self.frames: int = get("motion_max_seq_length", 32)
        self.motion_heads = per_block(get("motion_num_attention_heads", 8), count)
        self.motion_depths = per_block(get("temporal_transformer_layers_per_block", 1), count)
        self.settings = settings

    def build(self) -> Shapes:
        """Return all tensors."""
        get, first, shapes = self.settings.get, self.channels[0], self.shapes
        _layer(shapes, "conv_in", first, get("in_channels", 4), 3, 3)
        _layer(shapes, "time_embedding.linear_1", self.time, first)
        _layer(shapes, "time_embedding.linear_2", self.time, self.time)
        self._down()
        self._mid()
        self._up()
        _norm(shapes, "conv_norm_out", first)
        _layer(shapes, "conv_out", get("out_channels", 4), first, 3, 3)
        return shapes

    def _attends(self, key: str, side: str) -> list[bool]:
        ending = "Motion" if self.moves else "2D"
        known = {f"CrossAttn{side}Block{ending}": True, f"{side}Block{ending}": False}
        shipped = [True, True, True, False] if side == "Down" else [False, True, True, True]
        names = self.settings.get(key)
        found = shipped if names is None else [_known(known, each) for each in names]
        if len(found) != len(self.channels):
            msg = f"{key} has {len(found)} blocks, block_out_channels {len(self.channels)}"
            raise ValueError(msg)
        return found

    def _down(self) -> None:
        inputs = self.channels[0]
        for block, attends in enumerate(self._attends("down_block_types", "Down")):
            outputs, name = self.channels[block], f"down_blocks.{block}"
            for layer in range(self.layers[block]):
                _resnet(self.shapes, f"{name}.resnets.{layer}", inputs, outputs, self.time)
                self._attention(f"{name}.attentions.{layer}", block, self.depths[block], attends=attends)
                self._motion(f"{name}.motion_modules.{layer}", block, self.motion_depths[block])
                inputs = outputs
            if block < len(self.channels) - 1:
                _layer(self.shapes, f"{name}.downsamplers.0.conv", outputs, outputs, 3, 3)
            inputs = outputs

    def _mid(self) -> None:
        width, layers = self.channels[-1], self.settings.get("mid_block_layers", 1) if self.moves else 1
        own = self.settings.get("transformer_layers_per_mid_block") if self.moves else None
        depth = self.depths[-1] if own is None else own
        moves = self.moves and self.settings.get("use_motion_mid_block", True)
        temporal = self.settings.get("temporal_transformer_layers_per_mid_block", 1)
        for layer in range(layers + 1):
            _resnet(self.shapes, f"mid_block.resnets.{layer}", width, width, self.time)
        for layer, each in enumerate(per_block(depth, layers)):
            self._attention(f"mid_block.attentions.{layer}", -1, each, attends=True)
        for layer, each in enumerate(per_block(temporal, layers) if moves else ()):
            self._motion(f"mid_block.motion_modules.{layer}", -1, each)

    def _up(self) -> None:
        last = len(self.channels) - 1
        depths = self._reversed("reverse_transformer_layers_per_block", self.depths)
        motion_depths = self._reversed("reverse_temporal_transformer_layers_per_block", self.motion_depths)
        outputs = self.channels[-1]
        for number, attends in enumerate(self._attends("up_block_types", "Up")):
            block, name, before = last - number, f"up_blocks.{number}", outputs
            outputs, skipped = self.channels[block], self.channels[max(block - 1, 0)]
            for layer in range(self.layers[block] + 1):
                inputs = before if layer == 0 else outputs
                inputs += skipped if layer == self.layers[block] else outputs
                _resnet(self.shapes, f"{name}.resnets.{layer}", inputs, outputs, self.time)
                self._attention(f"{name}.attentions.{layer}", block, depths[number], attends=attends)
                self._motion(f"{name}.motion_modules.{layer}", block, motion_depths[number])
            if number < last:
                _layer(self.shapes, f"{name}.upsamplers.0.conv", outputs, outputs, 3, 3)

    def _reversed(self, key: str, values: Sequence[Any]) -> list[Any]:
        own = self.settings.get(key)
        return list(reversed(values)) if own is None else per_block(own, len(values))

    def _attention(self, name: str, block: int, depth: Any, *, attends: bool) -> None:
        if not attends:
            return
        channels, heads = self.channels[block], self.heads[block]
        width, sides = channels // heads * heads, () if self.linear else (1, 1)
        _norm(self.shapes, f"{name}.norm", channels)
        _layer(self.shapes, f"{name}.proj_in", width, channels, *sides)
        for number in range(depth):
            _transformer_block(self.shapes, f"{name}.transformer_blocks.{number}", width, self.context)
        _layer(self.shapes, f"{name}.proj_out", channels, width, *sides)

    def _motion(self, name: str, block: int, depth: Any) -> None:
        if self.moves:
            _motion_module(self.shapes, name, self.channels[block], depth, self.motion_heads[block], self.frames)


def _known(known: dict[str, bool], name: str) -> bool:
    if name not in known:
        msg = f"its block {name} is none of {', '.join(known)}"
        raise ValueError(msg)
    return known[name]


def _motion_adapter(settings: Settings) -> Shapes:
    get, shapes = settings.get, dict[str, Shape]()
    channels = list(get("block_out_channels") or (320, 640, 1280, 1280))
    count = len(channels)
    layers = per_block(get("motion_layers_per_block", 2), count)
    depths = per_block(get("motion_transformer_layers_per_block", 1), count)
    heads = per_block(get("motion_num_attention_heads", 8), count)
    frames = get("motion_max_seq_length", 32)
    inputs = get("conv_in_channels")
    if inputs:
        _layer(shapes, "conv_in", channels[0], inputs, 3, 3)
    for block in range(count):
        for side, place, extra in (("down", block, 0), ("up", count - 1 - block, 1)):
            for layer in range(layers[block] + extra):
                name = f"{side}_blocks.{place}.motion_modules.{layer}"
                _motion_module(shapes, name, channels[block], depths[block], heads[block], frames)
    if get("use_motion_mid_block", True):
        number = get("motion_mid_block_layers_per_block", 1)
        for layer, depth in enumerate(per_block(get("motion_transformer_layers_per_mid_block", 1), number)):
            _motion_module(shapes, f"mid_block.motion_modules.{layer}", channels[-1], depth, heads[-1], frames)
    return shapes


def _vae(settings: Settings) -> Shapes:
    get, shapes = settings.get, dict[str, Shape]()
    channels: list[int] = list(get("block_out_channels", (64,)))
    layers, latents = get("layers_per_block", 1), get("latent_channels", 4)
    for key, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        names = get(key, (only,))
        if len(names) != len(channels) or any(not _known({only: True}, each) for each in names):
            msg = f"{key} has {len(names)} blocks, block_out_channels {len(channels)}"
            raise ValueError(msg)
    attends = get("mid_block_add_attention", True)
    _layer(shapes, "encoder.conv_in", channels[0], get("in_channels", 3), 3, 3)
    _vae_blocks(shapes, "encoder.down_blocks", "downsamplers", channels, layers)
    _vae_ends(shapes, "encoder", channels[-1], channels[-1], 2 * latents, attends=attends)
    _layer(shapes, "decoder.conv_in", channels[-1], latents, 3, 3)
    _vae_blocks(shapes, "decoder.up_blocks", "upsamplers", channels[::-1], layers + 1)
    _vae_ends(shapes, "decoder", channels[-1], channels[0], get("out_channels", 3), attends=attends)
    if get("use_quant_conv", True):
        _layer(shapes, "quant_conv", 2 * latents, 2 * latents, 1, 1)
    if get("use_post_quant_conv", True):
        _layer(shapes, "post_quant_conv", latents, latents, 1, 1)
    return shapes


def _vae_blocks(shapes: Shapes, name: str, resampler: str, channels: list[int], layers: int) -> None:
    inputs = channels[0]
    for block, outputs in enumerate(channels):
        for layer in range(layers):
            _resnet(shapes, f"{name}.{block}.resnets.{layer}", inputs, outputs, None)
            inputs = outputs
        inputs = outputs
        if block < len(channels) - 1:
            _layer(shapes, f"{name}.{block}.{resampler}.0.conv", outputs, outputs, 3, 3)


def _vae_ends(shapes: Shapes, side: str, middle: int, inputs: int, outputs: int, *, attends: bool) -> None:
    """Add the middle block, and the last layers from `inputs` to `outputs` channels."""
    for layer in (0, 1):
        _resnet(shapes, f"{side}.mid_block.resnets.{layer}", middle, middle, None)
    if attends:
        _norm(shapes, f"{side}.mid_block.attentions.0.group_norm", middle)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            _layer(shapes, f"{side}.mid_block.attentions.0.{name}", middle, middle)
    _norm(shapes, f"{side}.conv_norm_out", inputs)
    _layer(shapes, f"{side}.conv_out", outputs, inputs, 3, 3)


def text_settings(settings: Settings) -> Settings:
    """Return the settings of the text tower, which are inside the config of a whole CLIP model."""
    inner = settings.get("text_config")
    return inner if isinstance(inner, dict) else settings


def _text_encoder(settings: Settings) -> Shapes:
    get, shapes = text_settings(settings).get, dict[str, Shape]()
    width, inner = get("hidden_size", 512), get("intermediate_size", 2048)
    shapes["embeddings.token_embedding.weight"] = (get("vocab_size", 49408), width)
    shapes["embeddings.position_embedding.weight"] = (get("max_position_embeddings", 77), width)
    for number in range(get("num_hidden_layers", 12)):
        name = f"encoder.layers.{number}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            _layer(shapes, f"{name}.self_attn.{projection}", width, width)
        _norm(shapes, f"{name}.layer_norm1", width)
        _layer(shapes, f"{name}.mlp.fc1", inner, width)
        _layer(shapes, f"{name}.mlp.fc2", width, inner)
        _norm(shapes, f"{name}.layer_norm2", width)
    _norm(shapes, "final_layer_norm", width)
    return shapes


_NETWORKS: dict[str, Callable[[Settings], Shapes]] = {
    "unet": lambda settings: _UNet(settings).build(),
    "vae": _vae,
    "text_encoder": _text_encoder,
    "motion_adapter": _motion_adapter,
}
