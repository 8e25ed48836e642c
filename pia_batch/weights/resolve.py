"""Which weights a model config names: files of safetensors on this machine, and an identity that a result can carry.

Imports neither torch nor diffusers, as the driver asks for the identity of a model that only the actors load.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pia_batch import tiny
from pia_batch.config import EMBEDDED, ModelConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import addons, components, safetensors, sd15
from pia_batch.weights.components import CONFIG, DIFFUSION_MODEL, MODEL, Component
from pia_batch.weights.fetching import Hub, HuggingFaceHub, Source, locate

_PIA_CHANNELS = 9
_LATENT_CHANNELS = 4
_CLIP_WIDTH = 512
"""`hidden_size` where a config leaves it out. Source: transformers, `CLIPTextConfig`."""

_SDXL_SCALING = 0.13025
"""`scaling_factor` of the VAE of Stable Diffusion XL, whose tensors are named and shaped as those of 1.5."""


@dataclass(frozen=True)
class Weights:
    """A model's parts, every one on this machine, checked for what PIA needs.

    Attributes:
        base: the folder of the base model, in the layout of Stable Diffusion 1.5, or its single file.
        components: by name: scheduler, tokenizer, text_encoder, unet, vae, and motion_adapter, which is absent where
            the base's UNet already holds its motion modules.
        loras: in the config's order, each with exactly one file.
        textual_inversions: in the config's order, each with exactly one file.
        ip_adapter: one file; None: the model has none.
        image_encoder: the folder of the IP-Adapter's CLIPVisionModelWithProjection; None: the model has no IP-Adapter.
    """

    base: Path
    components: dict[str, Component]
    loras: tuple[Component, ...] = ()
    textual_inversions: tuple[Component, ...] = ()
    ip_adapter: Component | None = None
    image_encoder: Component | None = None

    def parts(self) -> Iterator[tuple[str, Component]]:
        """Every part with a name of its own: `unet`, ..., `loras.0`, `textual_inversions.0`, `ip_adapter`, ..."""
        yield from self.components.items()
        yield from ((f"loras.{k}", part) for k, part in enumerate(self.loras))
        yield from ((f"textual_inversions.{k}", part) for k, part in enumerate(self.textual_inversions))
        if self.ip_adapter is not None and self.image_encoder is not None:
            yield from (("ip_adapter", self.ip_adapter), ("image_encoder", self.image_encoder))


def resolve(model: ModelConfig, hub: Hub | None = None) -> Weights:
    """Find the weights that `model` names, fetching what is not on this machine.

    Without a network, or with HF_HUB_OFFLINE=1, the hub's local cache answers. Objects are fetched into
    `PIA_BATCH_CACHE`, once per machine. Nothing but JSON, text and safetensors is ever fetched or opened.

    Args:
        model: what to find.
        hub: where hub ids are looked up; None: the Hugging Face hub.

    Raises:
        ConfigError: a file or a part is missing, pickled, of another family, not what PIA needs, or not of the sha256
            that the config pins.
        StorageError: an object store refused or did not answer.
    """
    hub = hub or HuggingFaceHub()
    configs = _configs(model, hub)
    base, parts = _base(model, configs, hub)
    if model.vae is not None:
        parts["vae"] = _vae(model.vae, model, configs, hub)
    holds_motion = _check_unet(parts["unet"], model)
    if model.motion_adapter is not None:
        parts["motion_adapter"] = _motion_adapter(model.motion_adapter, model, configs, hub)
    elif holds_motion:
        parts.pop("motion_adapter", None)
    elif "motion_adapter" not in parts:
        raise ConfigError(
            f"{base} has no motion_adapter/; set model.motion_adapter, for instance to openmmlab/PIA-condition-adapter"
        )
    if "motion_adapter" in parts:
        _check_motion_adapter(parts["motion_adapter"])
    if model.config is not None and all(part.config is None for part in parts.values()):
        raise ConfigError(
            "model.config is for a base, VAE or motion adapter in a single file, and none is; leave it out"
        )
    text_width = parts["unet"].settings["cross_attention_dim"]
    extras = addons.find(model, text_width, parts["text_encoder"].settings.get("hidden_size", _CLIP_WIDTH), hub)
    found = Weights(base, parts, extras.loras, extras.textual_inversions, extras.ip_adapter, extras.image_encoder)
    _check_pins(model, found)
    return found


def _configs(model: ModelConfig, hub: Hub) -> Source:
    """The tokenizer, the scheduler and the networks' configs of what is in single files."""
    if model.config is None:
        return Source(sd15.PATH, None, "Stable Diffusion 1.5")
    place, file = locate(model.config, None, "model.config", hub)
    if file is not None:
        raise ConfigError(f"model.config: {model.config} is a file; name the folder with unet/, vae/, tokenizer/, ...")
    networks = ("unet", "vae", "text_encoder", "motion_adapter")
    return place.bring([f"{name}/{CONFIG}" for name in networks] + _TOKENIZER_AND_SCHEDULER)


