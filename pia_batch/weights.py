"""Which weights a model config names: local folders of safetensors, and an identity that a result can carry.

Imports neither torch nor diffusers, as the driver asks for the identity of a model that only the actors load.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pia_batch import tiny
from pia_batch.config import EMBEDDED, ModelConfig
from pia_batch.errors import ConfigError

ENGINE_VERSION = "1"
"""Part of every engine id. Raised when the engine draws other pixels from the same weights and settings."""

Download = Callable[[str, str | None, list[str]], Path]
"""A hub id, a revision and file patterns to a folder named by its commit."""

_PIA_CHANNELS = 9
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Component:
    """One part of a model on this machine.

    Attributes:
        folder: where its files are.
        variant: the `fp16` of `diffusion_pytorch_model.fp16.safetensors`; None: no variant.
        files: the files that are used, relative to `folder`, sorted.
        commit: the hub commit that they come from; None for a local folder.
    """

    folder: Path
    variant: str | None
    files: tuple[str, ...]
    commit: str | None

    def identity(self) -> dict[str, str | None]:
        """Equal for equal weights: the hub commit, else the sha256 of every file that is used."""
        if self.commit is not None:
            return {"commit": self.commit, "variant": self.variant}
        return {name: _sha256(self.folder / name) for name in self.files}


@dataclass(frozen=True)
class Weights:
    """A model's parts, every one a local folder, checked for what PIA needs.

    Attributes:
        base: the folder of the base model, in the layout of Stable Diffusion 1.5.
        motion_adapter: the adapter's own folder; None where the base's UNet already holds its motion modules.
        vae: the VAE's own folder, the base's unless the config names another.
        components: by name: scheduler, tokenizer, text_encoder, unet, vae and (as above) motion_adapter.
    """

    base: Path
    motion_adapter: Path | None
    vae: Path
    components: dict[str, Component]


@dataclass(frozen=True)
class _Source:
    root: Path
    commit: str | None
    named: str


def resolve(model: ModelConfig, download: Download | None = None) -> Weights:
    """Find the weights that `model` names, fetching from the hub what is not on this machine.

    Without a network, or with HF_HUB_OFFLINE=1, the hub's local cache answers. Nothing but JSON, text and safetensors
    is ever fetched or opened.

    Args:
        model: what to find.
        download: how hub files become a folder; None: `huggingface_hub.snapshot_download`.

    Raises:
        ConfigError: a folder or a part is missing, has pickled weights only, or is not what PIA needs.
    """
    fetch = download or _from_hub
    base = _base(model, fetch)
    components = {
        "scheduler": _plain(base, "scheduler", ("scheduler_config.json",)),
        "tokenizer": _tokenizer(base),
        "text_encoder": _weighted(base, "text_encoder", "model", model.variant),
        "unet": _weighted(base, "unet", "diffusion_pytorch_model", model.variant),
    }
    if model.vae is None:
        components["vae"] = _weighted(base, "vae", "diffusion_pytorch_model", model.variant)
    else:
        source = _source(model.vae, model.vae_revision, _patterns("", None), "model.vae", fetch)
        components["vae"] = _weighted(source, "", "diffusion_pytorch_model", None)
    if not _check_unet(components["unet"].folder, model):
        components["motion_adapter"] = _motion_adapter(model, base, fetch)
    adapter = components.get("motion_adapter")
    return Weights(
        base=base.root,
        motion_adapter=None if adapter is None else adapter.folder,
        vae=components["vae"].folder,
        components=components,
    )


def engine_id(model: ModelConfig, weights: Weights, dtype: str) -> str:
    """What draws the pixels, as 32 hexadecimal digits: weights, scheduler, dtype and `ENGINE_VERSION`.

    A folder's path and the model's name are no part of it: the same weights elsewhere have the same id.

    Args:
        model: the config that `weights` were resolved from.
        weights: as `resolve` returned them.
        dtype: as `resolved_dtype` returned it.
    """
    identity = {
        "version": ENGINE_VERSION,
        "weights": {name: part.identity() for name, part in weights.components.items()},
        "scheduler": model.scheduler.model_dump(mode="json"),
        "dtype": dtype,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def resolved_dtype(model: ModelConfig, *, on_gpu: bool) -> str:
    """`float32`, `float16` or `bfloat16`: what `auto` means on this device."""
    if model.dtype != "auto":
        return model.dtype
    return "float16" if on_gpu else "float32"


def _base(model: ModelConfig, fetch: Download) -> _Source:
    if model.base == EMBEDDED:
        return _Source(tiny.PATH, None, "the embedded model")
    parts = ["text_encoder", "unet", *([] if model.vae else ["vae"])]
    patterns = [pattern for part in parts for pattern in _patterns(f"{part}/", model.variant)]
    patterns += ["scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt", "model_index.json"]
    if model.motion_adapter is None:
        patterns += _patterns("motion_adapter/", model.motion_adapter_variant)
    return _source(model.base, model.revision, patterns, "model.base", fetch)


def _motion_adapter(model: ModelConfig, base: _Source, fetch: Download) -> Component:
    variant = model.motion_adapter_variant
    if model.motion_adapter is not None:
        patterns = _patterns("", variant)
        source = _source(model.motion_adapter, model.motion_adapter_revision, patterns, "model.motion_adapter", fetch)
        adapter = _weighted(source, "", "diffusion_pytorch_model", variant)
    elif (base.root / "motion_adapter").is_dir():
        adapter = _weighted(base, "motion_adapter", "diffusion_pytorch_model", variant)
    else:
        raise ConfigError(
            f"{base.named} has no motion_adapter/; set model.motion_adapter, "
            "for instance to openmmlab/PIA-condition-adapter"
        )
    channels = _read_json(adapter.folder / "config.json").get("conv_in_channels")
    if channels != _PIA_CHANNELS:
        raise ConfigError(
            f"{adapter.folder} is no PIA motion adapter: its conv_in_channels is {channels}, not {_PIA_CHANNELS}; "
            "an AnimateDiff adapter does not see the image. Set model.motion_adapter to one of PIA"
        )
    return adapter


def _check_unet(folder: Path, model: ModelConfig) -> bool:
    """Whether this UNet already holds PIA's motion modules, as in a saved PIAPipeline."""
    config = _read_json(folder / "config.json")
    channels = config.get("in_channels", 4)
    if config.get("_class_name") == "UNetMotionModel":
        if channels != _PIA_CHANNELS:
            raise ConfigError(f"{folder} has motion modules but {channels} input channels: it is not PIA's UNet")
        if model.motion_adapter is not None:
            raise ConfigError(
                f"{folder} already holds motion modules; leave model.motion_adapter out, or name a plain base"
            )
        return True
    if channels == _PIA_CHANNELS:
        raise ConfigError(
            f"{folder} has 9 input channels: it is an inpainting model, which PIA cannot use; "
            "set model.base to the ordinary checkpoint of the same family"
        )
    if channels != 4 or config.get("addition_embed_type") is not None:  # noqa: PLR2004 - latent channels
        raise ConfigError(f"{folder} is not the UNet of Stable Diffusion 1.5, the only family that PIA animates")
    return False


