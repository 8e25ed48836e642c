"""Resolution of a model config to its weights: safetensors files on this machine, checked for what PIA needs."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pia_batch import tiny
from pia_batch.config import EMBEDDED, ModelConfig
from pia_batch.config.contexts import POSITIONS
from pia_batch.errors import ConfigError
from pia_batch.weights import (
    addons,
    checkpoint_marks,
    components,
    conv_in,
    model_kinds,
    motion_adapters,
    network_kinds,
    networks,
    pipeline_index,
    safetensors,
    scheduler_values,
    sd15,
    spare_tensors,
    tensor_map,
    tokenizer_files,
)
from pia_batch.weights.components import CONFIG, DIFFUSION_MODEL, MODEL, Component
from pia_batch.weights.fetching import FetchedFolder, Hub, HuggingFaceHub, locate

_CLIP_WIDTH = 512
"""Default of `hidden_size` in a config. Source: transformers, `CLIPTextConfig`."""


@dataclass(frozen=True)
class Weights:
    """Parts of a model, all on this machine and checked for what PIA needs.

    Attributes:
        base: Folder of the base model, in the layout of Stable Diffusion 1.5, or its single file.
        components: Parts by name: scheduler, tokenizer, text_encoder, unet, vae, and motion_adapter, which is absent if
            the base's UNet already contains its motion modules.
        loras: LoRAs in the config's order, each with exactly one file.
        textual_inversions: Textual inversions in the config's order, each with exactly one file.
        ip_adapter: IP-Adapter, one file; None if the model has none.
        image_encoder: Folder of the IP-Adapter's CLIPVisionModelWithProjection; None if the model has no IP-Adapter.
        words: Words that stand for textual inversions in prompts, those bundled with LoRAs included.
        notices: Sentences about tensors of the files that PIA leaves out, one per file.
        are_adjustable: For each of `loras`, True if all its layers are plain, so that rows may change its scale.
    """

    base: Path
    components: dict[str, Component]
    loras: tuple[Component, ...] = ()
    textual_inversions: tuple[Component, ...] = ()
    ip_adapter: Component | None = None
    image_encoder: Component | None = None
    words: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    are_adjustable: tuple[bool, ...] = ()

    @property
    def positions(self) -> int:
        """Number of frames that the motion modules know: the length of their positional encodings."""
        part = self.components.get("motion_adapter", self.components["unet"])
        held = motion_adapters.positions(components.header(part))
        positions: int = part.settings.get("motion_max_seq_length", POSITIONS) if held is None else held
        return positions

    def parts(self) -> Iterator[tuple[str, Component]]:
        """Yield every part with its name: `unet`, ..., `loras.0`, `textual_inversions.0`, `ip_adapter`, ..."""
        yield from self.components.items()
        yield from ((f"loras.{k}", part) for k, part in enumerate(self.loras))
        yield from ((f"textual_inversions.{k}", part) for k, part in enumerate(self.textual_inversions))
        if self.ip_adapter is not None and self.image_encoder is not None:
            yield from (("ip_adapter", self.ip_adapter), ("image_encoder", self.image_encoder))


def resolve(model: ModelConfig, hub: Hub | None = None) -> Weights:
    """Find the weights that `model` names; fetch the files that are not on this machine.

    Without a network, or with HF_HUB_OFFLINE=1, the hub's local cache is used. Objects are fetched into
    `PIA_BATCH_CACHE`, once per machine. Only JSON, text and safetensors files are ever fetched or opened.

    Args:
        model: Config of the model.
        hub: Hub that resolves hub ids. None: the Hugging Face hub.

    Raises:
        ConfigError: A file or a part is missing, pickled, of another family or unsuitable for PIA, or its sha256 is not
            the one that the config pins.
        StorageError: An object store refused or did not answer.
    """
    hub = hub or HuggingFaceHub()
    configs = _configs(model, hub)
    base, parts = _base(model, configs, hub)
    if model.vae is not None:
        parts["vae"] = _vae(model.vae, model, configs, hub)
    scheduler_values.check(model, parts["scheduler"])
    for name in ("text_encoder", "unet", "vae"):
        network_kinds.check_class(name, parts[name])
    network_kinds.check_vae(parts["vae"])
    holds_motion = network_kinds.check_unet(parts["unet"], model)
    if model.motion_adapter is not None:
        parts["motion_adapter"] = _motion_adapter(model.motion_adapter, model, configs, hub)
    elif holds_motion:
        parts.pop("motion_adapter", None)
    elif "motion_adapter" not in parts:
        raise ConfigError(
            f"{base} has no motion_adapter/; set model.motion_adapter, for instance to openmmlab/PIA-condition-adapter"
        )
    if "motion_adapter" in parts:
        network_kinds.check_class("motion_adapter", parts["motion_adapter"])
        motion_adapters.check(parts["motion_adapter"], parts["unet"])
    conv_in.is_from_adapter(model, parts)  # checks the config
    notices = (*scheduler_values.notices(model, parts["scheduler"]), *_check_tensors(parts))
    tokenizer_files.check_fit(parts["tokenizer"], parts["text_encoder"])
    if model.config is not None and all(part.config is None for part in parts.values()):
        raise ConfigError(
            "model.config applies to a base, VAE or motion adapter in a single file, but this model has none; leave "
            "it out"
        )
    text_width = parts["unet"].settings["cross_attention_dim"]
    extras = addons.find(model, text_width, _token_width(parts["text_encoder"]), parts, hub)
    found = Weights(
        base,
        parts,
        extras.loras,
        extras.textual_inversions,
        extras.ip_adapter,
        extras.image_encoder,
        extras.words,
        notices + extras.notices,
        extras.are_adjustable,
    )
    _check_pins(model, found)
    return found


def _token_width(text_encoder: Component) -> int:
    width: int = networks.text_settings(text_encoder.settings).get("hidden_size", _CLIP_WIDTH)
    return width


def _check_tensors(parts: dict[str, Component]) -> tuple[str, ...]:
    """Check that every tensor of the networks has its place; return a notice for each file that has others.

    Raises:
        ConfigError: A tensor is missing, has no place, or has another shape or dtype; or the parts do not fit each
            other.
    """
    counts: dict[Path, Counter[str]] = {}
    for name in ("text_encoder", "unet", "vae", "motion_adapter"):
        if name not in parts:
            continue
        found = tensor_map.build(name, parts[name])
        path = next(iter(found.tensors.values())).path
        counts.setdefault(path, Counter()).update(found.left_out)
    if parts["unet"].layout == "single_file":
        counts[parts["unet"].path].update(_check_rest(parts["unet"].path))
    needed, width = parts["unet"].settings["cross_attention_dim"], _token_width(parts["text_encoder"])
    if width != needed:
        raise ConfigError(
            f"the text encoder in {parts['text_encoder'].folder} has embeddings of {width} dimensions, but the UNet "
            f"takes {needed}: they belong to different families; use the folders of one checkpoint"
        )
    return tuple(
        f"{path}: left out {found.total()} tensors that PIA does not use: "
        + ", ".join(f"{number} {reason}" for reason, number in sorted(found.items()))
        for path, found in counts.items()
        if found
    )


def _check_rest(path: Path) -> Counter[str]:
    """Check the tensors of a checkpoint that belong to none of its networks; return their counts by reason."""
    counts: Counter[str] = Counter()
    unknown = []
    for name in tensor_map.unwrapped(safetensors.read(path).shapes, path):
        if name.startswith((tensor_map.UNET_PREFIX, *tensor_map.VAE_PREFIXES, *tensor_map.TEXT_PREFIXES)):
            continue
        known, reason = spare_tensors.left_out(name)
        if checkpoint_marks.is_mark(name):
            continue  # it was compared with the scheduler
        if not known:
            unknown.append(name)
        elif reason is not None:
            counts[reason] += 1
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"model.base: {path} has tensors that belong to no network of Stable Diffusion 1.5: {unknown[0]}{more}; "
            "they would have no effect: remove them, or use the ordinary checkpoint"
        )
    return counts


def _configs(model: ModelConfig, hub: Hub) -> FetchedFolder:
    """Return the folder with tokenizer, scheduler and network configs for single files."""
    if model.config is None:
        return FetchedFolder(sd15.PATH, None, "Stable Diffusion 1.5")
    location, file = locate(model.config, None, "model.config", hub)
    if file is not None:
        raise ConfigError(f"model.config: {model.config} is a file; name the folder with unet/, vae/, tokenizer/, ...")
    networks = ("unet", "vae", "text_encoder", "motion_adapter")
    return location.fetch([f"{name}/{CONFIG}" for name in networks] + _TOKENIZER_AND_SCHEDULER)


_TOKENIZER_AND_SCHEDULER = ["scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"]


def _base(model: ModelConfig, configs: FetchedFolder, hub: Hub) -> tuple[Path, dict[str, Component]]:
    """Return the base's path and its parts, without the VAE if the config replaces it."""
    if model.base == EMBEDDED:
        return tiny.PATH, _folder_base(model, FetchedFolder(tiny.PATH, None, "the embedded model"))
    location, file = locate(model.base, model.revision, "model.base", hub)
    if file is not None:
        source = location.fetch([file])
        return source.root / file, _single_file_base(model, source, file, configs)
    networks = ["text_encoder", "unet", *([] if model.vae else ["vae"])]
    wanted = [pattern for part in networks for pattern in components.patterns(f"{part}/", model.variant)]
    wanted += [*_TOKENIZER_AND_SCHEDULER, "model_index.json"]
    if model.motion_adapter is None:
        wanted += components.patterns("motion_adapter/", model.motion_adapter_variant)
    source = location.fetch(wanted)
    if model.variant is None:
        return source.root, _folder_base(model, source)
    without = [part for part in networks if model.variant not in components.variants(source, part, _STEMS[part])]
    if not without or len(without) == len(networks):
        return source.root, _folder_base(model, source)
    # As in diffusers, parts without the variant are loaded without it.
    source = location.fetch([*wanted, *(each for part in without for each in components.patterns(f"{part}/", None))])
    return source.root, _folder_base(model, source, tuple(without))


