"""Component: one part of a model, with its files, its identity, and checks that the files are complete and safe."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pia_batch.errors import ConfigError, environment_remedy, problem_of
from pia_batch.storage import file_kinds
from pia_batch.weights import safetensors, shard_index
from pia_batch.weights.fetching import FetchedFolder, Location

MODEL, DIFFUSION_MODEL = "model", "diffusion_pytorch_model"
"""File name stems of weights in a folder, by transformers and by diffusers."""

CONFIG = "config.json"


@dataclass(frozen=True)
class Component:
    """One part of a model on this machine.

    Attributes:
        folder: Folder of its files.
        variant: Variant, such as `fp16` in `diffusion_pytorch_model.fp16.safetensors`; None: no variant.
        files: Used files, relative to `folder`, sorted.
        commit: Hub commit of the files; None if they are not from the hub.
        layout: `diffusers`: a folder that diffusers or transformers load; `single_file`: exactly one safetensors file,
            which may contain more than this part.
        config: Component with the `config.json` of a network in a single file; None: it is in `folder`, or not needed.
        changes: Settings of that config that are others in the file itself, with their values.
    """

    folder: Path
    variant: str | None
    files: tuple[str, ...]
    commit: str | None
    layout: Literal["diffusers", "single_file"] = "diffusers"
    config: Component | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def path(self) -> Path:
        """Path of the file of a `single_file` component."""
        (name,) = self.files
        return self.folder / name

    @property
    def settings(self) -> dict[str, Any]:
        """Content of its `config.json`, with `changes`.

        Raises:
            ConfigError: There is no such file, or it is invalid.
        """
        return read_json((self.folder if self.config is None else self.config.folder) / CONFIG) | dict(self.changes)

    def identity(self) -> dict[str, Any]:
        """Return the identity, equal for equal weights: the hub commit, else the sha256 of every used file."""
        if self.layout == "single_file":
            held = {"sha256": sha256_of(self.path)} if self.commit is None else {"commit": self.commit}
            file = {} if self.commit is None else {"file": self.files[0]}
            return held | file | ({} if self.config is None else {"config": self.config.identity()})
        if self.commit is not None:
            return {"commit": self.commit, "variant": self.variant}
        return {name: sha256_of(self.folder / name) for name in self.files}


def patterns(prefix: str, variant: str | None) -> list[str]:
    """Return the file patterns of a part: configs, and the weights of one variant, in one file or in shards."""
    middle = "" if variant is None else f".{variant}"
    ends = (f"{middle}.safetensors", f"{middle}-*-of-*.safetensors", f"-*-of-*{middle}.safetensors")
    return [f"{prefix}*.json", *(f"{prefix}{stem}{end}" for stem in (MODEL, DIFFUSION_MODEL) for end in ends)]


def plain(source: FetchedFolder, part: str, names: tuple[str, ...]) -> Component:
    """Return a part without weights, with those files of `names` that exist.

    Raises:
        ConfigError: None of the files exists.
    """
    folder = source.root / part
    files = tuple(sorted(name for name in names if (folder / name).is_file()))
    if not files:
        raise ConfigError(_why_no_part(source, f"{part}/{names[0]}"))
    return Component(folder, None, files, source.commit)


def weighted(source: FetchedFolder, part: str, stem: str, variant: str | None) -> Component:
    """Return a network in a folder: its `config.json` and its weights, in one file or in shards.

    Args:
        source: Folder on this machine that contains the part.
        part: Name of the part's folder; empty: `source` itself.
        stem: File name stem of the weights: `MODEL` or `DIFFUSION_MODEL`.
        variant: Variant, as in `Component`.

    Raises:
        ConfigError: A file is missing, pickled or truncated.
    """
    folder = source.root / part
    label = f"{part}/" if part else ""
    if not (folder / CONFIG).is_file():
        raise ConfigError(_why_no_part(source, f"{label}{CONFIG}"))
    middle = "" if variant is None else f".{variant}"
    single = f"{stem}{middle}.safetensors"
    index = shard_index.find(folder, stem, variant, single)
    names = {single} if index is None else shard_index.shards(read_json(index), index)
    if index is not None:
        shard_index.check_present(names, index, single)
    elif not (folder / single).is_file():
        raise ConfigError(_why_no_weights(source, folder, stem, variant, f"{label}{single}"))
    for name in names:
        safetensors.read(folder / name)
    used = {CONFIG, *names, *([] if index is None else [index.name])}
    return Component(folder, variant, tuple(sorted(used)), source.commit)


def plain_or_only_variant(location: Location, part: str, stem: str, key: str) -> Component:
    """Fetch a network in a folder without variant, or in its only variant if it has no other weights.

    Args:
        location: Location of the folder.
        part: Name of the folder in `location`; empty: `location` itself.
        stem: File name stem of the weights, as in `weighted`.
        key: Key of the config, for messages.

    Raises:
        ConfigError: A reason of `weighted`, or there are several variants to choose from.
        StorageError: An object store refused or did not answer.
    """
    prefix = f"{part}/" if part else ""
    source = location.fetch(patterns(prefix, None))
    if None in variants(source, part, stem):
        return weighted(source, part, stem, None)
    held = _variants_of((name.removeprefix(prefix) for name in location.names() if name.startswith(prefix)), stem)
    found = sorted(each for each in held if each is not None)
    if len(found) > 1:
        raise ConfigError(
            f"{key}: {source.named} has only weights of the variants {', '.join(found)}; name the file of one, such as "
            f"{prefix}{stem}.{found[0]}{safetensors.SUFFIX}"
        )
    variant = found[0] if found else None
    return weighted(location.fetch(patterns(prefix, variant)), part, stem, variant)


def variants(source: FetchedFolder, part: str, stem: str) -> set[str | None]:
    """Return the variants of a network's weights in a folder on this machine; None: without variant."""
    return _variants_of((path.name for path in (source.root / part).glob("*")), stem)


