"""Attention of the UNet over tokens with a fixed memory layout: (samples, frames, pixels, channels).

The arithmetic is that of diffusers 0.42.1 `AttnProcessor2_0`, without copies that move axes: attention over pixels,
frames and text differs only in the strides with which the kernel reads. Keys and values of a text do not depend on the
latents, and so are computed once for all frames and steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pia_batch.engine.prompt_travel import Text, Travel, mixed

MAX_HEADS = 65_535
"""Largest number of heads in one call of the kernel: CUDA's limit of the grid's third dimension, which counts heads."""

_FRAME_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels allowed for attention over frames on a GPU.

cuDNN is not among them, although torch prefers it on an H100 from cuDNN 9.15 on: it plans a graph for every shape,
raises where it finds no plan, and is not tested with tens of thousands of heads.
"""


class States(NamedTuple):
    """Keys and values of one cross-attention for the texts, or the image prompts, of a batch.

    Attributes:
        keys: Tensor (samples, heads, tokens, channels of a head).
        values: Tensor in the shape of `keys`.
    """

    keys: torch.Tensor
    values: torch.Tensor


class Read(NamedTuple):
    """Keys and values of one cross-attention.

    Attributes:
        text: Keys and values of every sample's text; of one that travels, those of its first key prompt.
        images: Keys and values of the image prompts; None if the attention has no IP-Adapter.
        key_prompts: Keys and values of the distinct texts, (texts, tokens, channels); None if no sample travels.
    """

    text: States
    images: States | None
    key_prompts: States | None = None


class Travelling(NamedTuple):
    """Samples of a batch whose text changes from frame to frame.

    Keys and values are linear in the text, so those of a frame are the mixture of those of two key prompts.

    Attributes:
        samples: Indices of these samples, (travelling samples,).
        others: Indices of the other samples, (other samples,); None if there are none.
        before: Index of the earlier text of each frame among the distinct texts, (travelling samples x frames,).
        after: Index of the later text.
        share_before: Factor of the earlier text, (travelling samples x frames, 1, 1), float32 or float64.
        share_after: Factor of the later text.
    """

    samples: torch.Tensor
    others: torch.Tensor | None
    before: torch.Tensor
    after: torch.Tensor
    share_before: torch.Tensor
    share_after: torch.Tensor


def distinct_texts(texts: Sequence[Text]) -> dict[int, torch.Tensor]:
    """Return each distinct embedding of the samples by its identity, in order of appearance."""
    each = (text.texts if isinstance(text, Travel) else (text,) for text in texts)
    return {id(one): one for several in each for one in several}


def travelling(texts: Sequence[Text]) -> Travelling | None:
    """Return the samples whose text changes from frame to frame; None if there are none.

    Args:
        texts: Text of each sample; those that change have the same number of frames.
    """
    chosen = [(index, text) for index, text in enumerate(texts) if isinstance(text, Travel)]
    if not chosen:
        return None
    distinct = distinct_texts(texts)
    place = {key: index for index, key in enumerate(distinct)}
    embedding = next(iter(distinct.values()))
    exact = torch.promote_types(embedding.dtype, torch.float32)
    mixes = [(text.texts, mix) for _, text in chosen for mix in text.mixes]
    moving = {index for index, _ in chosen}
    others = [index for index in range(len(texts)) if index not in moving]

    def on_device(values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=embedding.device)

    return Travelling(
        samples=on_device(sorted(moving), torch.long),
        others=on_device(others, torch.long) if others else None,
        before=on_device([place[id(own[mix.before])] for own, mix in mixes], torch.long),
        after=on_device([place[id(own[mix.after])] for own, mix in mixes], torch.long),
        share_before=on_device([mix.share_before for _, mix in mixes], exact).view(-1, 1, 1),
        share_after=on_device([mix.share_after for _, mix in mixes], exact).view(-1, 1, 1),
    )


