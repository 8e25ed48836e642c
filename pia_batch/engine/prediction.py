"""Noise prediction for rows that share UNet calls; prepares once what stays the same from step to step.

The samples of a batch are first the unconditional samples of the guided rows, then one sample of each row.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pia_batch.engine import unet as layout
from pia_batch.engine.attention import distinct_texts, travelling
from pia_batch.engine.compiling import Call, directly
from pia_batch.engine.image_prompts import ImagePromptAttention
from pia_batch.engine.lora_scales import SampleScales, Scales
from pia_batch.engine.offloading import OnDemand
from pia_batch.engine.prompt_travel import Text, Travel
from pia_batch.engine.windows import Windows

DeepFeatures = tuple[torch.Tensor, ...]
"""Deep features of each sample, (frames, channels, height, width)."""


class Predictor(Protocol):
    """Callable that predicts the noise of a batch of samples."""

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noise of each sample, (samples, 4, F, h, w).

        Args:
            latents: Latents of each row, (rows, 4, F, h, w).
            timesteps: Timestep of each row, (rows,).
        """
        ...

    def condition(self, conditions: torch.Tensor, texts: Sequence[Text]) -> None:
        """Replace what differs between windows of the same rows.

        Args:
            conditions: UNet input besides the latents, (rows, 5, F, h, w).
            texts: Texts of the samples, of the same embeddings as before; only their mixtures may differ.
        """
        ...

    def reusing(
        self, latents: torch.Tensor, timesteps: torch.Tensor, layers: int, deep: DeepFeatures
    ) -> tuple[torch.Tensor, DeepFeatures]:
        """Return the noise of each sample and its deep features, which later calls can reuse.

        Args:
            latents: Latents of each row, (rows, 4, F, h, w).
            timesteps: Timestep of each row, (rows,).
            layers: Number of layers at the end of the network that do not belong to its deep part.
            deep: Deep features that an earlier call returned for the same samples; then only the outermost layers run.
                Empty: the whole network runs. A predictor that cannot separate the deep part always returns an empty
                tuple.
        """
        ...


def predictor(
    unet: Any,
    rows: Sequence[int],
    conditions: torch.Tensor,
    texts: Sequence[Text],
    images: ImagePromptAttention,
    call: Call = directly,
    sliding: Windows | None = None,
    lora_scales: Sequence[Scales] | None = None,
) -> Predictor:
    """Return a predictor: the optimized one where `unet.supports` the network, else one that uses its own call.

    Args:
        unet: `UNetMotionModel`, or an object with its interface.
        rows: Index of the row of each sample.
        conditions: UNet input besides the latents, for each row, (rows, 5, F, h, w).
        texts: Text of each sample. One embedding object stands for one text.
        images: Image prompts of the samples.
        call: Function that calls the functions of `unet`, such as a `Compiler`.
        sliding: Windows of FreeNoise, for networks that `supports_sliding` accepts; None: no FreeNoise.
        lora_scales: Scales of each sample's LoRAs, for such networks, too; None: those of the config.
    """
    if sliding is not None or lora_scales is not None or layout.supports(_network(unet)):
        return _OptimizedPredictor(unet, rows, conditions, texts, images, call, sliding, lora_scales)
    return _StockPredictor(unet, rows, conditions, texts, images)


def supports_sliding(unet: Any) -> bool:
    """Return True if a predictor of this network can apply FreeNoise."""
    return layout.is_plain(_network(unet))


