"""Index of a diffusers folder: refuses pipelines whose networks or sampling PIA does not have, by their names."""

from __future__ import annotations

import re
from pathlib import Path

from pia_batch.errors import ConfigError
from pia_batch.weights import components

_ORDINARY = "set model.base to an ordinary checkpoint of Stable Diffusion 1.5"

_OTHERS = (
    (
        r"RectifiedFlow|InstaFlow",
        "its UNet was distilled for a rectified flow (InstaFlow), which no scheduler of PIA samples",
    ),
    (r"InstructPix2Pix", "its UNet edits images and has eight input channels"),
    (r"Upscale|SuperResolution", "it enlarges images"),
    (r"Depth2Img|LDM3D", "it reads or makes depth, for which PIA has no channels"),
    (r"ImageVariation|UnCLIP|Unclip", "it reads images in the place of text"),
    (
        (
            r"XL|StableDiffusion3|PixArt|Kandinsky|Cascade|Wuerstchen|DiT|Kolors|CogView|CogVideo|StableVideo|TextToVideo"
            r"|AltDiffusion|^(Flux|Hunyuan|Lumina|AuraFlow|Sana|Chroma|Qwen|Playground|IF|Wan|LTX|Mochi|Allegro)"
        ),
        "it is of another family than Stable Diffusion 1.5",
    ),
)
"""Patterns of class names of pipelines, with the reason that PIA cannot use them. Source: diffusers 0.42.1."""


def check(path: Path) -> None:
    """Check the `model_index.json` of a folder. Unknown names pass: the folder's parts are checked by themselves.

    Raises:
        ConfigError: It is damaged, or of a pipeline that cannot be the base of PIA.
    """
    index = components.read_json(path)
    named = index.get("_class_name")
    name = str(named[-1] if isinstance(named, list) and named else named)  # a list: module and class of a custom one
    reason = next((reason for pattern, reason in _OTHERS if re.search(pattern, name)), None)
    if reason is None and "transformer" in index and "unet" not in index:
        reason = "it has a transformer in the place of a UNet"
    if reason is not None:
        raise ConfigError(f"model.base: {path} is of a {name}: {reason}; {_ORDINARY}")
