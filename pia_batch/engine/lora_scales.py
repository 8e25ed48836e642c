"""Scales of LoRA layers that differ between the samples of a call: sums of weighted low-rank products, per sample.

PEFT multiplies the product of a LoRA's matrices by `scaling`, a number in each layer. A tensor with one number for each
sample takes its place during a call, so that rows with other scales share the call. Without such rows nothing changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

Scales = tuple[float, ...]
"""Scale of each LoRA of a model, in the order of the config."""

PREFIX = "lora"
"""Beginning of the names under which LoRAs are added to networks; their index follows."""


class SampleScales:
    """Scales of a UNet's LoRA layers for the samples of a call, in the layout of `unet.run` with a row per sample."""

    def __init__(
        self, network: Any, scales: Sequence[Scales], frames: int, texts: Sequence[int], device: torch.device
    ) -> None:
        """Compute the scale of every layer and sample.

        Args:
            network: UNet with LoRA layers.
            scales: Scales of each sample.
            frames: Number of frames of each sample.
            texts: Number of distinct texts of each sample, whose keys and values are projected together.
            device: Device of the call.
        """
        table = torch.tensor(scales, device=device).unbind(1)
        # Each text's sample, instead of repeat_interleave, for whose size the host would wait for the device.
        owners = torch.tensor([index for index, count in enumerate(texts) for _ in range(count)], device=device)
        self._layers = [
            (layer, adapter, _shaped(name, layer, _unit(layer, adapter) * table[index], frames, owners))
            for name, layer, adapter, index in _adapters(network)
        ]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the network's LoRA layers have these scales."""
        with _scaling(self._layers):
            yield


@contextlib.contextmanager
def applied(network: Any, scales: Scales | None) -> Iterator[None]:
    """Context in which all LoRA layers of a network have these scales; None: those of the config."""
    layers = [] if scales is None else list(_adapters(network))
    with _scaling([(layer, adapter, _unit(layer, adapter) * scales[k]) for _, layer, adapter, k in layers if scales]):
        yield


@contextlib.contextmanager
def _scaling(layers: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [layer.scaling[adapter] for layer, adapter, _ in layers]
    for layer, adapter, value in layers:
        layer.scaling[adapter] = value
    try:
        yield
    finally:
        for (layer, adapter, _), value in zip(layers, before, strict=True):
            layer.scaling[adapter] = value


def _adapters(network: Any) -> Iterator[tuple[str, Any, str, int]]:
    """Yield each LoRA layer with its name, and each LoRA in it with its name and index."""
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in layer.scaling:
                yield name, layer, adapter, int(adapter.removeprefix(PREFIX))


def _unit(layer: Any, adapter: str) -> float:
    """Return the number by which a layer multiplies at scale 1: alpha by rank."""
    before = layer.scaling[adapter]
    layer.set_scale(adapter, 1.0)
    unit: float = layer.scaling[adapter]
    layer.scaling[adapter] = before
    return unit


def _shaped(name: str, layer: Any, scales: torch.Tensor, frames: int, owners: torch.Tensor) -> torch.Tensor:
    """Return the scales of the samples in a shape that broadcasts with the layer's output."""
    if isinstance(layer.get_base_layer(), nn.Conv2d):  # (samples x frames, channels, height, width)
        return scales.repeat_interleave(frames).view(-1, 1, 1, 1)
    if "time_emb" in name:  # (samples, features)
        return scales.view(-1, 1)
    if ".attentions." in name and name.endswith((".attn2.to_k", ".attn2.to_v")):  # (texts, tokens, features)
        return scales[owners].view(-1, 1, 1)
    return scales.view(-1, 1, 1, 1)  # (samples, frames, pixels, channels)
