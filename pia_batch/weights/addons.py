"""What is laid over a base: LoRAs, textual inversions and an IP-Adapter. Which file each is, and whether it fits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from pia_batch.config import IpAdapterConfig, LoraConfig, ModelConfig, TextualInversionConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import components, safetensors
from pia_batch.weights.components import CONFIG, MODEL, Component
from pia_batch.weights.fetching import Hub, Place, locate

_READS_TEXT = re.compile(r"^(?!.*motion_modules).*attn2.*to_[kv].*(lora_down|lora\.down|lora_A)\.weight$")
"""The tensor of a LoRA, in any of its spellings, that takes text embeddings; its second side is their width.

Motion modules have layers of that name too, which see no text.
"""

_OTHER_FAMILIES = ("double_blocks", "single_blocks", "joint_blocks", "lora_te2_", "text_encoder_2.", "transformer.")
"""Parts of names that LoRAs of Flux, Stable Diffusion 3 and XL have, and those of Stable Diffusion 1.5 never."""

_MOST_LISTED = 12


@dataclass(frozen=True)
class Addons:
    """What `find` found, in the config's order.

    Attributes:
        loras: each with exactly one file.
        textual_inversions: each with exactly one file.
        ip_adapter: one file; None without.
        image_encoder: the folder of the IP-Adapter's image encoder; None without.
    """

    loras: tuple[Component, ...]
    textual_inversions: tuple[Component, ...]
    ip_adapter: Component | None
    image_encoder: Component | None


def find(model: ModelConfig, text_width: int, text_encoder_width: int, hub: Hub) -> Addons:
    """All that `model` lays over its base.

    Args:
        model: what to find.
        text_width: of the text embeddings that the base's UNet takes, its `cross_attention_dim`.
        text_encoder_width: of a token in the base's text encoder, its `hidden_size`.
        hub: asked for hub ids only.

    Raises:
        ConfigError: not there, not safetensors, of another kind or family, or several files to choose from.
    """
    image = None if model.ip_adapter is None else _ip_adapter(model.ip_adapter, text_width, hub)
    return Addons(
        loras=tuple(_lora(entry, f"model.loras[{k}]", text_width, hub) for k, entry in enumerate(model.loras)),
        textual_inversions=tuple(
            _inversion(entry, f"model.textual_inversions[{k}]", text_encoder_width, hub)
            for k, entry in enumerate(model.textual_inversions)
        ),
        ip_adapter=None if image is None else image[0],
        image_encoder=None if image is None else image[1],
    )


def expect(header: safetensors.Header, key: str, *kinds: safetensors.Kind) -> safetensors.Kind:
    """What the file is, which must be one of `kinds`.

    Raises:
        ConfigError: it is another, with where that one belongs.
    """
    found = safetensors.kind(header)
    if found not in kinds:
        remedy = _BELONGS.get(found, "PIA animates Stable Diffusion 1.5 and what is made for it")
        raise ConfigError(f"{key}: {header.path.name} is of the wrong kind: {found}; {remedy}")
    return found


_BELONGS: dict[safetensors.Kind, str] = {
    "Stable Diffusion 1.5 checkpoint": "it belongs in model.base",
    "LoRA": "it belongs in model.loras",
    "LyCORIS adapter (LoHa or LoKr)": "only plain LoRAs can be applied",
    "textual inversion": "it belongs in model.textual_inversions",
    "IP-Adapter": "it belongs in model.ip_adapter",
    "motion adapter": "it belongs in model.motion_adapter",
    "VAE": "it belongs in model.vae",
    "UNet of a diffusers folder": "name the folder above, with tokenizer, text encoder and VAE",
    "text encoder": "name the whole checkpoint",
    "file of unknown layout": "its tensors have none of the names that are known here",
}


def _lora(entry: LoraConfig, key: str, text_width: int, hub: Hub) -> Component:
    place, name = _choose(entry, key, "pytorch_lora_weights.safetensors", hub)
    found = components.single_file(place.bring([name]), name)
    header = _header(found, key, place)
    expect(header, key, "LoRA")
    widths = {shape[1] for each, shape in header.shapes.items() if _READS_TEXT.search(each) and len(shape) > 1}
    if widths - {text_width} or any(part in each for each in header.shapes for part in _OTHER_FAMILIES):
        told = f" takes text embeddings of {min(widths)} numbers, the base {text_width}:" if widths else ""
        raise ConfigError(f"{key}: {name}{told} is made for another family of models than the base")
    return found


def _inversion(entry: TextualInversionConfig, key: str, width: int, hub: Hub) -> Component:
    place, name = _choose(entry, key, "learned_embeds.safetensors", hub)
    found = components.single_file(place.bring([name]), name)
    header = _header(found, key, place)
    expect(header, key, "textual inversion")
    word, shape = ("emb_params", header.shapes["emb_params"]) if "emb_params" in header.shapes else _only(header)
    if shape[-1] != width:
        raise ConfigError(
            f"{key}: {name} has embeddings of {shape[-1]} numbers, the base's text encoder {width}: "
            "it is made for another family of models than the base"
        )
    if word == "emb_params" and entry.token is None:
        raise ConfigError(f"{key}: {name} does not say which word it stands for; set {key}.token")
    return found


def _only(header: safetensors.Header) -> tuple[str, tuple[int, ...]]:
    (found,) = header.shapes.items()
    return found


def _ip_adapter(entry: IpAdapterConfig, text_width: int, hub: Hub) -> tuple[Component, Component]:
    key = "model.ip_adapter"
    place, name = _choose(entry, key, "ip-adapter_sd15.safetensors", hub)
    beside = (PurePosixPath(name).parent / "image_encoder").as_posix()
    with_encoder = components.patterns(f"{beside}/", None) if entry.image_encoder is None else []
    source = place.bring([name, *with_encoder])
    adapter = components.single_file(source, name)
    header = _header(adapter, key, place)
    expect(header, key, "IP-Adapter")
    if _is_for_faces(header):
        raise ConfigError(f"{key}: {name} is a FaceID adapter, which needs face embeddings; take one without FaceID")
    takes = header.shape_of(".to_k_ip.weight")
    if takes is None or takes[-1] != text_width:
        raise ConfigError(f"{key}: {name} is made for another family of models than the base; take one of `sd15`")
    if entry.image_encoder is not None:
        encoder = _image_encoder(entry, entry.image_encoder, hub)
    elif (source.root / beside / CONFIG).is_file():
        encoder = components.weighted(source, beside, MODEL, None)
    else:
        raise ConfigError(
            f"{key}: there is no {beside}/ beside {name}; set {key}.image_encoder to a CLIPVisionModelWithProjection"
        )
    _check_encoder(header, encoder, key)
    return adapter, encoder


def _is_for_faces(header: safetensors.Header) -> bool:
    """FaceID, which brings LoRAs or a projection that images have none of. `full-face` takes ordinary images."""
    if any("lora" in name for name in header.shapes) or header.starting("image_proj.perceiver_resampler."):
        return True
    return "image_proj.proj.0.weight" in header.shapes and "image_proj.proj.3.weight" not in header.shapes


def _image_encoder(entry: IpAdapterConfig, name: str, hub: Hub) -> Component:
    key = "model.ip_adapter.image_encoder"
    place, file = locate(name, entry.image_encoder_revision, key, hub)
    if file is not None:
        raise ConfigError(f"{key}: {name} is a file; name the folder with its config.json")
    return components.weighted(place.bring(components.patterns("", None)), "", MODEL, None)


def _check_encoder(header: safetensors.Header, encoder: Component, key: str) -> None:
    """An IP-Adapter takes an image as one vector, or, as `plus` and `full-face`, as the encoder's hidden states."""
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
                f"{key}: {header.path.name} takes images as {shape[-1]} numbers, but the image encoder in "
                f"{encoder.folder} gives {known}; set {key}.image_encoder to the one that it was trained with"
            )


