"""Add-ons of a base: finds the files of LoRAs, textual inversions and the IP-Adapter, and checks that they fit.

The headers decide: a file that no engine loads is refused here, before a run starts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NoReturn

from pia_batch.config import IpAdapterConfig, LoraConfig, ModelConfig, TextualInversionConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import (
    components,
    image_prompt_files,
    inversion_files,
    lora_files,
    lora_marks,
    lora_numbers,
    lora_shapes,
    model_kinds,
    peft_config,
    quantized_names,
    safetensors,
    sd15,
)
from pia_batch.weights.components import CONFIG, MODEL, Component
from pia_batch.weights.fetching import FetchedFolder, Hub, Location, locate
from pia_batch.weights.network_layers import NetworkLayers
from pia_batch.weights.networks import shapes_of

log = logging.getLogger(__name__)

_READS_TEXT = re.compile(r"^(?!.*motion_modules).*attn2.*to_[kv].*(lora_down|lora\.down|lora_A)\.weight$")
"""Pattern of a LoRA's tensors, in all naming schemes, that read text embeddings; their second side is the text width.

Motion modules have layers of that name, too; these do not read text.
"""

_OTHER_FAMILIES = re.compile(
    r"double_blocks|single_blocks|joint_blocks|lora_te2_|text_encoder_2\.|^(base_model\.model\.)?(lora_)?transformer[._]"
)
"""Pattern of tensor names that occur in LoRAs of Flux, Stable Diffusion 3 and XL, but never in those of 1.5."""

_MOST_LISTED = 12


@dataclass(frozen=True)
class Addons:
    """Add-ons of a model, in the config's order.

    Attributes:
        loras: LoRAs, each with exactly one file.
        textual_inversions: Textual inversions, each with exactly one file.
        words: Words that stand for textual inversions in prompts, those bundled with LoRAs included.
        ip_adapter: IP-Adapter, one file; None if the model has none.
        image_encoder: Folder of the IP-Adapter's image encoder; None if the model has no IP-Adapter.
        notices: Sentences about tensors that are left out, and about marks of a training for another base.
        are_adjustable: For each of `loras`, True if all its layers are plain, so that rows may change its scale.
    """

    loras: tuple[Component, ...]
    textual_inversions: tuple[Component, ...]
    words: tuple[str, ...]
    ip_adapter: Component | None
    image_encoder: Component | None
    notices: tuple[str, ...] = ()
    are_adjustable: tuple[bool, ...] = ()


def find(
    model: ModelConfig, text_width: int, text_encoder_width: int, networks: Mapping[str, Component], hub: Hub
) -> Addons:
    """Find all add-ons of `model`; fetch the files that are not on this machine.

    Args:
        model: Config of the model.
        text_width: Width of the text embeddings that the base's UNet takes, its `cross_attention_dim`.
        text_encoder_width: Width of a token in the base's text encoder, its `hidden_size`.
        networks: Parts of the base; their headers are read if there is a LoRA.
        hub: Hub that resolves hub ids.

    Raises:
        ConfigError: A file is missing, not safetensors, of another kind or family, or one of several to choose from.
        StorageError: An object store refused or did not answer.
    """
    image = None
    if model.ip_adapter is not None:
        unet = shapes_of("unet", networks["unet"].settings)
        image = _ip_adapter(model.ip_adapter, text_width, unet, hub)
    layers = layers_of(networks) if model.loras else {}
    widths = (text_width, text_encoder_width)
    words = inversion_files.Words(networks["tokenizer"])
    inversions = tuple(
        _inversion(entry, f"model.textual_inversions[{k}]", text_encoder_width, words, hub)
        for k, entry in enumerate(model.textual_inversions)
    )
    base = _Base(model, networks, layers, widths, words)
    loras = [_lora(entry, f"model.loras[{k}]", base, hub) for k, entry in enumerate(model.loras)]
    return Addons(
        loras=tuple(part for part, _, _ in loras),
        textual_inversions=inversions,
        words=tuple(words.added),
        ip_adapter=None if image is None else image[0],
        image_encoder=None if image is None else image[1],
        notices=tuple(notice for _, notices, _ in loras for notice in notices),
        are_adjustable=tuple(adjustable for _, _, adjustable in loras),
    )


def layers_of(networks: Mapping[str, Component]) -> dict[str, NetworkLayers]:
    """Return the layers of UNet and text encoder, whose files `resolve` has compared with their configs.

    A UNet with motion modules has them in its own config; otherwise they are in the motion adapter, which also replaces
    the UNet's first layer.

    Args:
        networks: Parts of the base by name.
    """
    unet, text = (shapes_of(name, networks[name].settings) for name in ("unet", "text_encoder"))
    if "motion_adapter" in networks:
        unet |= shapes_of("motion_adapter", networks["motion_adapter"].settings)
    return {
        lora_files.UNET: NetworkLayers(lora_files.UNET, unet),
        lora_files.TEXT_ENCODER: NetworkLayers(lora_files.TEXT_ENCODER, text),
    }


@dataclass(frozen=True)
class _Base:
    """Base that LoRAs must fit.

    Attributes:
        model: Config of the model.
        parts: Parts of the base.
        layers: Layers of UNet and text encoder.
        widths: Width of the text embeddings that the UNet takes, and width of a token in the text encoder.
        words: Words of textual inversions, to which those of bundled ones are added.
    """

    model: ModelConfig
    parts: Mapping[str, Component]
    layers: Mapping[str, NetworkLayers]
    widths: tuple[int, int]
    words: inversion_files.Words


def _lora(entry: LoraConfig, key: str, base: _Base, hub: Hub) -> tuple[Component, list[str], bool]:
    """Return the file of a LoRA, notices about it, and True if all layers are plain."""
    location, name = _choose(entry, key, "pytorch_lora_weights.safetensors", hub)
    found = components.single_file(location.fetch([name]), name)
    header = _header(found, key, location)
    refused = lora_files.unsupported(header.shapes)
    if refused is not None:
        raise ConfigError(
            f"{key}: {name} is of the kind {refused}, which no engine applies; supported are LoRA, LoCon, LoHa, LoKr, "
            "DoRA and full differences. Merge it into its base, and set model.base to the result"
        )
    model_kinds.expect(header, key, "LoRA")
    text_width, token_width = base.widths
    read = {shape[1] for each, shape in header.shapes.items() if _READS_TEXT.search(each) and len(shape) > 1}
    others = read - {text_width}
    foreign = next(filter(_OTHER_FAMILIES.search, header.shapes), None)
    if others or foreign is not None:
        reason = (
            f"text embeddings: got {min(others)} dimensions, expected {text_width}"
            if others
            else f"its tensor {foreign!r} is of a network that Stable Diffusion 1.5 does not have"
        )
        raise ConfigError(
            f"{key}: {name} is made for another family of models than the base ({reason}); use one for the base"
        )
    where = f"{key}: {name}"
    content = lora_files.contents(header.shapes, where)
    for network, held in base.layers.items():
        if held.is_known:
            for _ in lora_shapes.fit(content, network, header.shapes, held, where):
                pass  # checks each layer
    for word, tensor in content.embeddings.items():
        if header.shapes[tensor][-1:] != (token_width,):
            raise ConfigError(
                f"{where}: its textual inversion {word!r} is made for another family of models than the base "
                f"(got shape {header.shapes[tensor]}, expected {token_width} dimensions)"
            )
        base.words.add(word, header.shapes[tensor], f"{where}: its textual inversion", "rename its tensor in the file")
    if content.left_out:
        log.info("tensors_left_out key=%s file=%s num_tensors=%d", key, name, len(content.left_out))
    _check_content(header, content, where)
    has_scale = any("alpha" in roles for each in content.layers.values() for roles in each.values())
    part = _with_record(name, key, location) if content.is_peft and not has_scale else found
    zeros = list(lora_numbers.notices(header, content, _networks_of_zero(part, header, content, where), where))
    left_out = _left_out(content, base.layers, where)
    marks = lora_marks.notices(base.model, header, base.parts["scheduler"], where)
    return part, [*left_out, *zeros, *marks], content.is_adjustable


def _left_out(content: lora_files.LoraContent, layers: Mapping[str, NetworkLayers], where: str) -> Iterator[str]:
    """Yield a notice that counts the tensors without effect, and one for a motion module in the middle block.

    Raises:
        ConfigError: The LoRA changes nothing else.
    """
    if content.left_out:
        yield (
            f"{where}: left out tensors that change no weight of this model ({len(content.left_out)}, such as "
            f"{content.left_out[0]})"
        )
    count = sum(lora_shapes.without_place(content, network, held) for network, held in layers.items())
    if not count:
        return
    if count == sum(len(roles) for held in content.layers.values() for roles in held.values()):
        raise ConfigError(
            f"{where} changes only the motion module of the middle block, which this model does not have; leave it out"
        )
    yield (
        f"{where}: left out {count} tensors for a motion module in the middle block, which this model does not have, "
        "as PIA has none there"
    )


def _with_record(name: str, key: str, location: Location) -> Component:
    """Return the component with peft's record of alpha and rank, which is next to the file."""
    beside = (PurePosixPath(name).parent / peft_config.PEFT_CONFIG).as_posix()
    source = location.fetch([name, beside])
    path = source.root / beside
    if not path.is_file():
        raise ConfigError(
            f"{key}: {name} was saved by peft, whose scale is in {peft_config.PEFT_CONFIG}, but there is none next to "
            "it; copy that file there"
        )
    peft_config.check_peft(components.read_json(path), f"{key}: {path}")
    record = Component(path.parent, None, (path.name,), source.commit)
    return replace(components.single_file(source, name), config=record)


