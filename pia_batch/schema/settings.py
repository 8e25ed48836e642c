"""Per-row settings, each declared once.

The columns of manifests and results, the config section `defaults`, validation, `Shot`, the content key and the tables
of the documentation all follow from these declarations. To add a setting, add a field here, use it, and test it.

Field order is column order. A field's annotation gives its Arrow type, and a `Literal` its choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from pydantic import Field

from pia_batch.schema.declaration import Setting, declared, setting
from pia_batch.schema.key_prompts import KeyPrompts
from pia_batch.schema.lora_scales import MAX_SCALE, LoraScales

Format = Literal["mp4", "gif", "webp", "png_zip", "webm"]
VideoCodec = Literal["h264", "av1"]
Motion = Literal["small", "medium", "large"]
Size = Literal["fixed", "auto"]
FreeInitMethod = Literal["butterworth", "ideal", "gaussian"]
Context = Literal["windows", "freenoise", "chain"]
Interpolation = Literal["linear", "slerp", "hold"]

FORMATS: tuple[Format, ...] = get_args(Format)
VIDEO_CODECS: tuple[VideoCodec, ...] = get_args(VideoCodec)
MOTIONS: tuple[Motion, ...] = get_args(Motion)
CONTEXTS: tuple[Context, ...] = get_args(Context)
FREE_INIT_METHODS: tuple[FreeInitMethod, ...] = get_args(FreeInitMethod)
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

MAX_FPS: Mapping[Format, int] = MappingProxyType({"mp4": 60, "gif": 50, "webp": 60, "png_zip": 60, "webm": 60})
"""Highest rate of each format, in frames per second.