_TOKENIZER_AND_SCHEDULER = ["scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"]


def _base(model: ModelConfig, configs: Source, hub: Hub) -> tuple[Path, dict[str, Component]]:
    """Where the base is, and its parts but the VAE that another one replaces."""
    if model.base == EMBEDDED:
        return tiny.PATH, _folder_base(model, Source(tiny.PATH, None, "the embedded model"))
    place, file = locate(model.base, model.revision, "model.base", hub)
    if file is not None:
        source = place.bring([file])
        return source.root / file, _single_file_base(model, source, file, configs)
    networks = ["text_encoder", "unet", *([] if model.vae else ["vae"])]
    wanted = [pattern for part in networks for pattern in components.patterns(f"{part}/", model.variant)]
    wanted += [*_TOKENIZER_AND_SCHEDULER, "model_index.json"]
    if model.motion_adapter is None:
        wanted += components.patterns("motion_adapter/", model.motion_adapter_variant)
    source = place.bring(wanted)
    return source.root, _folder_base(model, source)


def _folder_base(model: ModelConfig, source: Source) -> dict[str, Component]:
    parts = {
        "scheduler": components.plain(source, "scheduler", ("scheduler_config.json",)),
        "tokenizer": components.tokenizer(source),
        "text_encoder": components.weighted(source, "text_encoder", MODEL, model.variant),
        "unet": components.weighted(source, "unet", DIFFUSION_MODEL, model.variant),
    }
    if model.vae is None:
        parts["vae"] = components.weighted(source, "vae", DIFFUSION_MODEL, model.variant)
    if model.motion_adapter is None and (source.root / "motion_adapter").is_dir():
        parts["motion_adapter"] = components.weighted(
            source, "motion_adapter", DIFFUSION_MODEL, model.motion_adapter_variant
        )
    return parts


def _single_file_base(model: ModelConfig, source: Source, file: str, configs: Source) -> dict[str, Component]:
    networks = ["text_encoder", "unet", *([] if model.vae else ["vae"])]
    _check_checkpoint(_header(source, file, "model.base"), file, networks)
    parts = {name: components.single_file(source, file, components.only_config(configs, name)) for name in networks}
    return parts | {
        "scheduler": components.plain(configs, "scheduler", ("scheduler_config.json",)),
        "tokenizer": components.tokenizer(configs),
    }


def _check_checkpoint(header: safetensors.Header, file: str, networks: list[str]) -> None:
    addons.expect(header, "model.base", "Stable Diffusion 1.5 checkpoint")
    if "text_encoder" in networks and not header.starting("cond_stage_model."):
        raise ConfigError(f"model.base: {file} has no text encoder (cond_stage_model.*); name a whole checkpoint")
    if "vae" in networks and not header.starting("first_stage_model."):
        raise ConfigError(
            f"model.base: {file} has no VAE (first_stage_model.*); set model.vae, or name a whole checkpoint"
        )


def _vae(name: str, model: ModelConfig, configs: Source, hub: Hub) -> Component:
    place, file = locate(name, model.vae_revision, "model.vae", hub)
    if file is None:
        found = components.weighted(place.bring(components.patterns("", None)), "", DIFFUSION_MODEL, None)
    else:
        source = place.bring([file, _beside(file)])
        header = _header(source, file, "model.vae")
        kind = addons.expect(header, "model.vae", "VAE", "Stable Diffusion 1.5 checkpoint")
        prefix = "first_stage_model." if header.starting("first_stage_model.") else ""
        missing = [part for part in ("encoder", "decoder") if not header.starting(f"{prefix}{part}.")]
        if missing or (prefix == "" and kind != "VAE"):
            raise ConfigError(f"model.vae: {file} has no {' and no '.join(missing) or 'VAE'}; name a whole VAE")
        found = components.single_file(source, file, _config_of(source, file, configs, "vae", "AutoencoderKL"))
    _check_vae(found)
    return found


def _check_vae(vae: Component) -> None:
    shape = components.header(vae).shape_of("decoder.conv_in.weight")
    if shape is not None and shape[1] != _LATENT_CHANNELS:
        raise ConfigError(f"model.vae: its latents have {shape[1]} channels, those of Stable Diffusion 1.5 have 4")
    if vae.settings.get("scaling_factor") == _SDXL_SCALING:
        raise ConfigError("model.vae is the VAE of Stable Diffusion XL, whose latents 1.5 does not understand")


