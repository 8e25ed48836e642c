"""Optimized call of a `UNetMotionModel`: the weights and arithmetic of diffusers with less overhead.

Activations stay channels-last, so that convolutions and attention over pixels, text and frames read the same memory
without permutation. The two halves of guidance share their computation until the first text attention. Divisions by one
are left out. The time is embedded once for each sample rather than once for each frame.

Source: diffusers 0.42.1 `models/unets/unet_motion_model.py` and the blocks that it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNetMotionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.torch_utils import apply_freeu
from torch import nn
from torch.nn import functional

from pia_batch.engine import attention, image_prompts
from pia_batch.engine.arithmetic import OriginalUNet, norms_over_frames
from pia_batch.engine.prompt_travel import Text
from pia_batch.engine.windows import Fusion, Windows


def supports(unet: Any) -> bool:
    """Return True if `run` computes the same as this network's own call, and is faster.

    False where `is_plain` is, and for half precision on a CPU, where `run` is not faster. An `OriginalUNet` has no call
    of its own: its half precision is supported on a CPU, too.
    """
    return is_plain(unet) and (
        unet.device.type != "cpu" or unet.dtype.itemsize > torch.half.itemsize or norms_over_frames(unet)
    )


def is_plain(unet: Any) -> bool:
    """Return True if `run` computes the same as this network's own call.

    False for a wrapper around a network, for structures that no PIA checkpoint has, and for attention with another
    processor.
    """
    if type(unet) not in (UNetMotionModel, OriginalUNet):
        return False
    config = unet.config
    return (
        config.act_fn == "silu"
        and config.norm_num_groups is not None
        and config.addition_embed_type is None
        and config.time_cond_proj_dim is None
        and config.encoder_hid_dim_type in (None, "ip_image_proj")
        and all(_is_plain_part(module) for module in unet.modules())
    )


@dataclass(frozen=True)
class Conditions:
    """Inputs of a batch of samples that are the same at every step.

    Attributes:
        rows: Index of the row whose latents each sample uses; None: sample k is row k.
        read: Keys and values of each cross-attention, by its name.
        image_scales: Weight of each sample's image prompt; None without an IP-Adapter.
        sliding: Windows of FreeNoise, in which frames attend to frames; None: each frame attends to all.
        scaled: True if the LoRA layers have a scale for each sample, which makes another graph.
        travel: Samples whose text changes from frame to frame; None if there are none.
    """

    rows: torch.Tensor | None
    read: dict[str, attention.Read] = field(default_factory=dict)
    image_scales: torch.Tensor | None = None
    sliding: Windows | None = None
    scaled: bool = False
    travel: attention.Travelling | None = None


def prepare(
    unet: Any,
    rows: Sequence[int],
    num_rows: int,
    texts: Sequence[Text],
    images: image_prompts.ImagePromptAttention | None = None,
    sliding: Windows | None = None,
) -> Conditions:
    """Compute the inputs that stay the same from step to step.

    Args:
        unet: Network that `is_plain` accepts.
        rows: Index of the row of each sample.
        num_rows: Number of rows.
        texts: Text of each sample.
        images: Image prompts of the samples; None without an IP-Adapter.
        sliding: Windows of FreeNoise; None: no FreeNoise.
    """
    shared = list(rows) != list(range(num_rows))
    prompts = scales = None
    if images is not None and images.added_conditions is not None:
        prompts = unet.encoder_hid_proj(images.added_conditions["image_embeds"])[0].flatten(1, 2)
        scales = images.scales
    read = {}
    for name, module in _cross_attentions(unet):
        text, key_prompts = attention.text_states(module, texts)
        image = None
        if prompts is not None and attention.reads_images(module):
            image = attention.image_states(module, prompts)
        read[name] = attention.Read(text, image, key_prompts)
    row_of_sample = torch.tensor(rows, device=unet.device) if shared else None
    return Conditions(row_of_sample, read, scales, sliding, travel=attention.travelling(texts))


def run(unet: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """Return the prediction for every sample.

    Args:
        unet: Network that `supports` accepts.
        sample: Latents and their conditions, (rows, frames, height, width, channels).
        timesteps: Timestep of each row, (rows,), on the sample's device.
        conditions: Result of `prepare` for this network.

    Returns:
        Tensor (samples, channels, frames, height, width), with unspecified strides.
    """
    return run_and_keep(unet, sample, timesteps, conditions, 0)[0]


def run_and_keep(
    unet: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions, layers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prediction, as `run`, and the input of the last `layers` layers.

    The input has the shape (samples x frames, channels, height, width).
    """
    call = _Call(unet, sample, timesteps, conditions)
    return call.run(sample.flatten(0, 1).permute(0, 3, 1, 2), layers)