_STEMS = {"text_encoder": MODEL, "unet": DIFFUSION_MODEL, "vae": DIFFUSION_MODEL}


def _folder_base(
    model: ModelConfig, source: FetchedFolder, without_variant: tuple[str, ...] = ()
) -> dict[str, Component]:
    index = source.root / "model_index.json"
    if index.is_file():
        pipeline_index.check(index)
    parts = {
        "scheduler": components.plain(source, "scheduler", ("scheduler_config.json",)),
        "tokenizer": tokenizer_files.find(source),
    }
    for part in ("text_encoder", "unet", *([] if model.vae else ["vae"])):
        variant = None if part in without_variant else model.variant
        parts[part] = components.weighted(source, part, _STEMS[part], variant)
    if model.motion_adapter is None and (source.root / "motion_adapter").is_dir():
        parts["motion_adapter"] = components.weighted(
            source, "motion_adapter", DIFFUSION_MODEL, model.motion_adapter_variant
        )
    return parts


def _single_file_base(
    model: ModelConfig, source: FetchedFolder, file: str, configs: FetchedFolder
) -> dict[str, Component]:
    networks = ["text_encoder", "unet", *([] if model.vae else ["vae"])]
    header = _header(source, file, "model.base")
    _check_checkpoint(header, file, networks)
    parts = {name: components.single_file(source, file, components.only_config(configs, name)) for name in networks}
    scheduler = components.plain(configs, "scheduler", ("scheduler_config.json",))
    checkpoint_marks.check(model, header, scheduler)
    return parts | {"scheduler": scheduler, "tokenizer": tokenizer_files.find(configs)}


