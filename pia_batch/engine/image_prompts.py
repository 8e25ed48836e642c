"""IP-Adapter: an image as a prompt beside the text, with an image and a weight of its own for every row.

The adapter's projection and its share of the cross-attention sit inside the UNet, where diffusers puts them. This
module puts them there, encodes what they read, and weighs every sample of a UNet call by its row's scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models import ImageProjection
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from diffusers.models.embeddings import IPAdapterFullImageProjection, IPAdapterPlusImageProjection
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from pia_batch.engine.conditioning import LruCache, pixel_digest
from pia_batch.errors import ConfigError, NonFiniteError

MAX_IMAGE_PROMPTS = 32
"""Encoded image prompts kept, 8 kB each in float32 for the plain adapter, 2.6 MB for those that read hidden states."""

_PROCESSORS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
_PROJECTIONS = (ImageProjection, IPAdapterPlusImageProjection, IPAdapterFullImageProjection)
_FAMILIES = "ip-adapter_sd15, ip-adapter_sd15_light, ip-adapter-plus_sd15, -plus-face and -full-face"


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """What the UNet's projection reads of an image.

    Attributes:
        positive: (1, 1, features), or (1, 1, tokens, features) where the adapter reads hidden states; in the image
            encoder's dtype, on its device.
        negative: as `positive`, of no image, for the unconditional half of guidance.
    """

    positive: torch.Tensor
    negative: torch.Tensor


class ImagePromptEncoder:
    """CLIP embeddings of image prompts, cached by their pixels.

    Source: the unconditional embedding is that of diffusers 0.42.1 `PIAPipeline.encode_image`: zeros where the adapter
    reads one embedding, and where it reads hidden states those of an image of zeros, after normalisation.
    """

    def __init__(self, unet: Any, encoder: Any, processor: Any, device: torch.device) -> None:
        self._reads_hidden_states = not isinstance(_projection(unet), ImageProjection)
        self._encoder = encoder
        self._processor = processor
        self._device = device
        self._recent: LruCache[tuple[tuple[int, int], bytes], ImagePrompt] = LruCache(MAX_IMAGE_PROMPTS)

    def encode(self, image: Image.Image) -> ImagePrompt:
        """The embeddings of an RGB image of any size.

        Raises:
            NonFiniteError: the image encoder made NaN or infinity of it.
        """
        return self._recent.get(pixel_digest(image), lambda: self._encode(image))

    def _encode(self, image: Image.Image) -> ImagePrompt:
        pixels = self._processor(image, return_tensors="pt").pixel_values
        pixels = pixels.to(self._device, next(self._encoder.parameters()).dtype)
        if self._reads_hidden_states:
            positive, negative = (
                self._encoder(each, output_hidden_states=True).hidden_states[-2]
                for each in (pixels, torch.zeros_like(pixels))
            )
        else:
            positive = self._encoder(pixels).image_embeds
            negative = torch.zeros_like(positive)
        if not bool((torch.isfinite(positive) & torch.isfinite(negative)).all()):
            raise NonFiniteError("the embedding of the image prompt holds NaN or infinity")
        return ImagePrompt(positive[None], negative[None])


class Attention:
    """What the cross-attention of one batch of samples needs to know of their image prompts."""

    def __init__(self, unet: Any, embeddings: Sequence[torch.Tensor], scales: Sequence[float], num_frames: int) -> None:
        """Lay it out once for all steps.

        Args:
            unet: with an adapter, unless `embeddings` is empty.
            embeddings: of each sample, as in `ImagePrompt`.
            scales: of each sample; 0 is without its image.
            num_frames: of each sample.
        """
        self._processors = _processors(unet) if embeddings else []
        self._condition = {"image_embeds": [torch.cat(list(embeddings))]} if embeddings else None
        self._scale: float | _RowScales = 1.0
        self._scales = list(scales)
        if embeddings:
            alike = len(set(scales)) == 1
            self._scale = scales[0] if alike else _RowScales(scales, num_frames, embeddings[0].device, unet.dtype)

    @property
    def added_conditions(self) -> dict[str, list[torch.Tensor]] | None:
        """The `added_cond_kwargs` of the UNet call."""
        return self._condition

    @property
    def scales(self) -> torch.Tensor:
        """Of each sample, (samples,), on the device of its embedding; float32, float64 in an engine of float64."""
        embeddings = [] if self._condition is None else self._condition["image_embeds"]
        exact = torch.promote_types(embeddings[0].dtype, torch.float32) if embeddings else torch.float32
        return torch.tensor(self._scales, dtype=exact, device=embeddings[0].device if embeddings else None)

    @contextlib.contextmanager
    def weighted(self) -> Iterator[None]:
        """The UNet weighs image prompts by these samples' scales; afterwards by what it had before."""
        before = [processor.scale for processor in self._processors]
        try:
            for processor in self._processors:
                processor.scale = [self._scale]
            yield
        finally:
            for processor, scale in zip(self._processors, before, strict=True):
                processor.scale = scale


