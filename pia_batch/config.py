"""RunConfig and its sections: everything a run can be told, checked before anything starts.

A config is one YAML file. Three layers make it, the later wins: the defaults below (made for Stable Diffusion 1.5),
the embedded model's own defaults where `model.base` is `embedded`, and what the operator wrote. An unknown key is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pia_batch import schedule, tiny, uris
from pia_batch.errors import ConfigError, message_of
from pia_batch.mistakes import explain
from pia_batch.shortcuts import Speed

EMBEDDED = "embedded"
"""The value of `model.base` that means the checkpoint inside this package."""

Fit = Literal["cover", "contain", "stretch"]
Format = Literal["mp4", "gif", "webp", "png_zip"]
FORMATS: tuple[Format, ...] = ("mp4", "gif", "webp", "png_zip")
Motion = Literal["small", "medium", "large"]
MOTIONS: tuple[Motion, ...] = ("small", "medium", "large")
Size = Literal["fixed", "auto"]
SIZES: tuple[Size, ...] = ("fixed", "auto")
FreeInitMethod = Literal["butterworth", "ideal", "gaussian"]
FREE_INIT_METHODS: tuple[FreeInitMethod, ...] = ("butterworth", "ideal", "gaussian")
SchedulerName = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc", "lcm", "checkpoint"
]


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


class AddOn(Section):
    """Weights that are laid over a model's own."""

    source: str = Field(description="a `.safetensors` file, a folder, an object-storage URI of either, or a hub id")
    revision: str | None = Field(None, description="hub commit, tag or branch of `source`")
    weight_name: str | None = Field(None, description="the file, where `source` holds several")


class LoraConfig(AddOn):
    """One LoRA laid over a model's UNet and text encoder."""

    scale: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False, description="how strongly it is applied")


class TextualInversionConfig(AddOn):
    """One embedding that a word of the prompt stands for."""

    token: str | None = Field(None, min_length=1, description="the word; null: the one that the file names")


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

    s1: float = Field(0.9, gt=0, le=2, description="scale of the skip features of the first up block")
    s2: float = Field(0.2, gt=0, le=2, description="scale of the skip features of the second up block")
    b1: float = Field(1.5, gt=0, le=3, description="scale of the backbone features of the first up block")
    b2: float = Field(1.6, gt=0, le=3, description="scale of the backbone features of the second up block")


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
    freeu: FreeUConfig | None = Field(None, description="`s1`, `s2`, `b1`, `b2`; null: off")
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
    scheduler: SchedulerConfig = SchedulerConfig()


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
    free_init_order: int = Field(4, ge=1, le=32, description="of the butterworth filter")
    free_init_spatial_stop: float = Field(0.25, ge=0, le=1, description="stop frequency over the picture")
    free_init_temporal_stop: float = Field(0.25, ge=0, le=1, description="stop frequency over the frames")
    free_init_fast: bool = Field(default=False, description="coarser first passes: about half the cost, less gain")
    fps: float = Field(8.0, ge=1, le=60, description="frames per second; GIF ends at 50")
    format: Format = Field("mp4", description="mp4, gif, webp, or png_zip: the frames as PNG files in a zip")


class ImagesConfig(Section):
    """How condition images are fetched and fitted."""

    fit: Fit = Field("cover", description="cover: crop to fill; contain: pad; stretch: distort")
    background: str = Field("#000000", pattern=r"^#[0-9a-fA-F]{6}$", description="under alpha, and the padding")
    allow: tuple[str, ...] = Field(
        (),
        description="further places that images may come from, such as `s3://photos/`, `/mnt/photos/` or "
        "`https://images.example.com/`; the manifest's own folder or bucket always may",
    )
    timeout_s: float = Field(30.0, gt=0, description="seconds for one image, retries included")
    max_bytes: int = Field(32 * 2**20, gt=0, description="bytes of one image as stored")
    max_pixels: int = Field(40_000_000, gt=0, description="pixels of one image, checked before it is decoded")
    threads: int = Field(16, ge=1, le=256, description="images fetched at a time, for each fetch task")

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