class _OptimizedPredictor:
    """Predictor by `unet.run`. One channels-last buffer holds the UNet's input; each step writes the latents to it."""

    def __init__(
        self,
        unet: Any,
        rows: Sequence[int],
        conditions: torch.Tensor,
        texts: Sequence[Text],
        images: ImagePromptAttention,
        call: Call,
        sliding: Windows | None,
        lora_scales: Sequence[Scales] | None,
    ) -> None:
        self._scales: SampleScales | None = None
        self._samples: torch.Tensor | None = None
        if lora_scales is not None:  # every sample is a row: a LoRA changes the halves of guidance from the first layer
            self._samples = torch.tensor(rows, device=conditions.device)
            texts = _own_texts(texts)
            counts = [len(distinct_texts([text])) for text in texts]
            self._scales = SampleScales(_network(unet), lora_scales, conditions.shape[2], counts, conditions.device)
            rows = range(len(rows))
        self._unet = unet
        self._call = call
        self._latents = unet.config.out_channels
        num_rows, channels, *volume = self._of_samples(conditions).shape
        self._input = conditions.new_empty((num_rows, *volume, self._latents + channels))
        self._input[..., self._latents :] = self._of_samples(conditions).movedim(1, -1)
        with self._scaled():
            made = layout.prepare(_on_device(unet), rows, num_rows, texts, images, sliding)
        self._conditions = dataclasses.replace(made, scaled=self._scales is not None)

    def condition(self, conditions: torch.Tensor, texts: Sequence[Text]) -> None:
        self._input[..., self._latents :] = self._of_samples(conditions).movedim(1, -1)
        if self._conditions.travel is not None:
            own = texts if self._scales is None else _own_texts(texts)
            self._conditions = dataclasses.replace(self._conditions, travel=travelling(own))

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        with self._scaled():
            noise: torch.Tensor = self._call(layout.run, *self._arguments(latents, timesteps))
        return noise

    def _scaled(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the LoRA layers have the scales of the samples."""
        return contextlib.nullcontext() if self._scales is None else self._scales.applied()

    def _of_samples(self, rows: torch.Tensor) -> torch.Tensor:
        """Return values of rows as those of samples, where every sample is a row."""
        return rows if self._samples is None else rows[self._samples]

    def reusing(
        self, latents: torch.Tensor, timesteps: torch.Tensor, layers: int, deep: DeepFeatures
    ) -> tuple[torch.Tensor, DeepFeatures]:
        given = self._arguments(latents, timesteps)
        with self._scaled():
            if deep:
                return self._call(layout.run_outermost, *given, layers, torch.cat(deep)), deep
            noise, made = self._call(layout.run_and_keep, *given, layers)
        return noise, torch.split(made, self._input.shape[1])

    def _arguments(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[Any, ...]:
        """Return the arguments of `unet.run`, with the latents in the buffer."""
        self._input[..., : self._latents] = self._of_samples(latents).movedim(1, -1)
        return _on_device(self._unet), self._input, self._of_samples(timesteps), self._conditions


class _StockPredictor:
    """Predictor by the network's own call, with a text embedding for every frame."""

    def __init__(
        self,
        unet: Any,
        rows: Sequence[int],
        conditions: torch.Tensor,
        texts: Sequence[Text],
        images: ImagePromptAttention,
    ) -> None:
        self._unet = unet
        self._rows = torch.tensor(rows, device=conditions.device)
        self._images = images
        self._texts = _of_each_frame(texts, conditions.shape[2])
        self._conditions = conditions

    def condition(self, conditions: torch.Tensor, texts: Sequence[Text]) -> None:
        self._conditions = conditions
        if any(isinstance(text, Travel) for text in texts):
            self._texts = _of_each_frame(texts, conditions.shape[2])

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
        layers: int,  # noqa: ARG002 - the network's own call cannot be split
        deep: DeepFeatures,  # noqa: ARG002
    ) -> tuple[torch.Tensor, DeepFeatures]:
        return self(latents, timesteps), ()


def _own_texts(texts: Sequence[Text]) -> list[Text]:
    """Return texts that share no embedding object: one object stands for one text with one set of scales."""
    return [text.copied() if isinstance(text, Travel) else copy.copy(text) for text in texts]


def _network(unet: Any) -> Any:
    """Return the network itself, wherever it is."""
    return unet.network if isinstance(unet, OnDemand) else unet


def _of_each_frame(texts: Sequence[Text], num_frames: int) -> torch.Tensor:
    """Return the embedding of each frame of each sample, (samples x frames, tokens, features)."""
    if not any(isinstance(text, Travel) for text in texts):
        return torch.cat([text for text in texts if isinstance(text, torch.Tensor)]).repeat_interleave(
            num_frames, dim=0
        )
    return torch.cat(
        [text.embeddings() if isinstance(text, Travel) else text.expand(num_frames, -1, -1) for text in texts]
    )


def _on_device(unet: Any) -> Any:
    """Return the network, on its device."""
    return unet.on_device() if isinstance(unet, OnDemand) else unet
