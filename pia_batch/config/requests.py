"""Sections of a config about requests: defaults of settings, how images are fitted, how frames are encoded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, field_validator

from pia_batch.config.base import Section
from pia_batch.schema.declaration import Setting
from pia_batch.schema.identity import Decides, decisive
from pia_batch.schema.settings import DEFAULT_SETTINGS, Format, MotionWords, Settings, VideoCodec
from pia_batch.storage import uris

Fit = Literal["cover", "contain", "stretch"]

_BY_ARITHMETIC = {"negative_prompt": "null: none, or the list of PIA's authors where `arithmetic` is original."}
"""Settings whose default is that of the model's arithmetic where the config gives none, with what null means."""


def _default(setting: Setting) -> tuple[Any, Any]:
    """Return type and default of a setting in the section `defaults`."""
    text, limits = setting.description, setting.limits
    if setting.name in _BY_ARITHMETIC:
        return setting.annotation | None, Field(None, description=f"{text} {_BY_ARITHMETIC[setting.name]}", **limits)
    return setting.annotation, Field(setting.default, description=text, **limits)


if TYPE_CHECKING:

    class Defaults(Settings, MotionWords, Section):
        """Values of settings where a row's column is null or absent; see `schema.settings`."""

        def __init__(self, **values: Any) -> None: ...

else:
    Defaults = create_model(
        "Defaults",
        __base__=Section,
        __module__=__name__,
        __doc__="Values of settings where a row's column is null or absent. The ranges hold for columns too.",
        **{each.name: _default(each) for each in DEFAULT_SETTINGS},
    )


class ImagesConfig(Section):
    """Options of fetching condition images and of fitting them to the clip."""

    fit: Annotated[Fit, Decides()] = Field(
        "cover", description="cover: crop the image to fill the clip; contain: pad it; stretch: distort it."
    )
    background: Annotated[str, Decides()] = Field(
        "#000000", description="Colour under transparent pixels and of the padding."
    )
    allow: tuple[str, ...] = Field(
        (),
        description="Further places that images may come from, such as `s3://photos/`, `/mnt/photos/` or "
        "`https://images.example.com/`; the manifest's own folder or bucket is always allowed.",
    )
    timeout_s: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="Longest time to fetch one image, in seconds, retries included."
    )
    max_bytes: int = Field(32 * 2**20, gt=0, description="Largest size of one image as stored, in bytes.")
    max_pixels: int = Field(
        40_000_000, gt=0, description="Largest number of pixels of one image, checked before it is decoded."
    )
    threads: int = Field(16, ge=1, le=256, description="Number of images that each fetch task fetches at a time.")

    def identity(self) -> str:
        """Return the options that decide the fitted image, for the content key."""
        chosen = decisive(self) | {"background": self.background.lower()}
        return " ".join(f"{name}={value}" for name, value in sorted(chosen.items()))

    @field_validator("background")
    @classmethod
    def _is_a_colour(cls, text: str) -> str:
        if not re.fullmatch("#[0-9a-fA-F]{6}", text):
            msg = f"must be a colour such as '#ff8000', six hexadecimal digits (got {text!r}); in a file, in quotes"
            raise ValueError(msg)
        return text

    @field_validator("allow")
    @classmethod
    def _names_places(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for entry in allow:
            uris.parse_prefix(entry)
        return allow


class EncodingConfig(Section):
    """Encoders' options. Each is part of the content key of those formats that it affects.

    To add an option, declare it with its neutral value: the one under which files are what they were before.
    """

    mp4_crf: Annotated[int, Decides(formats=("mp4",))] = Field(
        17, ge=0, le=51, description="Quality of x264: lower is better and larger."
    )
    mp4_preset: Annotated[Literal["ultrafast", "veryfast", "fast", "medium", "slow"], Decides(formats=("mp4",))] = (
        Field("veryfast", description="Effort of x264: slower is smaller.")
    )
    av1_crf: Annotated[int, Decides(formats=("mp4/av1",))] = Field(
        24, ge=1, le=63, description="Quality of SVT-AV1: lower is better and larger."
    )
    av1_preset: Annotated[int, Decides(formats=("mp4/av1",))] = Field(
        8, ge=0, le=13, description="Effort of SVT-AV1: 13 is fast and large, 0 slow and small."
    )
    webm_crf: Annotated[int, Decides(formats=("webm",))] = Field(
        24, ge=0, le=63, description="Quality of VP9: lower is better and larger."
    )
    webm_lossless: Annotated[bool, Decides(neutral=False, formats=("webm",))] = Field(
        default=False, description="true: VP9 loses nothing but the colour resolution of 4:2:0; `webm_crf` is unused."
    )
    webm_speed: Annotated[int, Decides(formats=("webm",))] = Field(
        4, ge=0, le=8, description="Effort of VP9: 8 is fast and large, 0 slow and small."
    )
    gif_dither: Annotated[bool, Decides(neutral=False, formats=("gif",))] = Field(
        default=False, description="true: dither GIFs, which hides banding and costs size."
    )
    webp_quality: Annotated[int, Decides(formats=("webp",))] = Field(
        90, ge=0, le=100, description="Quality of WebP: higher is better and larger."
    )
    webp_lossless: Annotated[bool, Decides(neutral=False, formats=("webp",))] = Field(
        default=False, description="true: WebP keeps every pixel as it was generated."
    )
    webp_method: Annotated[int, Decides(formats=("webp",))] = Field(
        2, ge=0, le=6, description="Effort of WebP: 0 is fast and large, 6 slow and small."
    )
    provenance: Annotated[bool, Decides(neutral=False)] = Field(
        default=True,
        description="true: files record how they were made: prompt, settings, seed, model, and that a model made them.",
    )

    def identity(self, file_format: Format, codec: VideoCodec | None = None) -> str:
        """Return the options that decide the bytes of a file of this format and codec, for the content key."""
        encoder = file_format if codec in (None, "h264") else f"{file_format}/{codec}"
        chosen = decisive(self, encoder)
        return " ".join([file_format, *(f"{name}={value}" for name, value in sorted(chosen.items()))])