def _networks_of_zero(
    part: Component, header: safetensors.SafetensorsHeader, content: lora_files.LoraContent, where: str
) -> set[str]:
    """Return the networks for which peft's record, next to the file or in its header, has the alpha 0."""
    own = None if part.config is None else components.read_json(part.config.folder / peft_config.PEFT_CONFIG)
    recorded = peft_config.in_metadata(header.metadata, where)
    records = {network: own or peft_config.of_network(recorded, network) for network in content.layers}
    return {network for network, record in records.items() if record is not None and peft_config.is_zero(record)}


def _inversion(
    entry: TextualInversionConfig, key: str, width: int, words: inversion_files.Words, hub: Hub
) -> Component:
    location, name = _choose(entry, key, "learned_embeds.safetensors", hub)
    found = components.single_file(location.fetch([name]), name)
    header = _header(found, key, location)
    model_kinds.expect(header, key, "textual inversion")
    word = inversion_files.vectors_of(header.shapes, f"{key}: {name}")
    shape = header.shapes[word]
    if shape[-1:] != (width,):
        raise ConfigError(
            f"{key}: {name} is made for another family of models than the base (embeddings: got "
            f"{shape[-1] if shape else 0} dimensions, expected {width})"
        )
    _check_dtypes(header, [word], f"{key}: {name}")
    if len(shape) > 2 or 0 in shape:  # noqa: PLR2004 - tokens, features
        raise ConfigError(f"{key}: {name}: invalid shape {shape}, expected (tokens, features); fetch the file again")
    if word in inversion_files.NAMELESS and entry.token is None:
        raise ConfigError(f"{key}: {name} does not name its word; set {key}.token")
    words.add(entry.token or word, shape, f"{key}: {name}", f"set another word as {key}.token")
    return found


