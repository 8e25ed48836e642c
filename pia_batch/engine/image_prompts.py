"""IP-Adapter: an image as a prompt in addition to the text, with an image and a weight for every row.

The adapter's projection and its part of the cross-attention are inside the UNet, as in diffusers. This module installs
them, encodes their input, and weights every sample of a UNet call by the scale of its row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers.models import ImageProjection
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from diffusers.models.embeddings import IPAdapterFullImageProjection, IPAdapterPlusImageProjection
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from pia_batch.engine.conditioning import LruCache, pixel_digest
from pia_batch.errors import ConfigError, NonFiniteError
from pia_batch.weights import image_prompt_files
from pia_batch.weights.components import Component
from pia_batch.weights.safetensors import SUFFIX

MAX_IMAGE_PROMPTS = 32
"""Number of cached image prompts: 8 kB each in float32 for the plain adapter, 2.6 MB if it reads hidden states."""

_PROCESSORS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
_PROJECTIONS = (ImageProjection, IPAdapterPlusImageProjection, IPAdapterFullImageProjection)
_FAMILIES = "ip-adapter_sd15, ip-adapter_sd15_light, ip-adapter-plus_sd15, -plus-face and -full-face"


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """Embeddings of an image prompt, the input of the UNet's projection.

    Attributes:
        positive: Tensor (1, 1, features), or (1, 1, tokens, features) if the adapter reads hidden states; in the image
            encoder's dtype, on its device.
        negative: Embedding without an image, in the shape of `positive`, for the unconditional half of guidance.
    """

    positive: torch.Tensor
    negative: torch.Tensor


class ImagePromptEncoder:
    """Encoder of image prompts to CLIP embeddings, cached by pixels.

    Source: the unconditional embedding is that of diffusers 0.42.1 `PIAPipeline.encode_image`. It is zero if the
    adapter reads one embedding; if it reads hidden states, it is that of an image of zeros after normalisation.
    """

    def __init__(self, unet: Any, encoder: Any, processor: Any, device: torch.device) -> None:
        self._reads_hidden_states = not isinstance(_projection(unet), ImageProjection)
        self._encoder = encoder
        self._processor = processor
        self._device = device
        self._recent: LruCache[tuple[tuple[int, int], bytes], ImagePrompt] = LruCache(MAX_IMAGE_PROMPTS)

    def encode(self, image: Image.Image) -> ImagePrompt:
        """Return the embeddings of an RGB image of any size.

        Raises:
            NonFiniteError: An embedding holds NaN or infinity.
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


class ImagePromptAttention:
    """Image prompts of one batch of samples, as the cross-attention uses them."""

    def __init__(self, unet: Any, embeddings: Sequence[torch.Tensor], scales: Sequence[float], num_frames: int) -> None:
        """Prepare the image prompts once for all steps.

        Args:
            unet: UNet; it must have an adapter unless `embeddings` is empty.
            embeddings: Embedding of each sample's image prompt, as in `ImagePrompt`.
            scales: Weight of each sample's image prompt; 0 disables it.
            num_frames: Number of frames of each sample.
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
        """Argument `added_cond_kwargs` of the UNet call; None without image prompts."""
        return self._condition

    @property
    def scales(self) -> torch.Tensor:
        """Weight of each sample, (samples,), on the embeddings' device; float32, or float64 for float64 engines."""
        embeddings = [] if self._condition is None else self._condition["image_embeds"]
        exact = torch.promote_types(embeddings[0].dtype, torch.float32) if embeddings else torch.float32
        return torch.tensor(self._scales, dtype=exact, device=embeddings[0].device if embeddings else None)

    @contextlib.contextmanager
    def weighted(self) -> Iterator[None]:
        """Context in which the UNet weights image prompts by these samples' scales; restores its scales afterwards."""
        before = [processor.scale for processor in self._processors]
        try:
            for processor in self._processors:
                processor.scale = [self._scale]
            yield
        finally:
            for processor, scale in zip(self._processors, before, strict=True):
                processor.scale = scale


class _RowScales:
    """Scale of each sample, in the place of the one number by which diffusers' attention multiplies all samples.

    The arithmetic is that of diffusers, so that the last bits of a row do not depend on the scales of other rows: both
    compute the product of a float and a half-precision tensor in float32.
    """

    def __init__(self, scales: Sequence[float], num_frames: int, device: torch.device, dtype: torch.dtype) -> None:
        exact = torch.promote_types(dtype, torch.float32)
        self._scales = torch.tensor(scales, device=device, dtype=exact).repeat_interleave(num_frames).view(-1, 1, 1)

    def __mul__(self, states: torch.Tensor) -> torch.Tensor:
        """Multiply `states`, (samples x frames, tokens, features), by the scale of each sample."""
        return (self._scales * states).to(states.dtype)