class PlacementConfig(Section):
    """What runs where."""

    ray_address: str | None = Field(None, description="null: RAY_ADDRESS, else a Ray of our own on this machine")
    num_gpus: float = Field(0.0, ge=0, le=1, description="GPUs of one engine; a fraction shares one; 0: on the CPU")
    num_cpus: float = Field(1.0, gt=0, description="CPUs of one engine, its encoder included")
    min_actors: int = Field(1, ge=1, description="engines started at once")
    max_actors: int = Field(1, ge=1, description="engines when there is work for them")
    batch_size: int = Field(2, ge=1, le=64, description="requests animated together; also what a crash can cost")
    fetch_num_cpus: float = Field(0.25, gt=0, description="CPUs of one fetch task; it mostly waits")
    max_models: int | None = Field(None, ge=1, description="models that one engine keeps; null: as many as fit")
    require_auth: bool = Field(
        default=False, description="refuse a Ray cluster that runs without token authentication; else only warn"
    )
    memory_mb: int | None = Field(
        None,
        ge=256,
        description="host memory of one engine's process, MiB: Ray sets it aside, and a request that takes more fails "
        "as `out_of_memory`; null: no limit",
    )
    wait_s: float = Field(7200.0, gt=0, description="seconds that a run waits for a cluster to give it an engine")
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

    max_failed: int | None = Field(
        None,
        ge=0,
        description="failed requests that are tolerated: one more stops the run, with exit code 3; null: none stops "
        "it, and any ends it with 3",
    )
    max_frame_pixels: int = Field(
        32 * 1024 * 1024,
        gt=0,
        description="width x height x num_frames of one request, against exhausted memory",
    )
    min_frame_std: float | None = Field(
        None, ge=0, le=128, description="a clip whose pixels vary less, 0-255, fails as `degenerate`: flat or black"
    )
    min_motion: float | None = Field(
        None, ge=0, le=255, description="a clip whose frames differ less, 0-255, fails as `degenerate`: frozen"
    )
    timeout_s: float = Field(
        900.0,
        gt=0,
        description="seconds for a batch up to 25 steps x 16 frames x 512 x 512; beyond that in proportion. Then its "
        "worker is ended, and the request that hangs fails as `timeout`",
    )
    max_attempts: int = Field(
        3, ge=2, description="how often a request whose worker dies is begun, once in its batch, then alone"
    )
    max_crashes: int = Field(
        20, ge=1, description="requests in a row that fail for their worker's sake, after which the run stops"
    )
    lease_ttl_s: float = Field(60.0, ge=3, description="seconds after which a silent run loses its lease")
    lease_wait_s: float = Field(
        0.0, ge=0, description="seconds that a run queues while another works on the output; `.inf`: until it is free"
    )
    stop_grace_s: float = Field(60.0, ge=0, description="seconds that a run which stops leaves to batches in flight")


