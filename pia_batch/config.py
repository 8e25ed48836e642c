"""RunConfig and its sections: everything a run can be told, checked before anything starts.

A config is one YAML file. Three layers make it, the later wins: the defaults below (made for Stable Diffusion 1.5),
the embedded model's own defaults where `model.base` is `embedded`, and what the operator wrote. An unknown key is an
error.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pia_batch import tiny
from pia_batch.errors import ConfigError

EMBEDDED = "embedded"
"""The value of `model.base` that means the checkpoint inside this package."""

Fit = Literal["cover", "contain", "stretch"]
Format = Literal["mp4", "gif", "webp", "png_zip"]
FORMATS: tuple[Format, ...] = ("mp4", "gif", "webp", "png_zip")
SchedulerName = Literal["ddim", "pndm", "lms", "euler", "euler_ancestral", "dpmpp_2m", "checkpoint"]


class Section(BaseModel):
    """A frozen part of the config; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SchedulerConfig(Section):
    """The sampler, one for the run.

    Source of the defaults: PIA was trained on a linear beta schedule and never clips its samples
    (open-mmlab/PIA `example/config/base.yaml`); Stable Diffusion 1.5 repositories ship `scaled_linear`.
    """

    name: SchedulerName = Field("ddim", description="`checkpoint` keeps what the checkpoint ships, settings included")
    settings: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="arguments of the diffusers scheduler; laid over `beta_schedule: linear`, `clip_sample: false`",
    )


class ModelConfig(Section):
    """Which weights, and how they are held. Part of every result's identity."""

    name: str = Field("default", description="what the manifest's `model` column calls it", min_length=1)
    base: str = Field(
        EMBEDDED, description="`embedded`, a diffusers folder, or a hub id of Stable Diffusion 1.5 layout"
    )
    revision: str | None = Field(None, description="hub commit, tag or branch of `base`; a commit pins it")
    variant: str | None = Field(None, description="hub file variant of `base`, such as `fp16`")
    motion_adapter: str | None = Field(None, description="folder or hub id; null: `motion_adapter/` inside `base`")
    motion_adapter_revision: str | None = Field(None, description="hub commit, tag or branch of `motion_adapter`")
    motion_adapter_variant: str | None = Field(None, description="hub file variant of `motion_adapter`")
    vae: str | None = Field(None, description="folder or hub id of another VAE; null: the one inside `base`")
    vae_revision: str | None = Field(None, description="hub commit, tag or branch of `vae`")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="auto: float16 on a GPU, float32 on a CPU"
    )
    scheduler: SchedulerConfig = SchedulerConfig()


class Defaults(Section):
    """What a request gets where its column is null or absent. The ranges hold for columns too."""

    negative_prompt: str = Field("", description="what to steer away from; unused without guidance")
    motion_scale: int = Field(0, ge=0, le=8, description="0-2 more motion, 3-5 loops, 6-8 restyles")
    motion_curve: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        None,
        min_length=1,
        max_length=32,
        description="likeness to the image by distance in frames, 0 to 1; overrides motion_scale",
    )
    guidance_scale: float = Field(7.5, ge=0, le=100, allow_inf_nan=False, description="1 and below: no guidance")
    strength: float = Field(1.0, gt=0, le=1, description="below 1: starts from the noised image")
    num_inference_steps: int = Field(25, ge=1, le=1000, description="denoising steps")
    num_frames: int = Field(16, ge=1, le=32, description="PIA was trained on 16; its motion modules end at 32")
    width: int = Field(512, ge=8, le=4096, multiple_of=8, description="pixels")
    height: int = Field(512, ge=8, le=4096, multiple_of=8, description="pixels")
    clip_skip: int | None = Field(None, ge=0, le=11, description="layers of the text encoder left out")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM only: 0 deterministic, 1 as noisy as DDPM")
    fps: float = Field(8.0, ge=1, le=60, description="frames per second; GIF ends at 50")
    format: Format = Field("mp4", description="mp4, gif, webp, or png_zip: the frames as PNG files in a zip")


class ImagesConfig(Section):
    """How condition images are fetched and fitted."""

    fit: Fit = Field("cover", description="cover: crop to fill; contain: pad; stretch: distort")
    background: str = Field("#000000", pattern=r"^#[0-9a-fA-F]{6}$", description="under alpha, and the padding")
    schemes: tuple[str, ...] = Field(
        ("file", "s3", "gs", "abfs"),
        description="URI schemes that may be opened; others fail the row",
    )
    timeout_s: float = Field(30.0, gt=0, description="seconds for one image, retries included")
    max_bytes: int = Field(32 * 2**20, gt=0, description="bytes of one image as stored")
    max_pixels: int = Field(40_000_000, gt=0, description="pixels of one image, checked before it is decoded")
    threads: int = Field(16, ge=1, le=256, description="images fetched at a time, for each fetch task")


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

    def identity(self, file_format: Format) -> str:
        """The settings that decide a file of this format, so that the others can change without making it due."""
        prefix = file_format.split("_")[0]
        chosen = {name: value for name, value in self.model_dump().items() if name.startswith(prefix)}
        return " ".join([file_format, *(f"{name}={value}" for name, value in sorted(chosen.items()))])