def _choose(
    entry: LoraConfig | TextualInversionConfig | IpAdapterConfig, key: str, default: str, hub: Hub
) -> tuple[Place, str]:
    """Where the file is, and its name there: the one that is named, the only one, or `default` among several."""
    place, file = locate(entry.source, entry.revision, f"{key}.source", hub)
    wanted = entry.weight_name
    if file is not None:
        if wanted is not None and wanted != file:
            raise ConfigError(f"{key}: source names the file {file} already; leave weight_name out")
        return place, file
    if wanted is not None:
        safetensors.refuse_pickle(wanted, f"{key}.weight_name")
        return place, wanted
    names = place.names()
    usable = [name for name in names if name.endswith(safetensors.SUFFIX)]
    nearest = [name for name in usable if "/" not in name] or usable
    if default in nearest:
        return place, default
    if len(nearest) != 1:
        _refuse_choice(entry.source, key, names, nearest)
    return place, nearest[0]


def _refuse_choice(source: str, key: str, names: list[str], usable: list[str]) -> NoReturn:
    if usable:
        raise ConfigError(f"{key}: {source} has several files; set {key}.weight_name to one of {_listed(usable)}")
    pickles = [name for name in names if Path(name).suffix.lower() in safetensors.PICKLED]
    if pickles:
        raise ConfigError(
            f"{key}: {source} has no {safetensors.SUFFIX} file, only {_listed(pickles)}; pickled weights are refused, "
            "as opening them runs their code. Convert them to safetensors"
        )
    raise ConfigError(f"{key}: {source} has no {safetensors.SUFFIX} file")


def _header(part: Component, key: str, place: Place) -> safetensors.Header:
    if not part.path.is_file():
        usable = [name for name in place.names() if name.endswith(safetensors.SUFFIX)]
        raise ConfigError(f"{key}: there is no {part.files[0]}; weight_name may be one of {_listed(usable)}")
    return safetensors.read(part.path)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return (", ".join(names[:_MOST_LISTED]) or "none") + more