def is_plain(attention: Any) -> bool:
    """Return True if this diffusers `Attention` consists of projections and scaled dot products only."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
    return (
        type(attention.processor) in (AttnProcessor2_0, IPAdapterAttnProcessor2_0)
        and all(getattr(attention, name) is None for name in extras)
        and attention.rescale_output_factor == 1
        and not attention.residual_connection
        and not attention.fused_projections
    )


def reads_images(attention: Any) -> bool:
    """Return True if this attention has an IP-Adapter."""
    return isinstance(attention.processor, IPAdapterAttnProcessor2_0)


def text_states(attention: Any, texts: Sequence[Text]) -> tuple[States, States | None]:
    """Return keys and values of each sample's text, and those of the distinct texts; project each of these once.

    Args:
        attention: Cross-attention module.
        texts: Text of each sample. One embedding object stands for one text.

    Returns:
        `Read.text` and `Read.key_prompts`.
    """
    distinct = distinct_texts(texts)
    place = {key: index for index, key in enumerate(distinct)}
    order = [place[id(text.texts[0] if isinstance(text, Travel) else text)] for text in texts]
    features = torch.cat(list(distinct.values()))
    projected = [project(features) for project in (attention.to_k, attention.to_v)]
    # A list as an index would be copied to the device, and the host would wait for the copy.
    each = [torch.cat([states[index : index + 1] for index in order]) for states in projected]
    any_travels = any(isinstance(text, Travel) for text in texts)
    return States(*(_split(states, attention.heads) for states in each)), States(*projected) if any_travels else None


def image_states(attention: Any, prompts: torch.Tensor) -> States:
    """Return keys and values of each sample's image prompt.

    Args:
        attention: Cross-attention module with an IP-Adapter.
        prompts: Output of the adapter's projection, (samples, tokens, features).
    """
    projections = attention.processor.to_k_ip[0], attention.processor.to_v_ip[0]
    return States(*(_split(project(prompts), attention.heads) for project in projections))


def over_pixels(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Apply self-attention within each frame; input and output are (samples, frames, pixels, channels)."""
    query, key, value = (
        _split(project(tokens).flatten(0, 1), attention.heads)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    attended = functional.scaled_dot_product_attention(query, key, value)
    return _projected(attention, attended, tokens.shape)


def over_frames(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Apply self-attention of each pixel over the frames; shapes are those of `over_pixels`.

    The heads of all pixels are treated as heads of the frame, which changes no value and saves two copies.
    """
    samples, frames, pixels, _ = tokens.shape
    query, key, value = (
        project(tokens).view(samples, frames, pixels * attention.heads, -1).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    with contextlib.nullcontext() if query.device.type == "cpu" else sdpa_kernel(_FRAME_KERNELS):
        if query.shape[1] <= MAX_HEADS:
            attended = functional.scaled_dot_product_attention(query, key, value)
        else:
            parts = zip(*(states.split(MAX_HEADS, dim=1) for states in (query, key, value)), strict=True)
            attended = torch.cat([functional.scaled_dot_product_attention(*part) for part in parts], dim=1)
    return _projected(attention, attended, tokens.shape)


def over_text(
    attention: Any,
    tokens: torch.Tensor,
    read: Read,
    image_scales: torch.Tensor | None = None,
    travel: Travelling | None = None,
) -> torch.Tensor:
    """Apply attention of every pixel to its sample's text and image prompt; shapes are those of `over_pixels`.

    Args:
        attention: Cross-attention module.
        tokens: Tensor (samples, frames, pixels, channels).
        read: Keys and values of this attention.
        image_scales: Weight of each sample's image prompt, (samples,), float32 or float64. None without image prompts.
        travel: Samples whose text changes from frame to frame; None if there are none.
    """
    query = _split(attention.to_q(tokens).flatten(1, 2), attention.heads)
    if travel is None or read.key_prompts is None:
        attended = functional.scaled_dot_product_attention(query, *read.text)
    elif travel.others is None:
        attended = _over_travelling_text(query, read.key_prompts, travel, tokens.shape[1])
    else:
        moving = _over_travelling_text(query[travel.samples], read.key_prompts, travel, tokens.shape[1])
        keys, values = (states[travel.others] for states in read.text)
        still = functional.scaled_dot_product_attention(query[travel.others], keys, values)
        order = torch.cat([travel.samples, travel.others]).argsort()
        attended = torch.cat([moving, still])[order]
    if read.images is not None and image_scales is not None:
        attended_images = functional.scaled_dot_product_attention(query, *read.images)
        # Multiply in float32, as diffusers' product of a number and a half-precision tensor does.
        attended = attended + (image_scales.view(-1, 1, 1, 1) * attended_images).to(attended.dtype)
    return _projected(attention, attended, tokens.shape)


def _over_travelling_text(query: Any, key_prompts: States, travel: Travelling, num_frames: int) -> Any:
    """Return the attention of samples to the text of each frame, (samples, heads, frames x pixels, channels of a head).

    The mixture is made at every step, so that memory holds the states of one attention's frames at a time.
    """
    samples, heads = query.shape[:2]
    frames = (
        mixed(states[travel.before], states[travel.after], travel.share_before, travel.share_after)
        for states in key_prompts
    )
    per_frame = query.unflatten(2, (num_frames, -1)).transpose(1, 2).flatten(0, 1)
    attended: Any = functional.scaled_dot_product_attention(per_frame, *(_split(states, heads) for states in frames))
    return attended.transpose(1, 2).unflatten(0, (samples, num_frames)).flatten(1, 2).transpose(1, 2)


def _split(states: Any, heads: int) -> Any:
    """Reshape (batch, length, channels) to (batch, heads, length, channels of a head), without a copy."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _projected(attention: Any, attended: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Apply the output projection: (batch, heads, length, channels of a head) to tokens of this shape."""
    result: torch.Tensor = attention.to_out[0](attended.transpose(1, 2).reshape(shape))
    return result