def _motion_adapter(name: str, model: ModelConfig, configs: Source, hub: Hub) -> Component:
    key, variant = "model.motion_adapter", model.motion_adapter_variant
    place, file = locate(name, model.motion_adapter_revision, key, hub)
    if file is None:
        return components.weighted(place.bring(components.patterns("", variant)), "", DIFFUSION_MODEL, variant)
    source = place.bring([file, _beside(file)])
    addons.expect(_header(source, file, key), key, "motion adapter")
    if not (configs.root / "motion_adapter" / CONFIG).is_file():
        configs = Source(sd15.PATH, None, "PIA")
    config = _config_of(source, file, configs, "motion_adapter", "MotionAdapter")
    return components.single_file(source, file, config)


def _check_motion_adapter(adapter: Component) -> None:
    """That it is PIA's: its first layer takes latents, mask and the image's latents."""
    header, settings = components.header(adapter), adapter.settings
    shape = header.shape_of("conv_in.weight")
    channels = {settings.get("conv_in_channels"), None if shape is None else shape[1]}
    if channels != {_PIA_CHANNELS}:
        found = ", ".join(sorted(str(each) for each in channels - {_PIA_CHANNELS}))
        raise ConfigError(
            f"{header.path.parent} is no PIA motion adapter: the conv_in channels of its config and file are not both "
            f"{_PIA_CHANNELS} ({found}); an AnimateDiff adapter does not see the image. "
            "Set model.motion_adapter to one of PIA"
        )
    positions = header.shape_of("pos_encoder.pe")
    if positions is not None and positions[1] != settings.get("motion_max_seq_length"):
        raise ConfigError(
            f"{header.path} knows {positions[1]} frames, its config {settings.get('motion_max_seq_length')}; "
            f"correct motion_max_seq_length in a {CONFIG} beside it"
        )


def _check_unet(unet: Component, model: ModelConfig) -> bool:
    """Whether this UNet already holds PIA's motion modules, as in a saved PIAPipeline."""
    config, named = unet.settings, unet.folder if unet.config is None else unet.path
    channels, width = config.get("in_channels", _LATENT_CHANNELS), config.get("cross_attention_dim")
    holds_motion = config.get("_class_name") == "UNetMotionModel"
    if holds_motion and channels != _PIA_CHANNELS:
        raise ConfigError(f"{named} has motion modules but {channels} input channels: it is not PIA's UNet")
    if holds_motion and model.motion_adapter is not None:
        raise ConfigError(f"{named} already holds motion modules; leave model.motion_adapter out, or name a plain base")
    if channels == _PIA_CHANNELS and not holds_motion:
        raise ConfigError(
            f"{named} has 9 input channels: it is an inpainting model, which PIA cannot use; "
            "set model.base to the ordinary checkpoint of the same family"
        )
    known = channels in (_LATENT_CHANNELS, _PIA_CHANNELS) and isinstance(width, int)
    if not known or config.get("addition_embed_type") is not None:
        raise ConfigError(f"{named} is not the UNet of Stable Diffusion 1.5, the only family that PIA animates")
    takes = _text_width(components.header(unet))
    if takes not in (None, width):
        raise ConfigError(f"{named} takes text embeddings of {takes} numbers, but its config says {width}")
    return holds_motion


def _text_width(header: safetensors.Header) -> int | None:
    """What a UNet's cross-attention takes. Motion modules have layers of that name too, which see no text."""
    for name, shape in header.shapes.items():
        if name.endswith("attn2.to_k.weight") and "motion_modules" not in name:
            return shape[1]
    return None


def _header(source: Source, file: str, key: str) -> safetensors.Header:
    path = source.root / file
    if not path.is_file():
        raise ConfigError(f"{key}: there is no {file} in {source.named}")
    return safetensors.read(path)


def _beside(file: str) -> str:
    return (PurePosixPath(file).parent / CONFIG).as_posix()


def _config_of(source: Source, file: str, configs: Source, part: str, class_name: str) -> Component:
    """The config beside a network's single file, where it is that network's, else the one in `configs`."""
    beside = source.root / _beside(file)
    if beside.is_file() and components.read_json(beside).get("_class_name") == class_name:
        return Component(beside.parent, None, (CONFIG,), source.commit)
    return components.only_config(configs, part)


def _check_pins(model: ModelConfig, weights: Weights) -> None:
    """That every file which the config pins is used, and has the content that it must have."""
    used: dict[str, set[Path]] = {}
    for label, part in weights.parts():
        for file in part.files:
            names = {f"{label}/{file}"} | ({file, Path(file).name} if part.layout == "single_file" else set())
            for name in names:
                used.setdefault(name, set()).add(part.folder / file)
    for name, wanted in model.sha256.items():
        if name not in used:
            near = difflib.get_close_matches(name, used, n=1, cutoff=0)
            raise ConfigError(
                f"model.sha256: no file {name} is used; did you mean {near[0]}? Used: {', '.join(sorted(used))}"
            )
        for path in sorted(used[name]):
            found = components.sha256_of(path)
            if found != wanted.lower():
                raise ConfigError(
                    f"model.sha256: {name} ({path}) has the sha256 {found}, not {wanted}; it is another file"
                )
