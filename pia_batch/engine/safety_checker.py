"""Safety checker: scores of frames by the network that Stable Diffusion publishes for it. It never changes a pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessorPil

from pia_batch.config import SafetyConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import safety_checker_files

BATCH_IMAGES = 32
"""Number of images in one call of the network: 19 MB of input at 224 x 224."""

_CARE = 0.01
"""Amount by which thresholds are lowered in an image near a concept of special care. Source: diffusers 0.42.1."""


class SafetyChecker:
    """StableDiffusionSafetyChecker in float32, so that its flags do not depend on a device's half precision.

    Args:
        network: The network.
        preprocessor: Image processor of transformers that makes its input.
        device: Torch device of the network.
    """

    def __init__(
        self, network: StableDiffusionSafetyChecker, preprocessor: CLIPImageProcessorPil, device: str = "cpu"
    ) -> None:
        self._network = network.to(device, torch.float32).eval().requires_grad_(requires_grad=False)
        self._preprocessor, self._device = preprocessor, device
        self._thresholds = tuple(
            weights.detach().cpu().numpy()
            for weights in (network.concept_embeds_weights, network.special_care_embeds_weights)
        )

    @classmethod
    def load(cls, safety: SafetyConfig, device: str) -> SafetyChecker | None:
        """Return the checker that the config names, on `device`; None if it names none.

        Raises:
            ConfigError: Its files are missing, incomplete, or those of another network.
            StorageError: An object store refused or did not answer.
        """
        files = safety_checker_files.resolve(safety)
        if files is None:
            return None
        folder = files.network.folder
        network, found = StableDiffusionSafetyChecker.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
        if wrong:
            raise ConfigError(
                f"safety.checker: {folder} does not fit its config: {len(wrong)} tensors are missing or have no place, "
                f"such as {wrong[0]}; use a complete StableDiffusionSafetyChecker"
            )
        for name, tensor in network.named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"safety.checker: {folder}: {name} holds NaN or infinity; use another copy of it")
        return cls(network, CLIPImageProcessorPil.from_pretrained(files.preprocessor.folder), device)

    def scores(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
        """Return the score of each image: above 0 where the checker flags it.

        The score is the largest, over all concepts, of the cosine to the image less the concept's threshold, rounded to
        three decimals. Source: diffusers 0.42.1 `StableDiffusionSafetyChecker.forward`, whose flags are these.

        Args:
            images: RGB images, uint8, each of shape (H, W, 3), of any sizes.

        Returns:
            float64, shape (len(images),).
        """
        found = [self._scores(images[start : start + BATCH_IMAGES]) for start in range(0, len(images), BATCH_IMAGES)]
        return np.concatenate([np.empty(0), *found])

    @torch.inference_mode()
    def _scores(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
        pictures = [Image.fromarray(image) for image in images]
        pixels = self._preprocessor(pictures, return_tensors="pt").pixel_values.to(self._device, torch.float32)
        features = self._network.visual_projection(self._network.vision_model(pixels).pooler_output)
        features = torch.nn.functional.normalize(features)
        concepts, special = (
            (features @ torch.nn.functional.normalize(vectors).T).cpu().numpy() - thresholds
            for vectors, thresholds in zip(
                (self._network.concept_embeds, self._network.special_care_embeds), self._thresholds, strict=True
            )
        )
        near_care = (np.round(special, 3) > 0).any(axis=1, keepdims=True)
        scores: npt.NDArray[np.float64] = np.round(concepts + _CARE * near_care, 3).max(axis=1).astype(np.float64)
        if not np.isfinite(scores).all():
            msg = "the safety checker returned NaN or infinity"
            raise RuntimeError(msg)
        return scores
