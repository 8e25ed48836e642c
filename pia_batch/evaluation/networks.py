"""Networks that embed frames and prompts: a CLIPModel, and a ViT as DINO. The only module here that uses torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizerFast,
    ViTImageProcessorPil,
)

from pia_batch.errors import ConfigError
from pia_batch.evaluation.network_files import PREPROCESSOR, NetworkFiles
from pia_batch.evaluation.similarity import Vectors
from pia_batch.weights import components

IMAGES_AT_ONCE = 64
"""Number of images that a network embeds in one call."""

_PROCESSORS = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "CLIPFeatureExtractor": CLIPImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "ViTFeatureExtractor": ViTImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
}
"""Image processors by the name that a preprocessor's config has; those of other networks have other arguments."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_UNUSED = ("pooler.", "position_ids", "mask_token")
"""Parts of tensor names that a checkpoint may lack: what they belong to is not used here."""


class ImageNetwork:
    """A network that embeds images. Its weights are float32 on every device.

    Args:
        files: Files of the network.
        device: Device, such as `cuda` or `cpu`.

    Raises:
        ConfigError: The weights do not belong to the config, or the preprocessor is of an unknown kind.
    """

    def __init__(self, files: NetworkFiles, device: str) -> None:
        self._files, self._device = files, device
        kind = CLIPModel if files.source.role == "clip" else AutoModel
        model, report = kind.from_pretrained(
            files.folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        missing = [name for name in report["missing_keys"] if not any(part in name for part in _UNUSED)]
        if missing or report["mismatched_keys"]:
            wrong = sorted(missing) or sorted(str(key) for key in report["mismatched_keys"])
            msg = (
                f"--{files.source.role}: the weights of {files.source.name} do not belong to its config: {wrong[0]} is "
                "missing or has another shape; download it again"
            )
            raise ConfigError(msg)
        self._model: Any = model.to(device).eval()
        self._prepare: Any = _processor(files, model.config)

    def prepare(self, images: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return what the network takes of images, uint8, shape (n, H, W, 3): float32, (n, 3, side, side), on the CPU.

        May be called from several threads.
        """
        pixels: torch.Tensor = self._prepare(list(images), return_tensors="pt").pixel_values
        return pixels

    @torch.inference_mode()
    def embed(self, prepared: Sequence[torch.Tensor]) -> Vectors:
        """Return the embeddings of all images of `prepared`, in order, float32, shape (n, D)."""
        parts: tuple[torch.Tensor, ...] = torch.split(torch.cat(list(prepared)), IMAGES_AT_ONCE)
        found = [self._embedded(part.to(self._device)).float().cpu().numpy() for part in parts]
        return np.concatenate(found)

    def _embedded(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._files.source.role == "clip":
            return _vectors(self._model.get_image_features(pixel_values=pixels))
        found: torch.Tensor = self._model(pixel_values=pixels).last_hidden_state[:, 0]  # the class token, as DINO's
        return found


class ClipNetwork(ImageNetwork):
    """A CLIPModel, which embeds prompts too. Arguments and errors are those of `ImageNetwork`."""

    def __init__(self, files: NetworkFiles, device: str) -> None:
        super().__init__(files, device)
        self._tokenizer = CLIPTokenizerFast.from_pretrained(files.folder, local_files_only=True)
        self._length = self._model.config.text_config.max_position_embeddings
        self.embed_prompt = lru_cache(maxsize=4096)(self._embed_prompt)

    def embed_prompts(self, prompts: Sequence[str]) -> Vectors:
        """Return the embeddings of prompts, float32, shape (n, D). Tokens beyond what CLIP reads are left out."""
        return np.stack([self.embed_prompt(prompt) for prompt in prompts])

    @torch.inference_mode()
    def _embed_prompt(self, prompt: str) -> npt.NDArray[np.float32]:
        tokens = self._tokenizer([prompt], truncation=True, max_length=self._length, return_tensors="pt")
        found = _vectors(self._model.get_text_features(**tokens.to(self._device)))
        vector: npt.NDArray[np.float32] = found[0].float().cpu().numpy()
        return vector


def _vectors(output: Any) -> torch.Tensor:
    """Return the embeddings in what a CLIPModel returns: an object since transformers 5, the tensor itself before."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return found


def _processor(files: NetworkFiles, config: Any) -> Any:
    """Return the image processor of a network: its own, else one for its size, as CLIP and VBench prepare images."""
    if PREPROCESSOR in files.others:
        settings = components.read_json(files.folder / PREPROCESSOR)
        name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
        found = _PROCESSORS.get(str(name).removesuffix("Fast").removesuffix("Pil"))
        if found is None:
            msg = f"--{files.source.role}: unknown image_processor_type {name!r} (expected {', '.join(_PROCESSORS)})"
            raise ConfigError(msg)
        return found.from_pretrained(files.folder, local_files_only=True)
    vision = getattr(config, "vision_config", config)
    size = {"size": {"shortest_edge": vision.image_size}, "crop_size": vision.image_size}
    if files.source.role == "clip":
        return CLIPImageProcessorPil(**size)
    return BitImageProcessorPil(**size, image_mean=_IMAGENET_MEAN, image_std=_IMAGENET_STD)
