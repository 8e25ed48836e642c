"""Loading of the engine's components, from resolved weights or from an existing pipeline."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.config.arithmetic import Arithmetic
from pia_batch.config.speed_presets import EXACT, PRESETS, SpeedPreset
from pia_batch.engine import adapters, arithmetic, compiling, image_prompts, network_files, offloading
from pia_batch.engine import unet as layout
from pia_batch.engine.lora_scales import Scales
from pia_batch.engine.offloading import DeviceSlot, OnDemand
from pia_batch.engine.shared_weights import SharedParts
from pia_batch.engine.shots import Limits, Shot
from pia_batch.errors import ConfigError, is_out_of_memory, message_of
from pia_batch.schema.lora_scales import lora_scales
from pia_batch.weights import conv_in, scheduler_values
from pia_batch.weights.components import Component
from pia_batch.weights.identity import ENGINE_VERSION
from pia_batch.weights.resolve import Weights


@dataclass(frozen=True, slots=True)
class Components:
    """Networks and scheduler of one PIA model. No other code may modify them.

    Attributes:
        tokenizer: CLIP tokenizer.
        text_encoder: CLIP text encoder.
        vae: `AutoencoderKL`.
        unet: `UNetMotionModel` with motion modules and nine input channels.
        scheduler: Configured scheduler; rows step copies of it.
        device: Device of all networks.
        dtype: Dtype of the UNet and the VAE.
        latent_stride: Pixels per latent on each side.
        image_encoder: Encoder of image prompts for the UNet's IP-Adapter; None without an adapter.
        image_processor: Preprocessor of images for `image_encoder`.
        shortcuts: Layers and steps that the speed preset leaves out.
        call: Function that calls the functions of the UNet and the VAE's decoder, such as a `Compiler`.
        arithmetic: Implementation of PIA whose results the clips equal.
        vae_decode: `per_frame` if the VAE decodes one frame at a time, else `chunks`.
        loras: Name and configured scale of each LoRA, in the order of the config.
        fixed_loras: Names of those that are merged into the weights, so that rows cannot change their scales.
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
    shortcuts: SpeedPreset = EXACT
    call: compiling.Call = compiling.directly
    arithmetic: Arithmetic = "diffusers"
    vae_decode: Literal["chunks", "per_frame"] = "chunks"
    loras: tuple[tuple[str, float], ...] = ()
    fixed_loras: frozenset[str] = frozenset()

    def scales_of(self, shot: Shot) -> Scales | None:
        """Return the scale of each LoRA for a shot that has scales of its own; None: those of the config."""
        own: dict[str, float] = dict(lora_scales(shot.lora_scales)) if shot.lora_scales else {}
        if all(own.get(name, scale) == scale for name, scale in self.loras):
            return None
        return tuple(own.get(name, scale) for name, scale in self.loras)

    @property
    def limits(self) -> Limits:
        """Range of settings that this model supports."""
        return Limits(
            max_frames=self.unet.config.motion_max_seq_length,
            max_clip_skip=self.text_encoder.config.num_hidden_layers,
            max_steps=self.scheduler.config.num_train_timesteps,
            latent_stride=self.latent_stride,
            takes_image_prompts=self.image_encoder is not None,
            loras=tuple(name for name, _ in self.loras),
            fixed_loras=self.fixed_loras,
        )


def load(
    model: ModelConfig,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    shared: SharedParts | None = None,
) -> Components:
    """Load weights and adapters of a model onto the device. Uses only local files, never the hub.

    Args:
        model: Config of the model.
        weights: Resolved weights of `model`.
        device: Device that computes.
        dtype: Dtype of the networks.
        shared: Parts of the models in use on this device. None: share nothing.

    Raises:
        ConfigError: The parts or the adapters do not fit each other, or the scheduler's settings are invalid.
        torch.OutOfMemoryError: The device has too little memory; or RuntimeError, as in `is_out_of_memory`.
    """
    loader = _Loader(model, weights, device, dtype, shared)
    with quiet():
        scheduler = build_scheduler(model.scheduler, _shipped_scheduler(weights), model.arithmetic)
        try:
            parts = loader.parts()
        except (OSError, RuntimeError, ValueError) as err:
            if is_out_of_memory(err):
                raise
            raise ConfigError(f"cannot load {weights.base}: {err}") from err
    compiles = model.compile is True or (model.compile == "auto" and device.type == "cuda")
    call = compiling.Compiler() if compiles else compiling.directly
    return _components(
        scheduler=scheduler,
        device=device,
        shortcuts=PRESETS[model.speed],
        call=call,
        arithmetic=model.arithmetic,
        vae_decode=model.vae_decode,
        loras=tuple((each.label, each.scale) for each in model.loras),
        fixed_loras=loader.fixed_loras,
        **parts,
    )