def _check_checkpoint(header: safetensors.SafetensorsHeader, file: str, networks: list[str]) -> None:
    model_kinds.expect(header, "model.base", "Stable Diffusion 1.5 checkpoint")
    if "text_encoder" in networks and not header.starting(tensor_map.TEXT_PREFIX, *tensor_map.TEXT_PREFIXES):
        raise ConfigError(f"model.base: {file} has no text encoder (cond_stage_model.*); use a complete checkpoint")
    if "vae" in networks and not header.starting(*tensor_map.VAE_PREFIXES):
        raise ConfigError(
            f"model.base: {file} has no VAE (first_stage_model.*); set model.vae, or use a complete checkpoint"
        )


def _vae(name: str, model: ModelConfig, configs: FetchedFolder, hub: Hub) -> Component:
    location, file = locate(name, model.vae_revision, "model.vae", hub)
    if file is None:
        found = components.plain_or_only_variant(location, "", DIFFUSION_MODEL, "model.vae")
    else:
        source = location.fetch([file, _beside(file)])
        header = _header(source, file, "model.vae")
        kind = model_kinds.expect(header, "model.vae", "VAE", "Stable Diffusion 1.5 checkpoint")
        prefix = next((each for each in tensor_map.VAE_PREFIXES if header.starting(each)), "")
        missing = [part for part in ("encoder", "decoder") if not header.starting(f"{prefix}{part}.")]
        is_known = prefix != "" or len(missing) < 2  # noqa: PLR2004 - else `tensor_map` finds what is before its names
        if (missing and is_known) or (prefix == "" and kind != "VAE"):
            raise ConfigError(f"model.vae: {file} has no {' and no '.join(missing) or 'VAE'}; use a complete VAE")
        found = components.single_file(source, file, _config_of(source, file, configs, "vae", "AutoencoderKL"))
    return found