def _fraction(value: Any) -> Any:  # whatever was written
    """`1%` as 0.01; what is no percentage is left to pydantic."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


class BudgetConfig(Section):
    """What a run may spend. Reaching a limit stops it with exit code 4; what was finished is committed."""

    max_gpu_hours: float | None = Field(
        None, gt=0, description="hours that engines are alive, times their GPUs; on the CPU, hours of engines"
    )
    deadline: str | None = Field(
        None, description="`06:00` (the next one, UTC), an ISO time, or a duration such as `5h`"
    )
    limit: int | None = Field(None, ge=1, description="requests drawn in this run, at most")
    sample: Annotated[float, BeforeValidator(_fraction)] | None = Field(
        None, gt=0, le=1, description="draw this part of the requests only, such as `1%` or 0.01; always the same ones"
    )
    priority: str | None = Field(None, min_length=1, description="a column of numbers: the highest are drawn first")
    price_per_hour: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="of one GPU (or engine on the CPU), in any currency; tells a cost"
    )

    @field_validator("deadline", mode="before")
    @classmethod
    def _has_a_meaning(cls, text: Any) -> Any:  # whatever was written
        if isinstance(text, int) and not isinstance(text, bool):
            msg = f"YAML reads a time without quotes as a number; write '{text // 60:02d}:{text % 60:02d}'"
            raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueErrors only
        if isinstance(text, datetime):
            return text.isoformat()
        if isinstance(text, str):
            schedule.deadline(text, datetime.now(UTC))
        return text


class OnFinishConfig(Section):
    """Who is told when a run has ended, however it did."""

    command: tuple[str, ...] = Field((), description="a program and its arguments; reads the summary as JSON")
    webhook: str | None = Field(
        None,
        pattern=r"^(https?://|\$[A-Za-z_])",
        description="a URL that the summary is posted to, or `$NAME` of an environment variable that has it",
    )
    headers: dict[str, str] = Field(
        default_factory=dict, description="of the webhook: header to the environment variable that has its value"
    )
    on: tuple[Literal["success", "failure", "always"], ...] = Field(
        ("always",), description="success: exit code 0; failure: any other"
    )
    timeout_s: float = Field(
        30.0, gt=0, le=3600, description="seconds for the command, and for each try of the webhook"
    )

    @model_validator(mode="before")
    @classmethod
    def _on_is_a_word(cls, data: Any) -> Any:  # whatever was written
        """YAML 1.1 reads the key `on` as true."""
        if isinstance(data, dict) and True in data:
            return {("on" if name is True else name): value for name, value in data.items()}
        return data


def _date_text(value: Any) -> Any:  # whatever was written
    """What YAML reads as a date, as it was written."""
    return value.isoformat() if isinstance(value, date) and not isinstance(value, datetime) else value


class RunConfig(Section):
    """One run: a manifest in, animations and results out."""

    manifest: str = Field(
        description="URI of a Parquet, JSONL or CSV file, a folder, or a partitioned prefix; may have `{date}`"
    )
    output: str = Field(description="URI of the folder that receives everything; may have `{date}`")
    run_id: str | None = Field(
        None, description="names the results; may have `{date}`; null: made from the run date, or from the time"
    )
    run_date: Annotated[str, BeforeValidator(_date_text)] | None = Field(
        None,
        description="what `{date}` and `{hour}` stand for, UTC: `2026-11-22` or `2026-11-22T05`; null: the last day, "
        "or hour, that is over",
    )
    params: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        default_factory=dict, description="further names that `manifest`, `output` and `run_id` may have in braces"
    )
    model: ModelConfig = ModelConfig()
    models: dict[str, ModelConfig] = Field(
        default_factory=dict,
        description="further models by name, for the manifest's `model` column; what one leaves out is as in `model`",
    )
    defaults: Defaults = Defaults()
    images: ImagesConfig = ImagesConfig()
    encoding: EncodingConfig = EncodingConfig()
    placement: PlacementConfig = PlacementConfig()
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    on_finish: OnFinishConfig = OnFinishConfig()

    @property
    def templates(self) -> schedule.Templates:
        """What a run date and `params` are filled into.

        Raises:
            ConfigError: a placeholder that nothing stands for.
        """
        texts = {"manifest": self.manifest, "output": self.output, "run_id": self.run_id or ""}
        return schedule.Templates(texts, self.params)

    def filled(self, now: datetime | None = None) -> Self:
        """The config of one run: manifest, output and run id without placeholders, and the run date, if there is one.

        A dated run that has no name gets one of its date and the parameters that were used.

        Raises:
            ConfigError: a placeholder that nothing stands for, or a run date that does not go with them.
        """
        templates = self.templates
        run_date = templates.date(self.run_date, now or datetime.now(UTC))
        texts: dict[str, str | None] = dict(templates.fill(run_date))
        if run_date is not None and self.run_id is None:
            used = (value for name, value in self.params.items() if name in templates.used)
            texts["run_id"] = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([str(run_date), *used]))[:120]
        texts["run_id"] = texts["run_id"] or None
        return self.model_copy(update=texts | {"run_date": None if run_date is None else str(run_date)})

    @field_validator("run_date")
    @classmethod
    def _is_a_date(cls, text: str | None) -> str | None:
        return text if text is None else str(schedule.RunDate.parse(text))

    @field_validator("params")
    @classmethod
    def _names_can_stand_in_braces(cls, params: dict[str, str]) -> dict[str, str]:
        for name, value in params.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in ("date", "hour"):
                msg = f"{name!r}: a name has letters, digits and '_', and is neither date nor hour"
                raise ValueError(msg)
            if not value or not value.isprintable():
                msg = f"{name}: a value is a text without control characters, and not empty"
                raise ValueError(msg)
        return params

    @property
    def all_models(self) -> dict[str, ModelConfig]:
        """Every model by the name that the manifest's `model` column calls it, the default one first."""
        return {self.model.name: self.model, **self.models}

    @model_validator(mode="before")
    @classmethod
    def _complete_models(cls, data: Any) -> Any:  # whatever was written
        if not isinstance(data, dict) or not isinstance(data.get("models"), dict):
            return data
        default = data.get("model") or {}
        if isinstance(default, ModelConfig):
            default = default.model_dump(exclude_unset=True)
        return data | {"models": {name: _complete(name, entry, default) for name, entry in data["models"].items()}}

    @model_validator(mode="after")
    def _names_are_distinct(self) -> RunConfig:
        if self.model.name in self.models:
            msg = f"models.{self.model.name}: this is the name of `model` too; set model.name, or choose another"
            raise ValueError(msg)
        return self

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
            raise ConfigError(explain(err, cls, str(path) if path else "command line")) from None


def _complete(name: object, entry: object, default: object) -> object:
    """An entry of `models`, with what it leaves out as in `model`; what cannot be one is left to pydantic."""
    if isinstance(entry, ModelConfig):
        return entry.model_copy(update={"name": name})
    if not isinstance(default, dict) or not isinstance(entry, dict | None):
        return entry
    entry = entry or {}
    if entry.get("base") == EMBEDDED:
        entry = _merge(tiny.defaults()["model"], entry)
    replaced = {key for part, keys in _BELONGS_TO.items() if part in entry for key in keys}
    return _merge({key: value for key, value in default.items() if key not in replaced}, entry) | {"name": name}


_BELONGS_TO = {
    "base": ("revision", "variant", "config", "sha256"),
    "motion_adapter": ("motion_adapter_revision", "motion_adapter_variant"),
    "vae": ("vae_revision",),
}
"""What an entry of `models` does not take over along with weights that it replaces."""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        msg = f"cannot read config {path}: {err.strerror}; give a YAML file, or --manifest and --output alone"
        raise ConfigError(msg) from None
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        msg = f"cannot read config {path}{where}: {err.problem or err.context}; correct the YAML there, or just before"
        raise ConfigError(msg) from None
    except (UnicodeDecodeError, yaml.YAMLError) as err:
        msg = f"cannot read config {path}: {message_of(err)}; it must be YAML in UTF-8"
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
        child = tree[name] = {} if tree.get(name) is None else tree[name]
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