def _source(name: str, revision: str | None, patterns: list[str], key: str, fetch: Download) -> _Source:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _Source(folder, None, name)
    if folder.is_file():
        raise ConfigError(f"{key}: {name} is a file; a folder in diffusers' layout or a hub id is needed")
    if _HUB_ID.fullmatch(name) is None:
        raise ConfigError(f"{key}: there is no folder {name}, and it is no hub id either (owner/name)")
    root = fetch(name, revision, patterns)
    return _Source(root, root.name, name)


def _from_hub(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # noqa: PLC0415 - most runs name folders, and it takes a third of a second
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, errors.HTTPError) as err:  # type: ignore[attr-defined] # its HTTP client's base
        wanted = repo_id if revision is None else f"{repo_id} at {revision}"
        raise ConfigError(
            f"cannot get {wanted} from the hub, nor from its cache on this machine: {err}. Check the id, the "
            "revision, HF_TOKEN for gated models, and the network; or name a local folder"
        ) from err


def _patterns(prefix: str, variant: str | None) -> list[str]:
    """What to fetch of a part: configs, and the weights of one variant only, whole or in shards."""
    middle = "" if variant is None else f".{variant}"
    stems = ("model", "diffusion_pytorch_model")
    ends = (f"{middle}.safetensors", f"{middle}-*-of-*.safetensors", f"-*-of-*{middle}.safetensors")
    return [f"{prefix}*.json", *(f"{prefix}{stem}{end}" for stem in stems for end in ends)]


def _plain(source: _Source, part: str, names: tuple[str, ...]) -> Component:
    folder = source.root / part
    files = tuple(sorted(name for name in names if (folder / name).is_file()))
    if not files:
        raise ConfigError(f"{source.named} has no {part}/{names[0]}; it is not a whole checkpoint of diffusers")
    return Component(folder, None, files, source.commit)


def _tokenizer(source: _Source) -> Component:
    tokenizer = _plain(source, "tokenizer", _TOKENIZER)
    if "tokenizer.json" not in tokenizer.files and not {"vocab.json", "merges.txt"} <= set(tokenizer.files):
        raise ConfigError(f"{source.named} has no vocabulary in tokenizer/; it is not a whole checkpoint")
    return tokenizer


def _weighted(source: _Source, part: str, stem: str, variant: str | None) -> Component:
    folder = source.root / part
    label = f"{part}/" if part else ""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{source.named} has no {label}config.json; it is not a whole checkpoint of diffusers")
    middle = "" if variant is None else f".{variant}"
    index = folder / f"{stem}.safetensors.index{middle}.json"
    names = {f"{stem}{middle}.safetensors"}
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or not names:
        raise ConfigError(_why_no_weights(source, folder, f"{label}{', '.join(missing)}"))
    used = {"config.json", *names, *([index.name] if index.is_file() else [])}
    return Component(folder, variant, tuple(sorted(used)), source.commit)


def _why_no_weights(source: _Source, folder: Path, wanted: str) -> str:
    message = f"{source.named} has no {wanted}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"{message}, but {', '.join(others)}; set or leave out the variant in the config"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    found = f", only {', '.join(pickles)}" if pickles else ""
    return (
        f"{message}{found}; pickled weights are refused, as opening them runs their code. "
        "Convert them to safetensors, or name a checkpoint that has them"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ConfigError(f"cannot read {path}: {err}") from err
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _hash_file(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash_file(path: Path, size: int, modified_ns: int) -> str:
    """The file's sha256. Size and time are in the key only, so that a changed file is read again."""
    del size, modified_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