class _RowScales:
    """Where diffusers' attention multiplies by one number for all samples, another number for each.

    The arithmetic stays its own, so that the last bits of a row do not depend on its batch-mates' scales: a float times
    a half-precision tensor is computed in float32 there, and here too.
    """

    def __init__(self, scales: Sequence[float], num_frames: int, device: torch.device, dtype: torch.dtype) -> None:
        exact = torch.promote_types(dtype, torch.float32)
        self._scales = torch.tensor(scales, device=device, dtype=exact).repeat_interleave(num_frames).view(-1, 1, 1)

    def __mul__(self, states: torch.Tensor) -> torch.Tensor:
        """`states`, (samples x frames, tokens, features), each sample times its scale."""
        return (self._scales * states).to(states.dtype)


def install(unet: Any, path: Path) -> None:
    """Put the adapter of a file into the UNet, as `PIAPipeline.load_ip_adapter` does.

    Args:
        unet: gets the adapter in its own dtype, on its own device.
        path: safetensors with `image_proj.*` and `ip_adapter.*`, as `weights.resolve` found it.

    Raises:
        ConfigError: the file is damaged, or made for a UNet of other blocks.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    try:
        for name, tensor in load_file(path).items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        # What `load_ip_adapter` itself calls, whose module cannot be imported without warnings of torchvision.
        unet._load_ip_adapter_weights([groups])  # noqa: SLF001
    except (KeyError, OSError, RuntimeError, SafetensorError, ValueError) as err:
        raise ConfigError(f"model.ip_adapter: {path} does not fit the base's UNet, or is damaged: {err}") from err
    unused = len(groups["ip_adapter"]) - 2 * len(_processors(unet))
    if unused:
        raise ConfigError(
            f"model.ip_adapter: {path} has {unused} tensors more than the base's UNet has attention for: it is made "
            "for another family of models"
        )


def processor_for(encoder: Any) -> Any:
    """What makes images ready for this CLIPVisionModelWithProjection.

    Of pillow, also where torchvision is installed, whose resized pixels differ: a clip depends on no such chance.
    Source: diffusers 0.42.1 `IPAdapterMixin.load_ip_adapter`, where the size is that of the encoder.
    """
    size = encoder.config.image_size
    return CLIPImageProcessorPil(size=size, crop_size=size)


def check_adopted(pipe: Any) -> None:
    """Return if rows can have the adapter of this pipeline each with an image and a scale of their own.

    Raises:
        ConfigError: they cannot.
    """
    layers = pipe.unet.encoder_hid_proj.image_projection_layers
    if len(layers) != 1:
        raise ConfigError(f"the pipeline has {len(layers)} IP-Adapters, and a row has one image prompt; load one")
    if not isinstance(layers[0], _PROJECTIONS):
        raise ConfigError(f"the pipeline's IP-Adapter does not read images, as those of FaceID; load {_FAMILIES}")
    if pipe.image_encoder is None or pipe.feature_extractor is None:
        raise ConfigError(
            "the pipeline has an IP-Adapter but no image encoder; load it with image_encoder_folder, or set "
            "pipe.image_encoder and pipe.feature_extractor"
        )
    if len({str(processor.scale) for processor in _processors(pipe.unet)}) > 1:
        raise ConfigError(
            "the pipeline's IP-Adapter has a scale for each block, and a row has one for all of them; call "
            "pipe.set_ip_adapter_scale(1.0), then set ip_adapter_scale per row"
        )


def _processors(unet: Any) -> list[Any]:
    return [processor for processor in unet.attn_processors.values() if isinstance(processor, _PROCESSORS)]


def _projection(unet: Any) -> Any:
    return unet.encoder_hid_proj.image_projection_layers[0]
