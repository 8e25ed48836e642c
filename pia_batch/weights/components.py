"""One part of a model: which files it is made of, whether they are all there and safe to open, and its identity."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pia_batch.errors import ConfigError
from pia_batch.weights import safetensors
from pia_batch.weights.fetching import Source

MODEL, DIFFUSION_MODEL = "model", "diffusion_pytorch_model"
"""What transformers and diffusers call the weights in a folder."""

CONFIG = "config.json"
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Component:
    """One part of a model on this machine.

    Attributes:
        folder: where its files are.
        variant: the `fp16` of `diffusion_pytorch_model.fp16.safetensors`; None: no variant.
        files: the files that are used, relative to `folder`, sorted.
        commit: the hub commit that they come from; None where they are not from the hub.
        layout: `diffusers`: a folder that diffusers or transformers load; `single_file`: exactly one safetensors file,
            which may hold more than this part.
        config: of a network in a single file, the folder with its `config.json`; None: in `folder`, or not needed.
    """

    folder: Path
    variant: str | None
    files: tuple[str, ...]
    commit: str | None
    layout: Literal["diffusers", "single_file"] = "diffusers"
    config: Component | None = None

    @property
    def path(self) -> Path:
        """The one file of a `single_file`."""
        (name,) = self.files
        return self.folder / name

    @property
    def settings(self) -> dict[str, Any]:
        """The content of its `config.json`.

        Raises:
            ConfigError: there is none, or it is broken.
        """
        return read_json((self.folder if self.config is None else self.config.folder) / CONFIG)

    def identity(self) -> dict[str, Any]:
        """Equal for equal weights: the hub commit, else the sha256 of every file that is used, wherever they are."""
        if self.layout == "single_file":
            held = {"sha256": sha256_of(self.path)} if self.commit is None else {"commit": self.commit}
            file = {} if self.commit is None else {"file": self.files[0]}
            return held | file | ({} if self.config is None else {"config": self.config.identity()})
        if self.commit is not None:
            return {"commit": self.commit, "variant": self.variant}
        return {name: sha256_of(self.folder / name) for name in self.files}


def patterns(prefix: str, variant: str | None) -> list[str]:
    """What to fetch of a part: configs, and the weights of one variant only, whole or in shards."""
    middle = "" if variant is None else f".{variant}"
    ends = (f"{middle}.safetensors", f"{middle}-*-of-*.safetensors", f"-*-of-*{middle}.safetensors")
    return [f"{prefix}*.json", *(f"{prefix}{stem}{end}" for stem in (MODEL, DIFFUSION_MODEL) for end in ends)]


def plain(source: Source, part: str, names: tuple[str, ...]) -> Component:
    """A part without weights: the files of `names` that are there.

    Raises:
        ConfigError: none is.
    """
    folder = source.root / part
    files = tuple(sorted(name for name in names if (folder / name).is_file()))
    if not files:
        raise ConfigError(f"{source.named} has no {part}/{names[0]}; it is not a whole checkpoint of diffusers")
    return Component(folder, None, files, source.commit)


def tokenizer(source: Source) -> Component:
    """The part `tokenizer`.

    Raises:
        ConfigError: it has no vocabulary.
    """
    found = plain(source, "tokenizer", _TOKENIZER)
    if "tokenizer.json" not in found.files and not {"vocab.json", "merges.txt"} <= set(found.files):
        raise ConfigError(f"{source.named} has no vocabulary in tokenizer/; it is not a whole checkpoint")
    return found


def weighted(source: Source, part: str, stem: str, variant: str | None) -> Component:
    """A network in a folder: its `config.json` and its weights, whole or in shards.

    Args:
        source: where the folder is.
        part: the folder in there; empty: `source` itself.
        stem: `MODEL` or `DIFFUSION_MODEL`.
        variant: as in `Component`.

    Raises:
        ConfigError: something is missing, pickled or cut short.
    """
    folder = source.root / part
    label = f"{part}/" if part else ""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{source.named} has no {label}{CONFIG}; it is not a whole checkpoint of diffusers")
    middle = "" if variant is None else f".{variant}"
    index = folder / f"{stem}.safetensors.index{middle}.json"
    names = {f"{stem}{middle}.safetensors"}
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or not names:
        raise ConfigError(_why_no_weights(source, folder, f"{label}{', '.join(missing)}"))
    for name in names:
        safetensors.read(folder / name)
    used = {CONFIG, *names, *([index.name] if index.is_file() else [])}
    return Component(folder, variant, tuple(sorted(used)), source.commit)


def single_file(source: Source, name: str, config: Component | None = None) -> Component:
    """A part in one file, which the caller has looked into."""
    return Component(source.root, None, (name,), source.commit, "single_file", config)


def only_config(source: Source, part: str) -> Component:
    """The `config.json` of a network whose weights are elsewhere.

    Raises:
        ConfigError: there is none.
    """
    return plain(source, part, (CONFIG,))


def header(part: Component) -> safetensors.Header:
    """The tensors of all its safetensors files together."""
    found = [safetensors.read(part.folder / name) for name in part.files if name.endswith(safetensors.SUFFIX)]
    shapes = {name: shape for each in found for name, shape in each.shapes.items()}
    return safetensors.Header(found[0].path, shapes)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        ConfigError: it does not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as err:
        raise ConfigError(f"cannot read {path}: {err}") from err
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content


def sha256_of(path: Path) -> str:
    """The file's sha256, 64 hexadecimal digits; read once as long as its size and time stay."""
    stat = path.stat()
    return _hash_file(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash_file(path: Path, size: int, modified_ns: int) -> str:
    """The file's sha256. Size and time are in the key only, so that a changed file is read again."""
    del size, modified_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why_no_weights(source: Source, folder: Path, wanted: str) -> str:
    message = f"{source.named} has no {wanted}"
    others = sorted(path.name for path in folder.glob(f"*{safetensors.SUFFIX}"))
    if others:
        return f"{message}, but {', '.join(others)}; set or leave out the variant in the config"
    pickles = sorted(path.name for ending in safetensors.PICKLED for path in folder.glob(f"*{ending}"))
    found = f", only {', '.join(pickles)}" if pickles else ""
    return (
        f"{message}{found}; pickled weights are refused, as opening them runs their code. "
        "Convert them to safetensors, or name a checkpoint that has them"
    )