def install(unet: Any, path: Path) -> None:
    """Install the adapter of a file in the UNet, as `PIAPipeline.load_ip_adapter` does.

    Args:
        unet: UNet; the adapter gets its dtype and device.
        path: safetensors file with `image_proj.*` and `ip_adapter.*` tensors, as `weights.resolve` found it, or with
            the names that training gives them.

    Raises:
        ConfigError: The file is damaged, or made for a UNet with other blocks.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    try:
        with safe_open(path, "pt") as file:
            for name, stored in image_prompt_files.adapter_tensors(file.keys()).items():
                group, _, rest = name.partition(".")
                groups[group][rest] = file.get_tensor(stored)
        # `load_ip_adapter` calls this method, too; importing its module causes warnings about torchvision.
        unet._load_ip_adapter_weights([groups])  # noqa: SLF001
    except (KeyError, OSError, RuntimeError, SafetensorError, ValueError) as err:
        raise ConfigError(f"model.ip_adapter: {path} does not fit the base's UNet, or is damaged: {err}") from err
    unused = len(groups["ip_adapter"]) - 2 * len(_processors(unet))
    if unused:
        raise ConfigError(
            f"model.ip_adapter: {path} has {unused} tensors more than the attention of the base's UNet; it is made "
            "for another family of models"
        )


def read_encoder(part: Component, dtype: torch.dtype) -> Any:
    """Return the image encoder of a part, on the CPU, in its own memory.

    Args:
        part: Folder, or a single file with the config that `weights.resolve` found.
        dtype: Dtype of the loaded weights, whatever the dtype in the file.

    Raises:
        ConfigError: A tensor is missing, unexpected, or of another shape.
    """
    folder = part.folder if part.config is None else part.config.folder
    with accelerate.init_empty_weights():
        network = CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(folder, local_files_only=True))
    names = {name.removeprefix("vision_model."): name for name in network.state_dict()}
    paths = [part.folder / name for name in part.files if name.endswith(SUFFIX)]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            held = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            # Copy: a tensor of the right dtype would otherwise remain a view of the file, which may change.
            own = {
                names.get(name, name): _part(held[stored.name].get_tensor(stored.name), stored).to(dtype, copy=True)
                for name, stored in image_prompt_files.encoder_tensors(held).items()
            }
        network.load_state_dict(own, assign=True)
    except (OSError, RuntimeError, SafetensorError) as err:
        raise ConfigError(f"model.ip_adapter.image_encoder: {paths[0]} does not fit its config: {err}") from err
    return network.to(dtype)


def _part(tensor: torch.Tensor, stored: image_prompt_files.EncoderTensor) -> torch.Tensor:
    if stored.is_transposed:
        return tensor.T
    return tensor if stored.third is None else tensor.chunk(3)[stored.third]


def processor_for(encoder: Any) -> Any:
    """Return the image preprocessor for a CLIPVisionModelWithProjection.

    It always uses Pillow, even if torchvision is installed: torchvision resizes to other pixels, and a clip must not
    depend on which packages are installed.

    Source: diffusers 0.42.1 `IPAdapterMixin.load_ip_adapter`; the size is that of the encoder.
    """
    size = encoder.config.image_size
    return CLIPImageProcessorPil(size=size, crop_size=size)


def check_adopted(pipe: Any) -> None:
    """Return if the adapter of this pipeline can be used with an image and a scale for each row.

    Raises:
        ConfigError: It cannot.
    """
    layers = pipe.unet.encoder_hid_proj.image_projection_layers
    if len(layers) != 1:
        raise ConfigError(
            f"the pipeline has {len(layers)} IP-Adapters, but a row has one image prompt; load one adapter"
        )
    if not isinstance(layers[0], _PROJECTIONS):
        raise ConfigError(f"the pipeline's IP-Adapter does not read images (FaceID adapters do not); load {_FAMILIES}")
    if pipe.image_encoder is None or pipe.feature_extractor is None:
        raise ConfigError(
            "the pipeline has an IP-Adapter but no image encoder; load it with image_encoder_folder, or set "
            "pipe.image_encoder and pipe.feature_extractor"
        )
    if len({str(processor.scale) for processor in _processors(pipe.unet)}) > 1:
        raise ConfigError(
            "the pipeline's IP-Adapter has a scale for each block, but a row has one scale for all blocks; call "
            "pipe.set_ip_adapter_scale(1.0), then set ip_adapter_scale per row"
        )


def _processors(unet: Any) -> list[Any]:
    return [processor for processor in unet.attn_processors.values() if isinstance(processor, _PROCESSORS)]


def _projection(unet: Any) -> Any:
    return unet.encoder_hid_proj.image_projection_layers[0]
