"""Folders of weights, or a pipeline that someone else built, to the components that the engine runs."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.engine.shots import Limits
from pia_batch.errors import ConfigError
from pia_batch.weights import ENGINE_VERSION, Weights

_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
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
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler: Any
    device: torch.device
    dtype: torch.dtype
    latent_stride: int

    @property
    def limits(self) -> Limits:
        """What a shot may ask of this model."""
        return Limits(
            max_frames=self.unet.config.motion_max_seq_length,
            max_clip_skip=self.text_encoder.config.num_hidden_layers,
            max_steps=self.scheduler.config.num_train_timesteps,
            latent_stride=self.latent_stride,
        )


def load(model: ModelConfig, weights: Weights, device: torch.device, dtype: torch.dtype) -> Components:
    """Read the weights from their folders onto the device. The hub is not asked.

    Raises:
        ConfigError: the parts do not fit each other, or the scheduler's settings are wrong.
    """
    parts = weights.components
    with _quiet():
        scheduler = build_scheduler(model.scheduler, _shipped_scheduler(weights))
        try:
            networks = {
                "text_encoder": _read(transformers.CLIPTextModel, weights, "text_encoder", dtype),
                "vae": _read(diffusers.AutoencoderKL, weights, "vae", dtype),
                "unet": _unet(weights, dtype),
            }
            tokenizer = transformers.CLIPTokenizer.from_pretrained(parts["tokenizer"].folder, local_files_only=True)
        except (OSError, RuntimeError, ValueError) as err:
            raise ConfigError(f"cannot load {weights.base}: {err}") from err
    for network in networks.values():
        network.to(device).eval().requires_grad_(requires_grad=False)
    return _components(tokenizer=tokenizer, scheduler=scheduler, device=device, **networks)


def adopt(pipe: Any) -> Components:
    """The components of a `diffusers.PIAPipeline`, as they are; the pipeline itself stays untouched.

    Raises:
        ConfigError: the pipeline has a feature switched on that rows cannot have each for itself.
    """
    if getattr(pipe.unet, "encoder_hid_proj", None) is not None:
        raise ConfigError("the pipeline has an IP-Adapter loaded, which this engine does not feed; unload it")
    if pipe.free_init_enabled:
        raise ConfigError("the pipeline has FreeInit enabled, which this engine does not run; disable it")
    if hasattr(pipe.unet, "_hf_hook"):
        raise ConfigError("the pipeline offloads its networks; move it to one device instead")
    return _components(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        unet=pipe.unet,
        scheduler=copy.deepcopy(pipe.scheduler),
        device=pipe.device,
    )


def adopted_id(parts: Components) -> str:
    """The identity of components without known files: a hash of every weight, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    settings = {"version": ENGINE_VERSION, "scheduler": type(parts.scheduler).__name__, "dtype": str(parts.dtype)}
    settings |= {"settings": json.dumps(dict(parts.scheduler.config), sort_keys=True, default=str)}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for network in (parts.text_encoder, parts.vae, parts.unet):
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
        copy.deepcopy(scheduler).set_timesteps(10)  # some settings are read only here
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as err:
        raise ConfigError(f"model.scheduler: {chosen.__name__} refuses these settings: {err}") from err
    return scheduler


def _components(*, device: torch.device, **parts: Any) -> Components:
    stride = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    return Components(device=device, dtype=parts["unet"].dtype, latent_stride=stride, **parts)


def _read(kind: Any, weights: Weights, name: str, dtype: torch.dtype) -> Any:
    part = weights.components[name]
    return kind.from_pretrained(
        part.folder, dtype=dtype, variant=part.variant, use_safetensors=True, local_files_only=True
    )


def _unet(weights: Weights, dtype: torch.dtype) -> Any:
    if weights.motion_adapter is None:
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
def _quiet() -> Iterator[None]:
    """Errors only and no progress bars from diffusers and transformers, for the time of loading."""
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
