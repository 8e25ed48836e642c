"""What a request may say, how its image is fitted and how its frames become a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pia_batch.config.base import Section
from pia_batch.storage import uris

Fit = Literal["cover", "contain", "stretch"]
Format = Literal["mp4", "gif", "webp", "png_zip"]
FORMATS: tuple[Format, ...] = ("mp4", "gif", "webp", "png_zip")
MAX_FPS: Mapping[Format, int] = MappingProxyType({"mp4": 60, "gif": 50, "webp": 60, "png_zip": 60})
"""Highest rate of each format, in frames per second.

GIF delays are multiples of 10 ms, and browsers show a frame of 10 ms for 100 ms.
"""
Motion = Literal["small", "medium", "large"]
MOTIONS: tuple[Motion, ...] = ("small", "medium", "large")
Size = Literal["fixed", "auto"]
SIZES: tuple[Size, ...] = ("fixed", "auto")
FreeInitMethod = Literal["butterworth", "ideal", "gaussian"]
FREE_INIT_METHODS: tuple[FreeInitMethod, ...] = ("butterworth", "ideal", "gaussian")


class Defaults(Section):
    """What a request gets where its column is null or absent. The ranges hold for columns too."""

    negative_prompt: str = Field("", description="what to steer away from; unused without guidance")
    motion: Motion | None = Field(None, description="small, medium, large: a word for motion_scale, which it overrides")
    motion_scale: int = Field(0, ge=0, le=8, description="0-2 more motion, 3-5 loops of 16 frames, 6-8 restyles")
    loop: bool = Field(default=False, description="the last frame returns to the image, at any number of frames")
    style: bool = Field(default=False, description="with `motion` or a motion_scale of 0-2: restyles")
    motion_curve: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        None,
        min_length=1,
        max_length=32,
        description="likeness to the image by distance in frames, 0 to 1; overrides motion_scale",
    )
    cond_frame: int = Field(0, ge=0, le=31, description="the frame that is the image; PIA was made for 0")
    guidance_scale: float = Field(7.5, ge=0, le=100, allow_inf_nan=False, description="1 and below: no guidance")
    strength: float = Field(1.0, gt=0, le=1, description="below 1: starts from the noised image")
    num_inference_steps: int = Field(25, ge=1, le=1000, description="denoising steps")
    num_frames: int = Field(16, ge=1, le=32, description="PIA was trained on 16; its motion modules end at 32")
    size: Size = Field("fixed", description="fixed: width x height; auto: from the image's own shape")
    long_side: int = Field(
        512, ge=64, le=4096, multiple_of=64, description="pixels of the longer side where size is auto"
    )
    width: int = Field(512, ge=8, le=4096, multiple_of=8, description="pixels")
    height: int = Field(512, ge=8, le=4096, multiple_of=8, description="pixels")
    clip_skip: int | None = Field(None, ge=0, le=11, description="layers of the text encoder left out")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM only: 0 deterministic, 1 as noisy as DDPM")
    ip_adapter_scale: float = Field(
        1.0, ge=0, le=2, allow_inf_nan=False, description="weight of the image prompt; 0 is without"
    )
    free_init_iters: int = Field(0, ge=0, le=10, description="FreeInit's passes, each a whole denoising; 0: off")
    free_init_method: FreeInitMethod = Field("butterworth", description="FreeInit's low-pass filter")
    free_init_order: int = Field(4, ge=1, le=32, description="order of the butterworth filter")
    free_init_spatial_stop: float = Field(0.25, ge=0, le=1, description="stop frequency over the picture")
    free_init_temporal_stop: float = Field(0.25, ge=0, le=1, description="stop frequency over the frames")
    free_init_fast: bool = Field(default=False, description="coarser first passes: about half the cost, less gain")
    fps: float = Field(
        8.0, ge=1, le=max(MAX_FPS.values()), description=f"frames per second; at most {MAX_FPS['gif']} in a GIF"
    )
    format: Format = Field("mp4", description="mp4, gif, webp, or png_zip: the frames as PNG files in a zip")


class ImagesConfig(Section):
    """How condition images are fetched and fitted."""

    fit: Fit = Field("cover", description="cover: crop to fill; contain: pad; stretch: distort")
    background: str = Field("#000000", description="under alpha, and the padding")
    allow: tuple[str, ...] = Field(
        (),
        description="further places that images may come from, such as `s3://photos/`, `/mnt/photos/` or "
        "`https://images.example.com/`; the manifest's own folder or bucket always may",
    )
    timeout_s: float = Field(30.0, gt=0, allow_inf_nan=False, description="seconds for one image, retries included")
    max_bytes: int = Field(32 * 2**20, gt=0, description="bytes of one image as stored")
    max_pixels: int = Field(40_000_000, gt=0, description="pixels of one image, checked before it is decoded")
    threads: int = Field(16, ge=1, le=256, description="images fetched at a time, for each fetch task")

    @field_validator("background")
    @classmethod
    def _is_a_colour(cls, text: str) -> str:
        if not re.fullmatch("#[0-9a-fA-F]{6}", text):
            msg = f"must be a colour such as '#ff8000', six hexadecimal digits, in quotes in YAML (got {text!r})"
            raise ValueError(msg)
        return text

    @field_validator("allow")
    @classmethod
    def _names_places(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for entry in allow:
            uris.parse_prefix(entry)
        return allow


class EncodingConfig(Section):
    """How frames become files. Part of every result's identity."""

    mp4_crf: int = Field(17, ge=0, le=51, description="x264 quality: lower is better and larger")
    mp4_preset: Literal["ultrafast", "veryfast", "fast", "medium", "slow"] = Field(
        "veryfast", description="x264 effort: slower is smaller"
    )
    gif_dither: bool = Field(default=False, description="hides banding, costs size")
    webp_quality: int = Field(90, ge=0, le=100, description="higher is better and larger")
    webp_lossless: bool = Field(default=False, description="every pixel as drawn")
    webp_method: int = Field(2, ge=0, le=6, description="0 fast and large, 6 slow and small")
    provenance: bool = Field(
        default=True,
        description="files tell how they were made: prompt, settings, seed, model, and that a model made them",
    )

    def identity(self, file_format: Format) -> str:
        """What decides the bytes of a file of this format, so that the rest can change without making it due."""
        prefix = file_format.split("_")[0]
        chosen = {name: value for name, value in self.model_dump().items() if name.startswith((prefix, "provenance"))}
        return " ".join([file_format, *(f"{name}={value}" for name, value in sorted(chosen.items()))])
