"""Folders of weights, or a pipeline that someone else built, to the components that the engine runs."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.config.speed_presets import EXACT, PRESETS, Shortcuts
from pia_batch.engine import adapters, compiling, image_prompts, offloading, single_file
from pia_batch.engine.offloading import DeviceSlot, OnDemand
from pia_batch.engine.shared_weights import SharedParts
from pia_batch.engine.shots import Limits
from pia_batch.errors import ConfigError
from pia_batch.weights.identity import ENGINE_VERSION
from pia_batch.weights.resolve import Weights

_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}

_TRAINED = {"beta_schedule": "linear", "clip_sample": False}
"""PIA's noise schedule, where a base ships Stable Diffusion's. Source: open-mmlab/PIA `example/config/base.yaml`."""


@dataclass(frozen=True, slots=True)
class Components:
    """The networks and the scheduler of one PIA model. Shared with nobody who changes them.

    Attributes:
        scheduler: configured, never stepped: rows take copies.
        unet: with motion modules and nine input channels.
        device: where all networks are.
        dtype: of the UNet and the VAE.
        latent_stride: pixels per latent on a side.
        image_encoder: what the UNet's IP-Adapter reads image prompts with; None without an adapter.
        image_processor: what makes an image ready for `image_encoder`.
        shortcuts: what the preset of speed leaves out.
        call: what calls the functions of the UNet and the VAE's decoder.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler: Any
    device: torch.device
    dtype: torch.dtype
    latent_stride: int
    image_encoder: Any = None
    image_processor: Any = None
    shortcuts: Shortcuts = EXACT
    call: compiling.Call = compiling.directly

    @property
    def limits(self) -> Limits:
        """What a shot may ask of this model."""
        return Limits(
            max_frames=self.unet.config.motion_max_seq_length,
            max_clip_skip=self.text_encoder.config.num_hidden_layers,
            max_steps=self.scheduler.config.num_train_timesteps,
            latent_stride=self.latent_stride,
            takes_image_prompts=self.image_encoder is not None,
        )


def load(
    model: ModelConfig,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    shared: SharedParts | None = None,
) -> Components:
    """Read the weights from their folders onto the device, with the model's adapters. The hub is not asked.

    Args:
        model: what to load.
        weights: `model`, resolved.
        device: where to compute.
        dtype: what to compute in.
        shared: parts of the models that are in use on this device; None: nothing is shared.

    Raises:
        ConfigError: the parts or the adapters do not fit each other, or the scheduler's settings are wrong.
        torch.OutOfMemoryError: the device has too little memory.
    """
    loader = _Loader(model, weights, device, dtype, shared)
    with quiet():
        scheduler = build_scheduler(model.scheduler, _shipped_scheduler(weights))
        try:
            parts = loader.parts()
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, ValueError) as err:
            raise ConfigError(f"cannot load {weights.base}: {err}") from err
    compiles = model.compile is True or (model.compile == "auto" and device.type == "cuda")
    call = compiling.Compiler() if compiles else compiling.directly
    return _components(scheduler=scheduler, device=device, shortcuts=PRESETS[model.speed], call=call, **parts)


def adopt(pipe: Any) -> Components:
    """The components of a `diffusers.PIAPipeline`, as they are; the pipeline itself stays untouched.

    Raises:
        ConfigError: the pipeline has a feature switched on that rows cannot have each for itself.
    """
    image_prompter: dict[str, Any] = {}
    if getattr(pipe.unet, "encoder_hid_proj", None) is not None:
        image_prompts.check_adopted(pipe)
        image_prompter = {"image_encoder": pipe.image_encoder, "image_processor": pipe.feature_extractor}
    if pipe.free_init_enabled:
        raise ConfigError(
            "the pipeline has FreeInit enabled, which would be for all rows; call pipe.disable_free_init(), then set "
            "free_init_iters per row"
        )
    if hasattr(pipe.unet, "_hf_hook"):
        raise ConfigError("the pipeline offloads its networks; move it to one device instead")
    return _components(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        unet=pipe.unet,
        scheduler=copy.deepcopy(pipe.scheduler),
        device=pipe.device,
        **image_prompter,
    )


