"""Attention of the UNet over tokens that stay where they are: (samples, frames, pixels, channels) in memory.

The same sums as in diffusers 0.42.1 `AttnProcessor2_0`, but nothing is copied to bring another axis to its place: over
pixels, over frames and over text, only the strides that the kernel reads with differ. What a text contributes does not
depend on the latents, and so is computed once for all frames and steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_HEADS = 65_535
"""Heads in one call of the kernel: CUDA's limit of the grid's third dimension, in which they are counted."""

_FRAME_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What may attend over frames on a GPU: not cuDNN, which torch asks first on an H100 from cuDNN 9.15 on. It plans a
graph for every shape, raises where it finds no plan, and nobody has tried it with tens of thousands of heads."""


class States(NamedTuple):
    """What one cross-attention reads of the texts of a batch, or of its image prompts.

    Attributes:
        keys: (samples, heads, tokens, channels of a head).
        values: as `keys`.
    """

    keys: torch.Tensor
    values: torch.Tensor


class Read(NamedTuple):
    """All that one cross-attention reads.

    Attributes:
        text: of every sample.
        images: the same; None where no IP-Adapter sits in the attention.
    """

    text: States
    images: States | None


def is_plain(attention: Any) -> bool:
    """Whether this diffusers `Attention` is projections, scaled dot products and a projection, and nothing else."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
    return (
        type(attention.processor) in (AttnProcessor2_0, IPAdapterAttnProcessor2_0)
        and all(getattr(attention, name) is None for name in extras)
        and attention.rescale_output_factor == 1
        and not attention.residual_connection
        and not attention.fused_projections
    )


def reads_images(attention: Any) -> bool:
    """Whether an IP-Adapter sits in this attention."""
    return isinstance(attention.processor, IPAdapterAttnProcessor2_0)


def text_states(attention: Any, texts: Sequence[torch.Tensor]) -> States:
    """Keys and values of each sample's text, equal texts projected once.

    Args:
        attention: a cross-attention.
        texts: of each sample, (1, tokens, features). The same object is the same text.
    """
    distinct = {id(text): text for text in texts}
    place = {key: index for index, key in enumerate(distinct)}
    order = [place[id(text)] for text in texts]
    features = torch.cat(list(distinct.values()))
    projected = [project(features) for project in (attention.to_k, attention.to_v)]
    # Not by a list as an index, which would be copied to the device, and the host would wait for it.
    each = [torch.cat([states[index : index + 1] for index in order]) for states in projected]
    return States(*(_split(states, attention.heads) for states in each))


def image_states(attention: Any, prompts: torch.Tensor) -> States:
    """Keys and values of each sample's image prompt.

    Args:
        attention: a cross-attention with an IP-Adapter.
        prompts: (samples, tokens, features), as the adapter's projection makes them.
    """
    projections = attention.processor.to_k_ip[0], attention.processor.to_v_ip[0]
    return States(*(_split(project(prompts), attention.heads) for project in projections))


def over_pixels(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Self-attention within each frame: (samples, frames, pixels, channels) to the same."""
    query, key, value = (
        _split(project(tokens).flatten(0, 1), attention.heads)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    drawn = functional.scaled_dot_product_attention(query, key, value)
    return _projected(attention, drawn, tokens.shape)


def over_frames(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Self-attention of each pixel with itself in the other frames, in and out as in `over_pixels`.

    A pixel's heads are counted as heads of the frame, which changes no number and spares a copy each way.
    """
    samples, frames, pixels, _ = tokens.shape
    query, key, value = (
        project(tokens).view(samples, frames, pixels * attention.heads, -1).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    with contextlib.nullcontext() if query.device.type == "cpu" else sdpa_kernel(_FRAME_KERNELS):
        if query.shape[1] <= MAX_HEADS:
            drawn = functional.scaled_dot_product_attention(query, key, value)
        else:
            parts = zip(*(states.split(MAX_HEADS, dim=1) for states in (query, key, value)), strict=True)
            drawn = torch.cat([functional.scaled_dot_product_attention(*part) for part in parts], dim=1)
    return _projected(attention, drawn, tokens.shape)


def over_text(
    attention: Any, tokens: torch.Tensor, read: Read, image_scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of every pixel of every frame to its sample's text and image prompt, in and out as in `over_pixels`.

    Args:
        attention: a cross-attention.
        tokens: as in `over_pixels`.
        read: of this attention.
        image_scales: of each sample, how much its image prompt weighs, (samples,), float32 or float64; not needed
            without one.
    """
    query = _split(attention.to_q(tokens).flatten(1, 2), attention.heads)
    drawn = functional.scaled_dot_product_attention(query, *read.text)
    if read.images is not None and image_scales is not None:
        shown = functional.scaled_dot_product_attention(query, *read.images)
        # In float32, as diffusers' product of a number and a tensor of half precision.
        drawn = drawn + (image_scales.view(-1, 1, 1, 1) * shown).to(drawn.dtype)
    return _projected(attention, drawn, tokens.shape)


def _split(states: Any, heads: int) -> Any:
    """(batch, length, channels) to (batch, heads, length, channels of a head), without a copy."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _projected(attention: Any, drawn: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(batch, heads, length, channels of a head) to tokens of this shape, through the last projection."""
    result: torch.Tensor = attention.to_out[0](drawn.transpose(1, 2).reshape(shape))
    return result
