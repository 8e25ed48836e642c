"""Sections of a config about models: weights, add-ons, scheduler and precision."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from pia_batch.config.arithmetic import Arithmetic
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
        "ddim",
        description="Name of the sampler; `checkpoint` keeps the scheduler that the checkpoint ships, "
        "settings included.",
    )
    settings: Annotated[dict[str, bool | int | float | str], Decides(neutral={})] = Field(
        default_factory=dict,
        description="Arguments of the diffusers scheduler; they override `beta_schedule: linear`, "
        "`clip_sample: false`.",
    )


class AddOn(Section):
    """Weights that are added to a model's own."""

    source: str = Field(description="A `.safetensors` file, a folder, an object-storage URI of either, or a hub id.")
    revision: str | None = Field(None, description="Hub commit, tag or branch of `source`. null: `main`.")
    weight_name: str | None = Field(
        None, description="Name of the file, where `source` has several. null: the only one."
    )


class LoraConfig(AddOn):
    """One LoRA for a model's UNet and text encoder."""

    name: str | None = Field(
        None, min_length=1, description="Name in the column `lora_scales`. null: that of its file or folder."
    )

    scale: Annotated[float, Decides()] = Field(
        1.0, ge=-10, le=10, allow_inf_nan=False, description="Strength of the LoRA; 1: as trained."
    )

    @property
    def label(self) -> str:
        """Name in the column `lora_scales`."""
        place = self.weight_name or self.source
        return self.name or PurePosixPath(place.rstrip("/")).name.removesuffix(".safetensors")


class TextualInversionConfig(AddOn):
    """One embedding that is used through a word of the prompt."""

    token: Annotated[str | None, Decides(neutral=None)] = Field(
        None,
        min_length=1,
        description="Word that stands for the embedding in prompts. null: the one that the file names.",
    )


class IpAdapterConfig(AddOn):
    """An image prompt next to the text prompt; `h94/IP-Adapter` on the hub has `models/ip-adapter_sd15.safetensors`."""

    image_encoder: str | None = Field(
        None,
        description="Folder, object-storage URI or hub id of a CLIPVisionModelWithProjection. null: "
        "`image_encoder/` next to the weights.",
    )
    image_encoder_revision: str | None = Field(
        None, description="Hub commit, tag or branch of `image_encoder`. null: `main`."
    )


class FreeUConfig(Section):
    """FreeU: weaker skip connections, stronger backbone features, no further cost.

    In diffusers a zero switches all of it off, so zeros are refused here.

    Source of the defaults: ChenyangSi/FreeU README, Stable Diffusion 1.5.
    """

    s1: Annotated[float, Decides()] = Field(
        0.9, gt=0, le=2, description="Scale of the skip features of the first up block."
    )
    s2: Annotated[float, Decides()] = Field(
        0.2, gt=0, le=2, description="Scale of the skip features of the second up block."
    )
    b1: Annotated[float, Decides()] = Field(
        1.5, gt=0, le=3, description="Scale of the backbone features of the first up block."
    )
    b2: Annotated[float, Decides()] = Field(
        1.6, gt=0, le=3, description="Scale of the backbone features of the second up block."
    )


class ModelConfig(Section):
    """Weights of a model, and options of its engine. Those that decide pixels are part of the engine id."""

    name: str = Field("default", description="Name of the model in the manifest's `model` column.", min_length=1)
    base: str = Field(
        EMBEDDED,
        description="`embedded`, a diffusers folder, a `.safetensors` file, an object-storage URI of either, "
        "or a hub id; in the layout of Stable Diffusion 1.5.",
    )
    revision: str | None = Field(
        None, description="Hub commit, tag or branch of `base`; a commit pins it. null: `main`."
    )
    variant: str | None = Field(
        None,
        description="File variant of `base`, such as `fp16`. A network that has no files of it is loaded without "
        "variant. null: none.",
    )
    config: str | None = Field(
        None,
        description="Folder or hub id with the tokenizer and the configs of a single-file `base`. null: those "
        "of Stable Diffusion 1.5, which are part of the package.",
    )
    motion_adapter: str | None = Field(
        None,
        description="PIA's motion adapter, in the forms of `base`. null: `motion_adapter/` inside `base`, or "
        "the motion modules of its UNet.",
    )
    motion_adapter_revision: str | None = Field(
        None, description="Hub commit, tag or branch of `motion_adapter`. null: `main`."
    )
    motion_adapter_variant: str | None = Field(None, description="Hub file variant of `motion_adapter`. null: none.")
    vae: str | None = Field(None, description="Another VAE, in the forms of `base`. null: the one inside `base`.")
    vae_revision: str | None = Field(None, description="Hub commit, tag or branch of `vae`. null: `main`.")
    loras: tuple[LoraConfig, ...] = Field(
        (), description="LoRAs, each with `source`, `weight_name`, `revision`, `name`, `scale`."
    )
    fuse_loras: bool = Field(
        default=False, description="true: merge the LoRAs into the weights, so that they cost nothing per step."
    )
    textual_inversions: tuple[TextualInversionConfig, ...] = Field(
        (), description="Embeddings for words of the prompt, each with `source`, `weight_name`, `revision`, `token`."
    )
    ip_adapter: IpAdapterConfig | None = Field(
        None,
        description="IP-Adapter with `source`, `weight_name`, `revision`, `image_encoder`, "
        "`image_encoder_revision`. null: none.",
    )
    freeu: Annotated[FreeUConfig | None, Decides(neutral=None)] = Field(
        None, description="FreeU with `s1`, `s2`, `b1`, `b2`. null: off."
    )
    arithmetic: Annotated[Arithmetic, Decides(neutral="diffusers")] = Field(
        "diffusers",
        description="diffusers: as `PIAPipeline`; original: as the program of PIA's authors (axes of norms, order of "
        "styles, scheduler, default negative prompt, sizes), see docs/models.md.",
    )
    conv_in: Annotated[Literal["auto", "base", "adapter"], Decides(neutral="auto")] = Field(
        "auto",
        description="Source of the first layer's latent channels and bias; auto: the base, and with `arithmetic: "
        "original` a motion adapter in a single file next to a base in a folder.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Floating-point type of the networks; auto: float16 on a GPU, float32 on a CPU."
    )
    vae_dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"], Decides(neutral="auto")] = Field(
        "auto", description="Floating-point type of the VAE; auto: that of the other networks."
    )
    vae_decode: Annotated[Literal["chunks", "per_frame"], Decides(neutral="chunks")] = Field(
        "chunks", description="Number of frames that the VAE decodes in one call; chunks: as many as suit the device."
    )
    speed: Speed = Field(
        "exact",
        description="exact: the same pixels as the pipeline; balanced, fast: fewer operations by "
        "approximations, at a measured distance from exact.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="true: compile the UNet and the VAE's decoder by `torch.compile`, one graph for each "
        "shape that is frequent; auto: only on a GPU; on a CPU it needs a C++ compiler and "
        "minutes.",
    )
    memory: Literal["auto", "max_speed", "low"] = Field(
        "auto",
        description="max_speed: all networks stay on the device; low: networks are moved there when needed, "
        "the VAE works in slices and, above its own size, in tiles; auto: low where the GPU is "
        "small, but without tiles.",
    )
    sha256: dict[str, str] = Field(
        default_factory=dict,
        description="Expected SHA-256 by file name (`unet/diffusion_pytorch_model.safetensors`, or the name "
        "of a single file).",
    )
    scheduler: Annotated[SchedulerConfig, Decides()] = SchedulerConfig()