def _ip_adapter(
    entry: IpAdapterConfig, text_width: int, unet: Mapping[str, image_prompt_files.Shape], hub: Hub
) -> tuple[Component, Component]:
    key = "model.ip_adapter"
    location, name = _choose(entry, key, "ip-adapter_sd15.safetensors", hub)
    beside = (PurePosixPath(name).parent / "image_encoder").as_posix()
    with_encoder = [f"{beside}/{CONFIG}"] if entry.image_encoder is None else []
    source = location.fetch([name, *with_encoder])
    adapter = components.single_file(source, name)
    header = _header(adapter, key, location)
    model_kinds.expect(header, key, "IP-Adapter")
    quantized_names.refuse(header.shapes, f"{key}: {name}")
    named = image_prompt_files.adapter_tensors(header.shapes)
    if len(named) < len(header.shapes):
        num_left_out = len(header.shapes) - len(named)
        log.info("tensors_left_out key=%s file=%s num_tensors=%d", key, name, num_left_out)
    unknown = [stored for each, stored in named.items() if not each.startswith(("image_proj.", "ip_adapter."))]
    if unknown:
        raise ConfigError(
            f"{key}: {name} holds {unknown[0]!r}, which is no tensor of an IP-Adapter; use a file with image_proj.* "
            "and ip_adapter.* only"
        )
    _check_dtypes(header, named.values(), f"{key}: {name}")
    header = replace(header, shapes={each: header.shapes[stored] for each, stored in named.items()})
    if _is_for_faces(header):
        raise ConfigError(f"{key}: {name} is a FaceID adapter, which needs face embeddings; use one without FaceID")
    takes = header.shape_of(".to_k_ip.weight")
    if takes is None:
        raise ConfigError(f"{key}: {name} has no tensors ip_adapter.*; it is not a complete IP-Adapter")
    if takes[-1:] != (text_width,):
        raise ConfigError(f"{key}: {name} is made for another family of models than the base; use one for `sd15`")
    image_prompt_files.check_adapter(header.shapes, unet, f"{key}: {name}")
    if entry.image_encoder is not None:
        encoder = _image_encoder(entry, entry.image_encoder, hub)
    elif (source.root / beside / CONFIG).is_file():
        encoder = _encoder_folder(location, beside, f"{key}.image_encoder")
    else:
        raise ConfigError(
            f"{key}: there is no {beside}/ next to {name}; set {key}.image_encoder to a CLIPVisionModelWithProjection"
        )
    _check_encoder(header, encoder, key)
    return adapter, encoder