def adopt(pipe: Any, calculates: Arithmetic = "diffusers") -> Components:
    """Return the components of a `diffusers.PIAPipeline`; leave the pipeline unchanged.

    Args:
        pipe: The pipeline.
        calculates: Implementation of PIA whose results the clips equal.

    Raises:
        ConfigError: The pipeline has a feature enabled that cannot be set per row.
    """
    image_prompter: dict[str, Any] = {}
    if getattr(pipe.unet, "encoder_hid_proj", None) is not None:
        image_prompts.check_adopted(pipe)
        image_prompter = {"image_encoder": pipe.image_encoder, "image_processor": pipe.feature_extractor}
    if pipe.free_init_enabled:
        raise ConfigError(
            "the pipeline has FreeInit enabled for all rows; call pipe.disable_free_init(), then set "
            "free_init_iters per row"
        )
    if hasattr(pipe.unet, "_hf_hook"):
        raise ConfigError("the pipeline offloads its networks; move it to one device instead")
    unet = pipe.unet if calculates == "diffusers" else _original(pipe.unet)
    return _components(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        unet=unet,
        scheduler=copy.deepcopy(pipe.scheduler),
        device=pipe.device,
        arithmetic=calculates,
        **image_prompter,
    )


def adopted_id(parts: Components) -> str:
    """Return the identity of components without known files: a hash of every weight, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    settings = {"version": ENGINE_VERSION, "scheduler": type(parts.scheduler).__name__, "dtype": str(parts.dtype)}
    settings |= {"settings": json.dumps(dict(parts.scheduler.config), sort_keys=True, default=str)}
    settings |= {
        "adapters": json.dumps([adapters.adapter_settings(parts.text_encoder), adapters.adapter_settings(parts.unet)])
    }
    settings |= {"tiles": str(parts.vae.use_tiling)}
    if parts.arithmetic != "diffusers":
        settings |= {"arithmetic": parts.arithmetic}
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


def build_scheduler(config: SchedulerConfig, shipped: Any, calculates: Arithmetic = "diffusers") -> Any:
    """Return the scheduler that the config names, as `scheduler_values.recipe` has it.

    Args:
        config: Config of the scheduler.
        shipped: Scheduler that the checkpoint ships.
        calculates: Implementation of PIA whose defaults it has.

    Raises:
        ConfigError: The scheduler does not have a setting, or refuses its value.
    """
    made = scheduler_values.recipe(config, calculates, type(shipped).__name__, shipped.config)
    try:
        scheduler = getattr(diffusers, made.name).from_config(made.start, **made.overrides)
        # Schedulers check some settings only here. LCM may have been distilled for fewer than ten steps.
        copy.deepcopy(scheduler).set_timesteps(min(10, scheduler.config.get("original_inference_steps", 10)))
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as err:
        raise ConfigError(f"model.scheduler: {made.name} refuses these settings: {err}") from err
    return scheduler


class _Loader:
    """Loader of the parts of one model: reuses parts in use; else reads them, applies adapters and moves them."""

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        shared: SharedParts | None,
    ) -> None:
        self._model, self._weights, self._device, self._dtype, self._shared = model, weights, device, dtype, shared
        self._vae_dtype = dtype if model.vae_dtype == "auto" else getattr(torch, model.vae_dtype)
        self._whole_conv_in = conv_in.is_from_adapter(model, weights.components)
        self._saving = offloading.savings(model.memory, device)
        self._home = torch.device("cpu") if self._saving.offload else device
        self._adapters = adapters.read(model, weights.loras, weights.textual_inversions)

    @property
    def fixed_loras(self) -> frozenset[str]:
        """Names of the LoRAs that are merged into the weights."""
        pairs = zip(self._model.loras, self._adapters.loras, strict=True)
        return frozenset(each.label for each, lora in pairs if self._adapters.fuse or not lora.is_adjustable)

    def parts(self) -> dict[str, Any]:
        """Return tokenizer and networks, by their names in `Components`."""
        named = self._weights.components
        parts = {"tokenizer": self._part("tokenizer", self._tokenizer)}
        tokenizer = parts["tokenizer"]
        parts["text_encoder"] = self._part("text_encoder", lambda: self._text_encoder(tokenizer), named["tokenizer"])
        parts["vae"] = self._part("vae", self._vae, self._saving.slices, self._saving.tiles, str(self._vae_dtype))
        kind = [self._model.arithmetic, self._whole_conv_in]
        parts["unet"] = self._part("unet", self._unet, named.get("motion_adapter"), self._weights.ip_adapter, *kind)
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
        network = self._read("text_encoder")
        self._adapters.apply_to_text_encoder(network, tokenizer)
        return self._ready("text_encoder", network)

    def _vae(self) -> Any:
        network = self._read("vae")
        self._saving.apply_to_vae(network)
        return self._ready("vae", network)

    def _unet(self) -> Any:
        network = self._read("unet")
        if "motion_adapter" in self._weights.components:
            # `from_unet2d` changes the adapter and shares its first layer with the result: do not keep the adapter.
            adapter = self._read("motion_adapter")
            own = {name: tensor.clone() for name, tensor in adapter.conv_in.state_dict().items()}
            network = diffusers.UNetMotionModel.from_unet2d(network, adapter)
            if self._whole_conv_in:
                network.conv_in.load_state_dict(own)
        self._adapters.apply_to_unet(network)
        if self._weights.ip_adapter is not None:
            image_prompts.install(network, self._weights.ip_adapter.path)
        if self._shared is not None and not self._adapters.touch_motion:
            named = self._weights.components
            source = named.get("motion_adapter", named["unet"])
            self._shared.share_motion(network, [source, str(self._dtype), str(self._home)])
        return self._ready("unet", network if self._model.arithmetic == "diffusers" else _original(network.eval()))

    def _image_encoder(self) -> Any:
        part = dict(self._weights.parts())["image_encoder"]
        return self._ready("image_encoder", image_prompts.read_encoder(part, self._dtype))

    def _read(self, name: str) -> Any:
        dtype = self._vae_dtype if name == "vae" else self._dtype
        return network_files.read(name, self._weights.components[name], dtype)

    def _ready(self, name: str, network: Any) -> Any:
        if self._home.type == "cuda":  # convolutions would otherwise convert their weights at every call
            network = network.to(memory_format=torch.channels_last)
        network = network.to(self._home).eval().requires_grad_(requires_grad=False)
        network_files.check_finite(network, self._sources(name))
        return network

    def _sources(self, name: str) -> Iterator[tuple[str, Component]]:
        """Yield the parts whose files the weights of a network come from."""
        others = {"text_encoder": ("loras.", "textual_inversions."), "unet": ("loras.", "motion_adapter", "ip_adapter")}
        for label, part in self._weights.parts():
            if label == name or label.startswith(others.get(name, ("-",))):
                yield f"model, part {label}", part


def _components(*, device: torch.device, **parts: Any) -> Components:
    stride = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    return Components(device=device, dtype=parts["unet"].dtype, latent_stride=stride, **parts)


def _original(unet: Any) -> Any:
    """Return the UNet with the norms of the original.

    Raises:
        ConfigError: The UNet has a structure that only its own call supports.
    """
    network = arithmetic.as_original(unet)
    if not layout.supports(network):
        raise ConfigError(
            "model.arithmetic: original supports only the UNet of Stable Diffusion 1.5 with ordinary attention; set it "
            "to diffusers"
        )
    return network


def _shipped_scheduler(weights: Weights) -> Any:
    path = weights.components["scheduler"].folder / scheduler_values.FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(diffusers, config["_class_name"])
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise ConfigError(f"{path}: no scheduler of diffusers {diffusers.__version__} in _class_name") from err
    try:
        return kind.from_config(config)
    except Exception as err:  # a config of any content; the library raises exceptions of many types
        raise ConfigError(f"{path}: {kind.__name__} cannot be built from it ({message_of(err)}); correct it") from err


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context in which diffusers and transformers log errors only and show no progress bars."""
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