class PlacementConfig(Section):
    """What runs where."""

    ray_address: str | None = Field(None, description="null: RAY_ADDRESS, else a Ray of our own on this machine")
    num_gpus: float = Field(0.0, ge=0, le=1, description="GPUs of one engine; a fraction shares one; 0: on the CPU")
    num_cpus: float = Field(1.0, gt=0, description="CPUs of one engine, its encoder included")
    min_actors: int = Field(1, ge=1, description="engines started at once")
    max_actors: int = Field(1, ge=1, description="engines when there is work for them")
    batch_size: int = Field(2, ge=1, le=64, description="requests animated together; also what a crash can cost")
    fetch_num_cpus: float = Field(0.25, gt=0, description="CPUs of one fetch task; it mostly waits")
    max_restarts: int = Field(3, ge=0, description="how often a dead engine's batch is given to another")
    object_store_mb: int | None = Field(None, ge=80, description="object store of a Ray of our own, MiB")

    @model_validator(mode="after")
    def _fits_together(self) -> PlacementConfig:
        if self.max_actors < self.min_actors:
            msg = f"max_actors {self.max_actors} is below min_actors {self.min_actors}"
            raise ValueError(msg)
        if self.fetch_num_cpus >= self.num_cpus:
            msg = (
                f"fetch_num_cpus {self.fetch_num_cpus:g} must be below num_cpus {self.num_cpus:g}: "
                "Ray would run two steps of equal needs as one, and fetch images inside the engine"
            )
            raise ValueError(msg)
        return self


class LimitsConfig(Section):
    """When a run stops, and what it calls a success."""

    max_failed: int = Field(0, ge=0, description="more failed requests than this end with exit code 3")
    max_frame_pixels: int = Field(
        32 * 1024 * 1024,
        gt=0,
        description="width x height x num_frames of one request, against exhausted memory",
    )
    lease_ttl_s: float = Field(60.0, ge=3, description="seconds after which a silent run loses its lease")
    stop_grace_s: float = Field(60.0, ge=0, description="seconds that SIGINT or SIGTERM leaves to batches in flight")


class RunConfig(Section):
    """One run: a manifest in, animations and results out."""

    manifest: str = Field(description="URI of a Parquet, JSONL or CSV file, a folder, or a partitioned prefix")
    output: str = Field(description="URI of the folder that receives everything")
    model: ModelConfig = ModelConfig()
    defaults: Defaults = Defaults()
    images: ImagesConfig = ImagesConfig()
    encoding: EncodingConfig = EncodingConfig()
    placement: PlacementConfig = PlacementConfig()
    limits: LimitsConfig = LimitsConfig()

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """The config of a YAML file with `overrides` laid over it, and the embedded model's defaults under it.

        Args:
            path: a YAML file; None for defaults and overrides alone.
            overrides: dotted keys to values, such as `{"placement.batch_size": 4}`.

        Raises:
            ConfigError: unreadable, unknown key (with the nearest known one), or a value out of range.
        """
        written = _read_yaml(Path(path)) if path is not None else {}
        for key, value in (overrides or {}).items():
            _assign(written, key, value)
        model = written.get("model")
        base = model.get("base", EMBEDDED) if isinstance(model, dict) else EMBEDDED
        layers = _merge(tiny.defaults(), written) if base == EMBEDDED else written
        try:
            return cls.model_validate(layers)
        except ValidationError as err:
            raise ConfigError(_explain(err, source=str(path) if path else "command line")) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        msg = f"cannot read config {path}: {err}"
        raise ConfigError(msg) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        msg = f"config {path} must be a mapping of keys to values, not {type(content).__name__}"
        raise ConfigError(msg)
    return {key: value for key, value in content.items() if value is not None}  # a section with all lines commented out


def _assign(tree: dict[str, Any], dotted: str, value: object) -> None:
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            msg = f"cannot set {dotted}: {name} is a value, not a section"
            raise ConfigError(msg)
        tree = child
    tree[leaf] = value


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _explain(err: ValidationError, source: str) -> str:
    lines = []
    for problem in err.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, _known_keys(RunConfig), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines.append(f"{key}: unknown key{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: required, and not given")
        else:
            lines.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
    return f"{source}: " + "; ".join(lines)


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys
