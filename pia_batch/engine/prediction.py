"""What the UNet predicts for rows that share its calls, with all that stays the same from step to step laid out once.

The samples of a batch are first the unconditional ones of the guided rows, then one of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pia_batch.engine import unet as layout
from pia_batch.engine.compiling import Call, directly
from pia_batch.engine.image_prompts import Attention
from pia_batch.engine.offloading import OnDemand

Deep = tuple[torch.Tensor, ...]
"""Of each sample, (frames, channels, height, width)."""


class Predictor(Protocol):
    """What calls the UNet for a batch of samples."""

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Latents (rows, 4, F, h, w) and timesteps (rows,) to the noise of each sample, (samples, 4, F, h, w)."""
        ...

    def reusing(
        self, latents: torch.Tensor, timesteps: torch.Tensor, layers: int, deep: Deep
    ) -> tuple[torch.Tensor, Deep]:
        """As a call, and what the network's deep part had made for it.

        Args:
            latents: as for a call.
            timesteps: as for a call.
            layers: at the end of the network, that are no part of the deep one.
            deep: what this told for the same samples at another timestep: only the outermost layers run. Empty: the
                whole network runs. Where that is laid out by nobody, nothing can be told, and it is empty again.
        """
        ...


def predictor(
    unet: Any,
    rows: Sequence[int],
    conditions: torch.Tensor,
    texts: Sequence[torch.Tensor],
    images: Attention,
    call: Call = directly,
) -> Predictor:
    """What calls the UNet, by the layout made for speed where that knows its structure, else by its own call.

    Args:
        unet: a `UNetMotionModel`, or what is called like one.
        rows: of each sample, the index of its row.
        conditions: of each row, (rows, 5, F, h, w), what the UNet sees beside the latents.
        texts: of each sample, (1, tokens, features). The same object is the same text.
        images: what an IP-Adapter knows of the samples.
        call: what calls the functions of the layout.
    """
    network = unet.network if isinstance(unet, OnDemand) else unet
    if layout.understands(network):
        return _Laid(unet, rows, conditions, texts, images, call)
    return _Stock(unet, rows, conditions, texts, images)


class _Laid:
    """By `unet.run`. One buffer holds what the UNet sees, channels last; a step writes the latents into it."""

    def __init__(
        self,
        unet: Any,
        rows: Sequence[int],
        conditions: torch.Tensor,
        texts: Sequence[torch.Tensor],
        images: Attention,
        call: Call,
    ) -> None:
        self._unet = unet
        self._call = call
        self._latents = unet.config.out_channels
        num_rows, channels, *volume = conditions.shape
        self._input = conditions.new_empty((num_rows, *volume, self._latents + channels))
        self._input[..., self._latents :] = conditions.movedim(1, -1)
        self._conditions = layout.prepare(_present(unet), rows, num_rows, texts, images)

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        noise: torch.Tensor = self._call(layout.run, *self._given(latents, timesteps))
        return noise

    def reusing(
        self, latents: torch.Tensor, timesteps: torch.Tensor, layers: int, deep: Deep
    ) -> tuple[torch.Tensor, Deep]:
        given = self._given(latents, timesteps)
        if deep:
            return self._call(layout.run_outermost, *given, layers, torch.cat(deep)), deep
        noise, made = self._call(layout.run_and_keep, *given, layers)
        return noise, torch.split(made, self._input.shape[1])

    def _given(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[Any, ...]:
        """The network, what it sees, and by what it draws."""
        self._input[..., : self._latents] = latents.movedim(1, -1)
        return _present(self._unet), self._input, timesteps, self._conditions


class _Stock:
    """By the network's own call, every frame with a text of its own."""

    def __init__(
        self, unet: Any, rows: Sequence[int], conditions: torch.Tensor, texts: Sequence[torch.Tensor], images: Attention
    ) -> None:
        self._unet = unet
        self._rows = torch.tensor(rows, device=conditions.device)
        self._images = images
        self._texts = torch.cat(list(texts)).repeat_interleave(conditions.shape[2], dim=0)
        self._conditions = conditions

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sample = torch.cat([latents, self._conditions], dim=1)[self._rows]
        with self._images.weighted():
            output = self._unet(
                sample,
                timesteps[self._rows],
                encoder_hidden_states=self._texts,
                added_cond_kwargs=self._images.added_conditions,
            )
        noise: torch.Tensor = output.sample
        return noise

    def reusing(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        layers: int,  # noqa: ARG002 - its own call has no parts
        deep: Deep,  # noqa: ARG002
    ) -> tuple[torch.Tensor, Deep]:
        return self(latents, timesteps), ()


def _present(unet: Any) -> Any:
    """The network on its device."""
    return unet.on_device() if isinstance(unet, OnDemand) else unet