def _is_for_faces(header: safetensors.SafetensorsHeader) -> bool:
    """Return True for a FaceID adapter: it has LoRAs or projects face embeddings. `full-face` reads images."""
    if any("lora" in name for name in header.shapes) or header.starting("image_proj.perceiver_resampler."):
        return True
    return "image_proj.proj.0.weight" in header.shapes and "image_proj.proj.3.weight" not in header.shapes


def _image_encoder(entry: IpAdapterConfig, name: str, hub: Hub) -> Component:
    key = "model.ip_adapter.image_encoder"
    location, file = locate(name, entry.image_encoder_revision, key, hub)
    if file is None:
        return _encoder_folder(location, "", key)
    beside = (PurePosixPath(file).parent / CONFIG).as_posix()
    source = location.fetch([file, beside])
    header = _header(components.single_file(source, file), key, location)
    model_kinds.expect(header, key, "image encoder", "text encoder", "file of unknown layout")  # CLIP may be whole
    config = components.only_config(FetchedFolder(sd15.PATH, None, "CLIP-ViT-H"), "image_encoder")
    if (source.root / beside).is_file():
        settings = components.read_json(source.root / beside)
        if "vision_config" in settings or settings.get("model_type") == "clip_vision_model":
            config = Component((source.root / beside).parent, None, (CONFIG,), source.commit)
    found = components.single_file(source, file, config)
    _check_encoder_tensors(header, found, f"{key}: {file}")
    return found


def _encoder_folder(location: Location, part: str, key: str) -> Component:
    found = components.plain_or_only_variant(location, part, MODEL, key)
    _check_encoder_tensors(components.header(found), found, f"{key}: {found.folder}")
    return found


def _check_encoder_tensors(header: safetensors.SafetensorsHeader, encoder: Component, where: str) -> None:
    """Check the tensors of an image encoder; quantized ones have other shapes, so that they are looked for first."""
    tensors = image_prompt_files.encoder_tensors(header.shapes)
    quantized_names.refuse(tensors, where)
    _check_dtypes(header, {one.name for one in tensors.values()}, where)
    image_prompt_files.check_encoder(header.shapes, encoder.settings, where)