def adopted_id(parts: Components) -> str:
    """The identity of components without known files: a hash of every weight, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    settings = {"version": ENGINE_VERSION, "scheduler": type(parts.scheduler).__name__, "dtype": str(parts.dtype)}
    settings |= {"settings": json.dumps(dict(parts.scheduler.config), sort_keys=True, default=str)}
    settings |= {"adapters": json.dumps([adapters.traces(parts.text_encoder), adapters.traces(parts.unet)])}
    settings |= {"tiles": str(parts.vae.use_tiling)}
    if parts.shortcuts != EXACT:
        settings |= {"shortcuts": repr(parts.shortcuts)}
    networks = [parts.text_encoder, parts.vae, parts.unet]
    if parts.image_encoder is not None:
        networks.append(parts.image_encoder)
        settings |= {"image_processor": parts.image_processor.to_json_string()}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(json.dumps(sorted(parts.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()[:32]


def build_scheduler(config: SchedulerConfig, shipped: Any) -> Any:
    """The scheduler that the config names, on the noise schedule that PIA was trained on.

    `checkpoint` is the shipped one itself. Any other starts from the shipped one's config, with a linear beta
    schedule and no clipping of samples. The config's own settings win in both cases.

    Raises:
        ConfigError: a setting that this scheduler does not have, or a value that it refuses.
    """
    if config.name == "checkpoint":
        chosen, trained = type(shipped), {}
    else:
        chosen, trained = getattr(diffusers, _SCHEDULERS[config.name]), _TRAINED
    known = set(inspect.signature(chosen.__init__).parameters) - {"self", "kwargs"}
    unknown = sorted(set(config.settings) - known)
    if unknown:
        raise ConfigError(
            f"model.scheduler.settings: {chosen.__name__} has no {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known))}"
        )
    overrides = {key: value for key, value in trained.items() if key in known} | config.settings
    try:
        scheduler = chosen.from_config(shipped.config, **overrides)
        # Some settings are read only here. LCM may have been distilled for fewer steps than ten.
        copy.deepcopy(scheduler).set_timesteps(min(10, scheduler.config.get("original_inference_steps", 10)))
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as err:
        raise ConfigError(f"model.scheduler: {chosen.__name__} refuses these settings: {err}") from err
    return scheduler


class _Loader:
    """The parts of one model, each found among those in use or else read, personalised and put in its place."""

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        shared: SharedParts | None,
    ) -> None:
        self._weights, self._device, self._dtype, self._shared = weights, device, dtype, shared
        self._saving = offloading.savings(model.memory, device)
        self._home = torch.device("cpu") if self._saving.offload else device
        self._adapters = adapters.read(model, weights.loras, weights.textual_inversions)

    def parts(self) -> dict[str, Any]:
        """Tokenizer and networks, by the names of `Components`."""
        named = self._weights.components
        parts = {"tokenizer": self._part("tokenizer", self._tokenizer)}
        tokenizer = parts["tokenizer"]
        parts["text_encoder"] = self._part("text_encoder", lambda: self._text_encoder(tokenizer), named["tokenizer"])
        parts["vae"] = self._part("vae", self._vae, self._saving.slices, self._saving.tiles)
        parts["unet"] = self._part("unet", self._unet, named.get("motion_adapter"), self._weights.ip_adapter)
        networks = ["text_encoder", "vae", "unet"]
        if self._weights.image_encoder is not None:
            parts["image_encoder"] = self._part("image_encoder", self._image_encoder)
            parts["image_processor"] = image_prompts.processor_for(parts["image_encoder"])
            networks.append("image_encoder")
        if self._saving.offload:
            slot = self._shared.slot if self._shared else DeviceSlot()
            parts |= {name: OnDemand(parts[name], self._device, slot) for name in networks}
        return parts

    def _part(self, name: str, make: Callable[[], Any], *others: Any) -> Any:
        if self._shared is None:
            return make()
        recipe = [name, dict(self._weights.parts())[name], self._adapters.recipe(name), *others]
        return self._shared.get([*recipe, str(self._dtype), str(self._home)], make)

    def _tokenizer(self) -> Any:
        folder = self._weights.components["tokenizer"].folder
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self._adapters.apply_to_tokenizer(tokenizer)
        return tokenizer

    def _text_encoder(self, tokenizer: Any) -> Any:
        network = _read(transformers.CLIPTextModel, self._weights, "text_encoder", self._dtype)
        self._adapters.apply_to_text_encoder(network, tokenizer)
        return self._ready(network)

    def _vae(self) -> Any:
        network = _read(diffusers.AutoencoderKL, self._weights, "vae", self._dtype)
        self._saving.apply_to_vae(network)
        return self._ready(network)

    def _unet(self) -> Any:
        network = _unet(self._weights, self._dtype)
        self._adapters.apply_to_unet(network)
        if self._weights.ip_adapter is not None:
            image_prompts.install(network, self._weights.ip_adapter.path)
        if self._shared is not None and not self._adapters.touch_motion:
            named = self._weights.components
            source = named.get("motion_adapter", named["unet"])
            self._shared.share_motion(network, [source, str(self._dtype), str(self._home)])
        return self._ready(network)

    def _image_encoder(self) -> Any:
        network = _read(transformers.CLIPVisionModelWithProjection, self._weights, "image_encoder", self._dtype)
        return self._ready(network)

    def _ready(self, network: Any) -> Any:
        if self._home.type == "cuda":  # what its convolutions read, who would else turn their weights at every call
            network = network.to(memory_format=torch.channels_last)
        return network.to(self._home).eval().requires_grad_(requires_grad=False)


def _components(*, device: torch.device, **parts: Any) -> Components:
    stride = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    return Components(device=device, dtype=parts["unet"].dtype, latent_stride=stride, **parts)


def _read(kind: Any, weights: Weights, name: str, dtype: torch.dtype) -> Any:
    """A network with exactly the weights of its files."""
    part = dict(weights.parts())[name]
    if part.layout == "single_file":
        return single_file.read(kind, part, dtype)
    network, report = kind.from_pretrained(
        part.folder,
        dtype=dtype,
        variant=part.variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{part.folder} lacks the tensor {missing[0]}{more} of its {kind.__name__}; it is not whole")
    return network


def _unet(weights: Weights, dtype: torch.dtype) -> Any:
    if "motion_adapter" not in weights.components:
        return _read(diffusers.UNetMotionModel, weights, "unet", dtype)
    plain = _read(diffusers.UNet2DConditionModel, weights, "unet", dtype)
    # The adapter is changed by what follows and shares its first layer with the result, so it is not kept.
    adapter = _read(diffusers.MotionAdapter, weights, "motion_adapter", dtype)
    return diffusers.UNetMotionModel.from_unet2d(plain, adapter)


def _shipped_scheduler(weights: Weights) -> Any:
    path = weights.components["scheduler"].folder / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(diffusers, config["_class_name"])
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise ConfigError(f"{path} does not name a scheduler of diffusers {diffusers.__version__}") from err
    return kind.from_config(config)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Errors only and no progress bars from diffusers and transformers, for a time."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
