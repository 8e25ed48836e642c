"""Which weights draw, how they are held, and what is laid over them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pia_batch.config.base import Section
from pia_batch.config.speed_presets import Speed
from pia_batch.schema.identity import Decides

EMBEDDED = "embedded"
"""The value of `model.base` that means the checkpoint inside this package."""

SchedulerName = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc", "lcm", "checkpoint"
]


class SchedulerConfig(Section):
    """The sampler, one for the run.

    Source of the defaults: PIA was trained on a linear beta schedule and never clips its samples
    (open-mmlab/PIA `example/config/base.yaml`); Stable Diffusion 1.5 repositories ship `scaled_linear`.
    """

    name: Annotated[SchedulerName, Decides()] = Field(
        "ddim", description="`checkpoint` keeps what the checkpoint ships, settings included"
    )
    settings: Annotated[dict[str, bool | int | float | str], Decides(neutral={})] = Field(
        default_factory=dict,
        description="arguments of the diffusers scheduler; laid over `beta_schedule: linear`, `clip_sample: false`",
    )


class AddOn(Section):
    """Weights that are laid over a model's own."""

    source: str = Field(description="a `.safetensors` file, a folder, an object-storage URI of either, or a hub id")
    revision: str | None = Field(None, description="hub commit, tag or branch of `source`")
    weight_name: str | None = Field(None, description="the file, where `source` holds several")


class LoraConfig(AddOn):
    """One LoRA laid over a model's UNet and text encoder."""

    scale: Annotated[float, Decides()] = Field(
        1.0, ge=-10, le=10, allow_inf_nan=False, description="how strongly it is applied"
    )


class TextualInversionConfig(AddOn):
    """One embedding that a word of the prompt stands for."""

    token: Annotated[str | None, Decides(neutral=None)] = Field(
        None, min_length=1, description="the word; null: the one that the file names"
    )


class IpAdapterConfig(AddOn):
    """An image prompt beside the text prompt; `h94/IP-Adapter` on the hub has `models/ip-adapter_sd15.safetensors`."""

    image_encoder: str | None = Field(
        None,
        description="folder, object-storage URI or hub id of a CLIPVisionModelWithProjection; null: `image_encoder/` "
        "beside the weights",
    )
    image_encoder_revision: str | None = Field(None, description="hub commit, tag or branch of `image_encoder`")


class FreeUConfig(Section):
    """FreeU: weaker skip connections, stronger backbone features, no further cost.

    In diffusers a zero switches all of it off, so that none is allowed here.

    Source of the defaults: ChenyangSi/FreeU README, Stable Diffusion 1.5.
    """

    s1: Annotated[float, Decides()] = Field(
        0.9, gt=0, le=2, description="scale of the skip features of the first up block"
    )
    s2: Annotated[float, Decides()] = Field(
        0.2, gt=0, le=2, description="scale of the skip features of the second up block"
    )
    b1: Annotated[float, Decides()] = Field(
        1.5, gt=0, le=3, description="scale of the backbone features of the first up block"
    )
    b2: Annotated[float, Decides()] = Field(
        1.6, gt=0, le=3, description="scale of the backbone features of the second up block"
    )


class ModelConfig(Section):
    """Which weights, and how they are held. Part of every result's identity."""

    name: str = Field("default", description="what the manifest's `model` column calls it", min_length=1)
    base: str = Field(
        EMBEDDED,
        description="`embedded`, a diffusers folder, a `.safetensors` file, an object-storage URI of either, or a hub "
        "id; Stable Diffusion 1.5 layout",
    )
    revision: str | None = Field(None, description="hub commit, tag or branch of `base`; a commit pins it")
    variant: str | None = Field(None, description="hub file variant of `base`, such as `fp16`")
    config: str | None = Field(
        None,
        description="folder or hub id with the tokenizer and the configs of a single-file `base`; null: those of "
        "Stable Diffusion 1.5, which are part of the package",
    )
    motion_adapter: str | None = Field(
        None, description="as `base`; null: `motion_adapter/` inside `base`, or its UNet's own"
    )
    motion_adapter_revision: str | None = Field(None, description="hub commit, tag or branch of `motion_adapter`")
    motion_adapter_variant: str | None = Field(None, description="hub file variant of `motion_adapter`")
    vae: str | None = Field(None, description="as `base`, another VAE; null: the one inside `base`")
    vae_revision: str | None = Field(None, description="hub commit, tag or branch of `vae`")
    loras: tuple[LoraConfig, ...] = Field((), description="each with `source`, `weight_name`, `revision`, `scale`")
    fuse_loras: bool = Field(default=False, description="merge the LoRAs into the weights: no cost per step")
    textual_inversions: tuple[TextualInversionConfig, ...] = Field(
        (), description="each with `source`, `weight_name`, `revision`, `token`"
    )
    ip_adapter: IpAdapterConfig | None = Field(
        None, description="`source`, `weight_name`, `revision`, `image_encoder`, `image_encoder_revision`"
    )
    freeu: Annotated[FreeUConfig | None, Decides(neutral=None)] = Field(
        None, description="`s1`, `s2`, `b1`, `b2`; null: off"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="auto: float16 on a GPU, float32 on a CPU"
    )
    speed: Speed = Field(
        "exact",
        description="exact: every pixel as the pipeline draws it; balanced, fast: fewer operations by approximations, "
        "at a measured distance from exact",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="the UNet and the VAE's decoder by `torch.compile`, a graph for each shape that comes often; auto: "
        "on a GPU; true: also on a CPU, which takes a C++ compiler and minutes",
    )
    memory: Literal["auto", "max_speed", "low"] = Field(
        "auto",
        description="max_speed: all networks stay on the device; low: networks are moved there when needed, the VAE "
        "works in slices and, above its own size, in tiles; auto: low where the GPU is small, but without tiles",
    )
    sha256: dict[str, str] = Field(
        default_factory=dict,
        description="file name (`unet/diffusion_pytorch_model.safetensors`, or a single file's) to the sha256 that it "
        "must have",
    )
    scheduler: Annotated[SchedulerConfig, Decides()] = SchedulerConfig()