def _variants_of(names: Iterable[str], stem: str) -> set[str | None]:
    shard = r"(?:-\d+-of-\d+)?"
    ending = re.escape(safetensors.SUFFIX)
    pattern = re.compile(rf"{re.escape(stem)}(?:\.([^./]+?))?{shard}(?:\.([^./]+))?{ending}")
    return {match[1] or match[2] for match in map(pattern.fullmatch, names) if match is not None}


def single_file(source: FetchedFolder, name: str, config: Component | None = None) -> Component:
    """Return a part in one file, which the caller has checked."""
    return Component(source.root, None, (name,), source.commit, "single_file", config)


def only_config(source: FetchedFolder, part: str) -> Component:
    """Return the `config.json` of a network whose weights are in another location.

    Raises:
        ConfigError: There is no such file.
    """
    return plain(source, part, (CONFIG,))


def header(part: Component) -> safetensors.SafetensorsHeader:
    """Return the merged header of all its safetensors files."""
    found = [safetensors.read(part.folder / name) for name in part.files if name.endswith(safetensors.SUFFIX)]
    shapes = {name: shape for each in found for name, shape in each.shapes.items()}
    dtypes = {name: dtype for each in found for name, dtype in each.dtypes.items()}
    return safetensors.SafetensorsHeader(found[0].path, shapes, dtypes, found[0].metadata)


def read_text(path: Path) -> str:
    """Read a file of text in UTF-8.

    Raises:
        ConfigError: The file cannot be read, is empty, or is a file of another kind; the message names that kind.
    """
    try:
        content = path.read_bytes()
    except OSError as err:
        remedy = environment_remedy(err) or "correct the path, or fetch the file again"
        raise ConfigError(f"cannot read {path}: {problem_of(err)}; {remedy}") from err
    head = content[: file_kinds.HEAD_BYTES]
    found = file_kinds.identify(head)
    if found is not None:
        raise ConfigError(f"{path} is {found.what}; {safetensors.REMEDIES[found.group]}")
    if not content.strip():
        raise ConfigError(f"{path} is empty; fetch the file again")
    if not any(content):
        raise ConfigError(f"{path} holds only zeros, as an interrupted copy leaves them; fetch the file again")
    wide = file_kinds.wide_encoding(head)
    if wide is not None or content.startswith(codecs.BOM_UTF8):
        raise ConfigError(f"{path} is text in {wide or 'UTF-8 with a byte order mark'}; save it as UTF-8 without one")
    try:
        return content.decode()
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} is not text in UTF-8 ({err}); fetch the file again") from err


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Raises:
        ConfigError: The file cannot be read, or does not contain a JSON object; the message names what it is.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as err:
        where = "it ends early" if isinstance(err, json.JSONDecodeError) and err.pos >= len(text.rstrip()) else err
        raise ConfigError(f"{path} is not JSON, or was cut short ({where}); fetch the file again") from err
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not contain a JSON object (got {type(content).__name__}); fetch the file again")
    return content