GIF delays are multiples of 10 ms, and browsers show a frame of 10 ms for 100 ms.
"""

MAX_SEED = 2**63 - 1
MAX_FRAMES = 1024
MAX_PROMPT_BYTES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings that the engine takes, row by row, with their defaults."""

    negative_prompt: str = setting(
        "", "Text to steer away from; unused without guidance.", neutral="", allowed=f"up to {MAX_PROMPT_BYTES:,} bytes"
    )
    negative_prompts: KeyPrompts | None = setting(
        None,
        "Instead of `negative_prompt`: texts by frame, in the form of `prompts`. null: not used.",
        neutral=None,
        allowed=f"frames from 0 up to below `num_frames`, texts of up to {MAX_PROMPT_BYTES:,} bytes together",
        min_length=1,
    )
    prompt_interpolation: Interpolation = setting(
        "linear",
        "Text embedding between two key prompts; linear or slerp: a mixture of both, hold: the earlier one.",
        neutral="linear",
    )
    prompt_hold: float = setting(
        0.0,
        "Share of the frames between two key prompts that keep the earlier one; the mixture begins after them.",
        neutral=0.0,
        ge=0,
        le=1,
    )
    motion_scale: int = setting(
        0,
        "Preset of PIA: 0-2 move more and more, 3-5 are loops of 16 frames, 6-8 restyle the image more and more, "
        "or less and less with `arithmetic: original`.",
        ge=0,
        le=8,
    )
    loop: bool = setting(
        False,
        "true: the last frame returns to the image, at any number of frames.",
        neutral=False,
        allowed="with a `motion_scale` of 0 to 5",
    )
    motion_curve: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = setting(
        None,
        "Likeness to the image by distance in frames, the last value repeated; overrides `motion`, `motion_scale`, "
        "`loop` and `style`. null: not used.",
        neutral=None,
        allowed="1 to `num_frames` numbers from 0 to 1",
        min_length=1,
        max_length=MAX_FRAMES,
    )
    cond_frame: int = setting(
        0,
        "Index of the frame that equals the image; PIA was trained with 0.",
        neutral=0,
        allowed="0 to `num_frames` - 1",
        ge=0,
        le=MAX_FRAMES - 1,
    )
    guidance_scale: float = setting(
        7.5, "Strength of classifier-free guidance; 1 and below: no guidance, half the work.",
        ge=0, le=100, allow_inf_nan=False,
    )  # fmt: skip
    strength: float = setting(
        1.0,
        "Share of the denoising steps that run; below 1, generation starts from the noised image.",
        neutral=1.0,
        gt=0,
        le=1,
    )
    num_inference_steps: int = setting(25, "Number of denoising steps.", ge=1, le=1000)
    num_frames: int = setting(
        16, "Number of frames; PIA was trained on 16. `context` generates longer clips.", ge=1, le=MAX_FRAMES
    )
    context: Context | None = setting(
        None,
        "Method for clips of more than `context_length` frames. windows: overlapping windows, fused at every step, in "
        "constant memory; freenoise: one call, windows in the motion modules only; chain: the last frame is the next "
        "image. null: one call up to what the motion modules know (32 frames in PIA's), windows "
        "beyond.",
        neutral=None,
    )
    context_length: int = setting(
        16,
        "Number of frames that the motion modules process together, where a `context` is used.",
        neutral=16,
        allowed="1 to 32, at most what the motion modules know",
        ge=1,
        le=32,
    )
    context_overlap: int = setting(
        4,
        "Number of frames that neighbouring windows share, with `context: windows`.",
        neutral=4,
        allowed="0 to `context_length` - 1",
        ge=0,
        le=31,
    )
    context_stride: int = setting(
        4,
        "Distance of neighbouring windows in frames, with `context: freenoise`.",
        neutral=4,
        allowed="1 to `context_length`",
        ge=1,
        le=32,
    )
    width: int = setting(512, "Width of the clip in pixels; `images.fit` fits the image.", ge=8, le=4096, multiple_of=8)
    height: int = setting(512, "Height of the clip in pixels, as `width`.", ge=8, le=4096, multiple_of=8)
    clip_skip: int | None = setting(
        None, "Number of last layers of the text encoder that are skipped. null: none.", neutral=None, ge=0, le=11
    )
    eta: float = setting(
        0.0, "Noise added at each step, DDIM only: 0 is deterministic, 1 as noisy as DDPM.", neutral=0.0, ge=0, le=1
    )
    ip_adapter_scale: float = setting(
        1.0, "Weight of the image prompt; 0: not used. Only for models with an `ip_adapter`.",
        ge=0, le=2, allow_inf_nan=False,
    )  # fmt: skip
    lora_scales: LoraScales | None = setting(
        None,
        "Scales of the model's LoRAs by name, in place of the config's: `[{name: zoom, scale: 0.5}]`, a map, or either "
        "as JSON text. null: those of the config.",
        neutral=None,
        allowed=f"names of the model's `loras`, each once, numbers from -{MAX_SCALE:g} to {MAX_SCALE:g}",
    )
    free_init_iters: int = setting(
        0,
        "Number of FreeInit passes, each a whole denoising; 0: off. Not allowed with `strength` below 1.",
        neutral=0,
        ge=0,
        le=10,
    )
    free_init_method: FreeInitMethod = setting("butterworth", "Low-pass filter of FreeInit.", needs="free_init_iters")
    free_init_order: int = setting(4, "Order of FreeInit's butterworth filter.", needs="free_init_iters", ge=1, le=32)
    free_init_spatial_stop: float = setting(
        0.25, "Normalised stop frequency of FreeInit's filter over the picture.", needs="free_init_iters", ge=0, le=1
    )
    free_init_temporal_stop: float = setting(
        0.25, "Normalised stop frequency of FreeInit's filter over the frames.", needs="free_init_iters", ge=0, le=1
    )
    free_init_fast: bool = setting(
        False,
        "true: the first passes of FreeInit take fewer steps: about half the cost, less gain.",
        neutral=False,
        needs="free_init_iters",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(EngineSettings):
    """Settings that have a default in a config: those of the engine, of the clip's size and of the file."""

    size: Size = setting(
        "fixed",
        "fixed: `width` x `height`; auto: the image's own shape up to `long_side`, in multiples of 64, or with "
        "`arithmetic: original` of 8.",
        neutral="fixed",
    )
    long_side: int = setting(
        512, "Largest number of pixels of the longer side with `size: auto`; images are never enlarged.",
        needs="size", ge=64, le=4096, multiple_of=64,
    )  # fmt: skip
    fps: float = setting(8.0, "Frames per second; at most 50 in a GIF.", ge=1, le=60)
    format: Format = setting("mp4", "File format; webm: VP9; png_zip: the frames as PNG files in a zip.")
    codec: VideoCodec = setting(
        "h264",
        "Video codec of an MP4. h264 plays everywhere; av1 is smaller, and plays in current browsers and players.",
        neutral="h264",
        formats=("mp4",),
    )
    loop_count: int = setting(
        0, "Number of times that a GIF or WebP plays; 0: for ever.", neutral=0, formats=("gif", "webp"), ge=0, le=65535
    )
    color_match: bool = setting(
        False,
        "true: each frame gets the mean and the deviation of the image's colours, which the VAE lets drift.",
        neutral=False,
    )
    sharpen: float = setting(
        0.0,
        "Amount of an unsharp mask over each frame; 0: off, 1: differences from the blurred frame are doubled.",
        neutral=0.0,
        ge=0,
        le=2,
    )
    interpolate: int = setting(
        1,
        "Number by which frames and `fps` are multiplied by motion-compensated frames in between; 1: off.",
        neutral=1,
        ge=1,
        le=4,
    )
    poster: bool = setting(
        False,
        "true: the first frame of the file is stored as a JPEG next to it.",
        neutral=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings(Settings):
    """All settings of one row: also those without a default in a config."""

    seed: int = setting(
        0,
        "Seed of the row's random numbers. null: derived from `request_id`.",
        allowed="0 to 2^63-1",
        ge=0,
        le=MAX_SEED,
    )
    prompts: KeyPrompts | None = setting(
        None,
        "Instead of `prompt`: texts by frame, `[{frame: 0, prompt: ...}, {frame: 8, prompt: ...}]`, between which the "
        "clip changes; a map from frames to texts, or either as JSON text, is read too. null: not used.",
        neutral=None,
        allowed=f"frames from 0 up to below `num_frames`, texts of up to {MAX_PROMPT_BYTES:,} bytes together",
        min_length=1,
    )
    upscale: int = setting(
        1,
        "Factor by which `upscale.model` of the config enlarges frames before they are stored; 1: off. null: "
        "`upscale.scale`.",
        neutral=1,
        ge=1,
        le=8,
    )


@dataclass(frozen=True, kw_only=True)
class MotionWords:
    """Words for a motion_scale: columns and defaults that are resolved into `motion_scale` before anything else."""

    motion: Motion | None = setting(
        None,
        "Amount of motion: a word for a `motion_scale` of 0, 1 or 2, which it overrides. null: not used.",
    )
    style: bool = setting(
        False,
        "true: restyles the image.",
        allowed="with `motion`, or a `motion_scale` of 0-2 or 6-8",
    )


ROW_SETTINGS: tuple[Setting, ...] = declared(RowSettings)
"""Every setting that decides a clip or its file."""

DEFAULT_SETTINGS: tuple[Setting, ...] = declared(MotionWords, Settings)
"""Every setting that has a default in a config."""

BY_NAME: dict[str, Setting] = {each.name: each for each in declared(MotionWords, RowSettings)}
"""Every setting, words for motion included."""
