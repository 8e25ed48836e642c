"""Safety checkers of the published class with small random weights, in the layouts in which people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

SIDE = 30


def safety_checker(seed: int = 0, threshold: float = 0.15, special: float = 0.2) -> StableDiffusionSafetyChecker:
    """A checker of 60,000 parameters; the higher the thresholds, the fewer images it flags."""
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": SIDE, "patch_size": 5, "projection_dim": 16}
    text = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(seed)
    config = CLIPConfig(projection_dim=16, vision_config=vision, text_config=text)
    network = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
        network.concept_embeds_weights.fill_(threshold)
        network.special_care_embeds_weights.fill_(special)
    return network


def preprocessor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)


def save(folder: Path, network: StableDiffusionSafetyChecker | None = None, *, alone: bool = True) -> Path:
    """Write a checker on its own, or as the two folders of a checkpoint; return the folder."""
    (network or safety_checker()).save_pretrained(folder if alone else folder / "safety_checker")
    preprocessor().save_pretrained(folder if alone else folder / "feature_extractor")
    return folder


def pictures(number: int, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Pictures of several sizes that differ in colour and in detail."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(number):
        height, width = 40 + 8 * (index % 3), 32 + 16 * (index % 2)
        noise = rng.integers(0, 256, (height, width, 3)) * rng.uniform(0, 1)
        made.append(np.clip(noise + rng.integers(0, 200, 3), 0, 255).astype(np.uint8))
    return made