def sha256_of(path: Path) -> str:
    """Return the file's sha256, 64 hexadecimal digits; cached as long as size and modification time stay the same."""
    stat = path.stat()
    return _hash_file(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash_file(path: Path, size: int, modified_ns: int) -> str:
    """Return the file's sha256. Size and time are cache keys only, so that a changed file is read again."""
    del size, modified_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why_no_part(source: FetchedFolder, wanted: str) -> str:
    """Return a message about a folder without a part, whose parent or whose own folder may be the one to name."""
    inner = [part for part in _PARTS if CONFIG in source.names(part)]
    if wanted == CONFIG and inner:
        return f"{source.named} has no {CONFIG}, but the folders {', '.join(inner)}; name the one of the network"
    if wanted != CONFIG and CONFIG in source.names(""):
        return f"{source.named} has no {wanted}: it is the folder of one network; name the folder that has all parts"
    return f"{source.named} has no {wanted}; it is not a complete diffusers checkpoint: fetch the rest of the folder"


_PARTS = ("unet", "vae", "text_encoder", "motion_adapter", "image_encoder")
"""Folders of networks inside the folders of pipelines and IP-Adapters."""


def _other_network(folder: Path, stem: str) -> str | None:
    """Return the class of a config of the other library than the one whose weights have this stem, or None."""
    settings = read_json(folder / CONFIG)
    of_diffusers, named = settings.get("_class_name"), settings.get("architectures")
    if stem == MODEL:
        return None if of_diffusers is None else str(of_diffusers)
    named = named[0] if isinstance(named, list) and named else settings.get("model_type")
    return None if of_diffusers is not None or named is None else str(named)


def _why_no_weights(source: FetchedFolder, folder: Path, stem: str, variant: str | None, wanted: str) -> str:
    scattered = shard_index.without_index(folder, stem, variant)
    if scattered is not None:
        return f"{folder} {scattered}"
    path = source.root / wanted
    if path.is_symlink() or path.exists():
        what = f"is a link to {path.readlink()}, which is missing" if path.is_symlink() else "is no file"
        return f"{path} {what}; copy the file itself there, or fetch the folder again"
    message = f"{source.named} has no {wanted}"
    other = _other_network(folder, stem)
    if other is not None:
        return f"{message}: its {CONFIG} is of a {other}; name the folder of the right network"
    names = source.names(PurePosixPath(wanted).parent.as_posix())
    others = [name for name in names if name.endswith(safetensors.SUFFIX)]
    if others:
        remedy = "set or leave out the variant in the config"
        if not _variants_of(others, stem):
            remedy = f"give the one to use the name {path.name}"
        return f"{message}, but {', '.join(others)}; {remedy}"
    pickles = [name for name in names if name.lower().endswith(safetensors.PICKLED)]
    if pickles:
        return (
            f"{message}, only {', '.join(pickles)}; pickled weights are refused, because opening them runs their code. "
            "Convert them to safetensors, or use a checkpoint that has safetensors"
        )
    foreign = [name for name in names if name.lower().endswith(_OTHER_FORMATS)]
    found = f", only {', '.join(foreign)}" if foreign else ""
    return f"{message}{found}; fetch the folder again, or use a checkpoint that has weights in safetensors"


_OTHER_FORMATS = (".gguf", ".h5", ".mlpackage", ".msgpack", ".onnx", ".onnx_data", ".pb", ".tflite")
"""Suffixes of weights that other programs read."""