def _motion_adapter(name: str, model: ModelConfig, configs: FetchedFolder, hub: Hub) -> Component:
    key, variant = "model.motion_adapter", model.motion_adapter_variant
    location, file = locate(name, model.motion_adapter_revision, key, hub)
    if file is None:
        return components.weighted(location.fetch(components.patterns("", variant)), "", DIFFUSION_MODEL, variant)
    source = location.fetch([file, _beside(file)])
    header = _header(source, file, key)
    model_kinds.expect(header, key, "motion adapter")
    if not (configs.root / "motion_adapter" / CONFIG).is_file():
        configs = FetchedFolder(sd15.PATH, None, "PIA")
    config = _config_of(source, file, configs, "motion_adapter", "MotionAdapter")
    found = components.single_file(source, file, config)
    positions = motion_adapters.positions(header)
    if config.folder.is_relative_to(sd15.PATH) and positions is not None:
        # A file without a config of its own has as many frame positions as it was trained on: 24 or 32.
        return dataclasses.replace(found, changes=(("motion_max_seq_length", positions),))
    return found


def _header(source: FetchedFolder, file: str, key: str) -> safetensors.SafetensorsHeader:
    """Return the header of a single file, with the names that are inside of a trainer's."""
    path = source.root / file
    if not path.is_file():
        raise ConfigError(f"{key}: there is no {file} in {source.named}")
    found = safetensors.read(path)
    inner = tensor_map.unwrapped(found.shapes, path)
    return dataclasses.replace(found, shapes={name: found.shapes[outer] for name, outer in inner.items()})


def _beside(file: str) -> str:
    return (PurePosixPath(file).parent / CONFIG).as_posix()


def _config_of(source: FetchedFolder, file: str, configs: FetchedFolder, part: str, class_name: str) -> Component:
    """Return the config next to a network's single file if it has the right class, else the one in `configs`."""
    beside = source.root / _beside(file)
    if beside.is_file() and components.read_json(beside).get("_class_name") == class_name:
        return Component(beside.parent, None, (CONFIG,), source.commit)
    return components.only_config(configs, part)


def _check_pins(model: ModelConfig, weights: Weights) -> None:
    """Check that every file that the config pins is used and has the pinned sha256."""
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
                    f"model.sha256: {name} ({path}) is another file (sha256: got {found}, expected {wanted})"
                )