def _check_encoder(header: safetensors.SafetensorsHeader, encoder: Component, key: str) -> None:
    """Check the encoder's output width. `plus` and `full-face` adapters read its hidden states, others one vector."""
    settings = encoder.settings
    vision = settings.get("vision_config", settings)
    for tensor, known in (
        ("image_proj.proj.weight", settings.get("projection_dim")),
        ("image_proj.proj_in.weight", vision.get("hidden_size")),
        ("image_proj.proj.0.weight", vision.get("hidden_size")),
    ):
        shape = header.shapes.get(tensor)
        if shape is not None and known is not None and shape[-1] != known:
            raise ConfigError(
                f"{key}: {header.path.name} takes image embeddings of {shape[-1]} dimensions, but the image encoder in "
                f"{encoder.folder} returns {known}; set {key}.image_encoder to the one that it was trained with"
            )


def _choose(
    entry: LoraConfig | TextualInversionConfig | IpAdapterConfig, key: str, default: str, hub: Hub
) -> tuple[Location, str]:
    """Return the location and the name of the file: the named one, the only one, or `default` among several."""
    location, file = locate(entry.source, entry.revision, f"{key}.source", hub)
    wanted = entry.weight_name
    if file is not None:
        if wanted is not None and wanted != file:
            raise ConfigError(f"{key}: source already names the file {file}; leave weight_name out")
        return location, file
    if wanted is not None:
        safetensors.refuse_pickle(wanted, f"{key}.weight_name")
        return location, wanted
    names = location.names()
    usable = [name for name in names if name.endswith(safetensors.SUFFIX)]
    nearest = [name for name in usable if "/" not in name] or usable
    if default in nearest:
        return location, default
    if len(nearest) != 1:
        _refuse_choice(entry.source, key, names, nearest)
    return location, nearest[0]


def _refuse_choice(source: str, key: str, names: list[str], usable: list[str]) -> NoReturn:
    if usable:
        raise ConfigError(f"{key}: {source} has several files; set {key}.weight_name to one of {_listed(usable)}")
    pickles = [name for name in names if Path(name).suffix.lower() in safetensors.PICKLED]
    if pickles:
        raise ConfigError(
            f"{key}: {source} has no {safetensors.SUFFIX} file, only {_listed(pickles)}; pickled weights are refused, "
            "because opening them runs their code. Convert them to safetensors"
        )
    raise ConfigError(f"{key}: {source} has no {safetensors.SUFFIX} file; name the file, or the folder that has it")


def _header(part: Component, key: str, location: Location) -> safetensors.SafetensorsHeader:
    if not part.path.is_file():
        usable = [name for name in location.names() if name.endswith(safetensors.SUFFIX)]
        raise ConfigError(f"{key}: there is no {part.files[0]}; set weight_name to one of {_listed(usable)}")
    return safetensors.read(part.path)


def _check_content(header: safetensors.SafetensorsHeader, content: lora_files.LoraContent, where: str) -> None:
    """Check the dtypes of a LoRA's tensors and peft's record in its header."""
    for roles in (roles for layers in content.layers.values() for roles in layers.values()):
        _check_dtypes(header, [name for role, name in roles.items() if role not in lora_files.NUMBERS], where)
    _check_dtypes(header, content.embeddings.values(), where)
    recorded = peft_config.in_metadata(header.metadata, where)
    for network in content.layers:
        record = peft_config.of_network(recorded, network)
        if record is not None:
            peft_config.check_header(record, f"{where}: the record of peft in its header")


def _check_dtypes(header: safetensors.SafetensorsHeader, names: Iterable[str], where: str) -> None:
    """Check that tensors hold weights as they are.

    Raises:
        ConfigError: A tensor is quantized, or holds no real numbers.
    """
    for name in names:
        dtype = header.dtypes[name]
        if dtype not in safetensors.WEIGHT_DTYPES:
            raise ConfigError(
                f"{where}: tensor {name} has dtype {dtype}; quantized weights are not supported: use a file in F16, "
                "BF16 or F32"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return (", ".join(names[:_MOST_LISTED]) or "none") + more