def run_outermost(
    unet: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions, layers: int, deep: torch.Tensor
) -> torch.Tensor:
    """Return the prediction, as `run`, but run only the outermost layers.

    Args:
        unet: Network that `supports` accepts.
        sample: Latents and their conditions, (rows, frames, height, width, channels).
        timesteps: Timestep of each row, (rows,), on the sample's device.
        conditions: Result of `prepare` for this network.
        layers: Number of last layers to run.
        deep: Input of these layers, which `run_and_keep` returned at another timestep.

    Source: DeepCache, arXiv 2312.00858.
    """
    call = _Call(unet, sample, timesteps, conditions)
    noise: torch.Tensor = call.run(sample.flatten(0, 1).permute(0, 3, 1, 2), layers, deep)[0]
    return noise


class _Call:
    """State of one call. Images are (rows or samples x frames, channels, height, width), channels last in memory."""

    def __init__(self, unet: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> None:
        self._unet = unet
        self._conditions = conditions
        self._rows = conditions.rows
        self._frames = sample.shape[1]
        self._is_original = norms_over_frames(unet)
        embedded = unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))
        self._time = functional.silu(embedded)
        """Time embedding, (rows, features); (samples, features) once the samples are separate."""

    def run(self, image: Any, layers: int, deep: Any = None) -> tuple[Any, Any]:
        """Return the noise and the input of the last layers; compute that input where `deep` is None."""
        unet = self._unet
        image = unet.conv_in(image)
        skipped = [image]
        block = unet.up_blocks[-1]
        name = f"up_blocks.{len(unet.up_blocks) - 1}"
        last = len(block.resnets)
        first = max(0, last - layers)
        if deep is None:
            image = self._deep(image, skipped)
            deep = self._expand_to_samples(self._up_layers(name, block, image, skipped, range(first)))
        else:
            self._down_layers("down_blocks.0", unet.down_blocks[0], image, skipped, range(last - first - 1))
        self._expand_time()
        image = self._up_layers(name, block, deep, skipped, range(first, last))
        image = unet.conv_out(functional.silu(self._norm(unet.conv_norm_out, image), inplace=True))
        return image.unflatten(0, (-1, self._frames)).transpose(1, 2), deep

    def _deep(self, image: Any, skipped: list[Any]) -> Any:
        """Run all blocks except the last up block."""
        unet = self._unet
        for index, block in enumerate(unet.down_blocks):
            image = self._down(f"down_blocks.{index}", block, image, skipped)
        image = self._middle(image)
        for index, block in enumerate(unet.up_blocks[:-1]):
            image = self._up(f"up_blocks.{index}", block, image, skipped)
        return image

    def _down(self, name: str, block: Any, image: Any, skipped: list[Any]) -> Any:
        image = self._down_layers(name, block, image, skipped, range(len(block.resnets)))
        for downsampler in block.downsamplers or ():
            image = downsampler(image)
            skipped.append(image)
        return image

    def _down_layers(self, name: str, block: Any, image: Any, skipped: list[Any], layers: range) -> Any:
        for index in layers:
            image = self._resnet(block.resnets[index], image)
            image = self._attend(name, block, index, image)
            image = self._attend_over_frames(block.motion_modules[index], image)
            skipped.append(image)
        return image

    def _middle(self, image: Any) -> Any:
        block = self._unet.mid_block
        image = self._resnet(block.resnets[0], image)
        for index, resnet in enumerate(block.resnets[1:]):
            image = self._attend("mid_block", block, index, image)
            if hasattr(block, "motion_modules"):
                image = self._attend_over_frames(block.motion_modules[index], image)
            image = self._resnet(resnet, image)
        return image

    def _up(self, name: str, block: Any, image: Any, skipped: list[Any]) -> Any:
        image = self._up_layers(name, block, image, skipped, range(len(block.resnets)))
        for upsampler in block.upsamplers or ():
            image = upsampler.conv(functional.interpolate(image, size=skipped[-1].shape[2:], mode="nearest"))
        return image

    def _up_layers(self, name: str, block: Any, image: Any, skipped: list[Any], layers: range) -> Any:
        freeu = {key: getattr(block, key, None) for key in ("s1", "s2", "b1", "b2")}
        for index in layers:
            skip = skipped.pop()
            if len(skip) < len(image):
                skip = self._expand_to_samples(skip)
            if all(freeu.values()):  # FreeU writes into its input image, which may be kept
                image, skip = apply_freeu(block.resolution_idx, image.clone(), skip, **freeu)
            image = self._resnet(block.resnets[index], torch.cat([image, skip], dim=1))
            image = self._attend(name, block, index, image)
            image = self._attend_over_frames(block.motion_modules[index], image)
        return image

    def _expand_to_samples(self, image: Any) -> Any:
        """Expand images of rows to images of samples, where that has not happened yet."""
        if self._rows is None or len(image) == len(self._rows) * self._frames:
            return image
        return image.unflatten(0, (-1, self._frames))[self._rows].flatten(0, 1)

    def _expand_time(self) -> None:
        """Expand the time embedding from rows to samples."""
        if self._rows is not None and len(self._time) < len(self._rows):
            self._time = self._time[self._rows]

    def _resnet(self, block: Any, image: Any) -> Any:
        hidden = block.conv1(functional.silu(self._norm(block.norm1, image), inplace=True))
        time = block.time_emb_proj(self._time)
        hidden = hidden.unflatten(0, (-1, self._frames)).add_(time[:, None, :, None, None]).flatten(0, 1)
        hidden = block.conv2(functional.silu(self._norm(block.norm2, hidden), inplace=True))
        return hidden.add_(image if block.conv_shortcut is None else block.conv_shortcut(image))

    def _attend(self, name: str, block: Any, index: int, image: Any) -> Any:
        """Apply attention over pixels and text, in blocks that have it."""
        if not getattr(block, "has_cross_attention", False):
            return image
        module = block.attentions[index]
        hidden = module.norm(image)
        if module.use_linear_projection:
            tokens = module.proj_in(self._tokens(hidden, len(hidden) // self._frames))
        else:
            tokens = self._tokens(module.proj_in(hidden), len(hidden) // self._frames)
        for depth, layer in enumerate(module.transformer_blocks):
            tokens = attention.over_pixels(layer.attn1, layer.norm1(tokens)).add_(tokens)
            tokens = self._attend_over_text(
                f"{name}.attentions.{index}.transformer_blocks.{depth}.attn2", layer, tokens
            )
            tokens = _feed_forward(layer, tokens)
        if module.use_linear_projection:
            tokens = module.proj_out(tokens)
        attended = tokens.flatten(0, 1).unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)
        if not module.use_linear_projection:
            attended = module.proj_out(attended)
        return attended + self._expand_to_samples(image)

    def _attend_over_text(self, name: str, layer: Any, tokens: Any) -> Any:
        """Apply attention over text. From here on the two halves of guidance differ."""
        if self._rows is not None and len(tokens) < len(self._rows):
            tokens = tokens[self._rows]
            self._expand_time()
        known = self._conditions
        attended = attention.over_text(
            layer.attn2, layer.norm2(tokens), known.read[name], known.image_scales, known.travel
        )
        return attended.add_(tokens)

    def _attend_over_frames(self, module: Any, image: Any) -> Any:
        """Apply attention over frames. The norm covers all frames of a sample together, in the original each alone."""
        count, channels, height, width = image.shape
        normed = module.norm(image) if self._is_original else self._norm_together(module.norm, image)
        tokens = module.proj_in(self._tokens(normed, count // self._frames))
        for layer in module.transformer_blocks:
            tokens = _feed_forward(layer, self._attended_over_frames(layer, tokens))
        attended = module.proj_out(tokens).view(count, height, width, channels).permute(0, 3, 1, 2)
        return attended.add_(image)

    def _norm(self, norm: Any, image: Any) -> Any:
        """Apply a norm of a ResNet or of the output: frame by frame, in the original over all frames of a sample."""
        return self._norm_together(norm, image) if self._is_original else norm(image)

    def _norm_together(self, norm: Any, image: Any) -> Any:
        """Apply a norm over all frames of a sample together."""
        # Put frames within channels: for channels-last input the CPU kernel sums squares, which is less accurate
        # where so many numbers share a mean.
        film = image.unflatten(0, (-1, self._frames)).transpose(1, 2).contiguous()
        return norm(film).permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)

    def _attended_over_frames(self, layer: Any, tokens: Any) -> Any:
        """Apply the two attentions of a layer, with FreeNoise window by window.

        Source: arXiv 2310.15169, and diffusers 0.42.1 `FreeNoiseTransformerBlock`, whose last window is not normalised.
        """
        windows = self._conditions.sliding
        if windows is None:
            return _both_attentions(layer, tokens)
        fusion = Fusion(windows)
        for start in windows.starts:
            fusion.add(start, _both_attentions(layer, windows.part(tokens, start)))
        return fusion.mean(tokens.dtype)

    def _tokens(self, image: Any, count: int) -> Any:
        """Return (count, frames, pixels, channels), without a copy if channels are last in memory."""
        return image.permute(0, 2, 3, 1).reshape(count, self._frames, -1, image.shape[1])


def _both_attentions(layer: Any, tokens: Any) -> Any:
    """Apply the two attentions over frames of a layer; positions are counted from the first of these frames."""
    places = layer.pos_embed.pe[0, : tokens.shape[1], None]
    for norm, each in ((layer.norm1, layer.attn1), (layer.norm2, layer.attn2)):
        tokens = attention.over_frames(each, norm(tokens).add_(places)).add_(tokens)
    return tokens


def _feed_forward(layer: Any, tokens: Any) -> Any:
    hidden = layer.norm3(tokens)
    gate, *rest = layer.ff.net
    if tokens.device.type == "cpu" and type(gate) is GEGLU and type(gate.proj) is nn.Linear:
        # Two products: the halves of a single product are not contiguous, and GELU then takes three times as long.
        halves = zip(gate.proj.weight.chunk(2), gate.proj.bias.chunk(2), strict=True)
        value, switch = (functional.linear(hidden, weight, bias) for weight, bias in halves)
        hidden = value.mul_(functional.gelu(switch))
    else:
        hidden = gate(hidden)
    for module in rest:
        hidden = module(hidden)
    return hidden.add_(tokens)


def _cross_attentions(unet: Any) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in unet.named_modules()
        if name.endswith(".attn2") and ".attentions." in name and isinstance(module, Attention)
    ]


def _is_plain_part(module: nn.Module) -> bool:
    """Return True if this part of the network has the one structure that `run` implements, and no hooks."""
    if module.training or module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 - torch has no public API for it
        return False
    plain = True
    match module:
        case Attention():
            plain = attention.is_plain(module)
        case BasicTransformerBlock():
            whole = module._chunk_size is None and not hasattr(module, "fuser")  # noqa: SLF001
            plain = whole and module.norm_type == "layer_norm" and module.attn2 is not None
        case ResnetBlock2D():
            still = module.upsample is None and module.downsample is None and not module.skip_time_act
            plain = still and module.time_embedding_norm == "default" and module.output_scale_factor == 1
        case Transformer2DModel():
            plain = module.is_input_continuous
        case Upsample2D():
            plain = module.interpolate and module.use_conv and module.name == "conv" and module.norm is None
        case DualTransformer2DModel():
            plain = False
    return bool(plain)
