"""Layers of a config as trees: read from YAML, set by dotted keys, merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pia_batch.config import yaml_text
from pia_batch.config.models import EMBEDDED, ModelConfig
from pia_batch.errors import ConfigError, environment_remedy, message_of
from pia_batch.storage import file_kinds

_MANIFEST = re.compile(
    r".+\.(parquet|pq|parq|jsonl|ndjson|csv|(jsonl|ndjson|json|csv)\.(gz|gzip|zst|zstd|bz2))", re.IGNORECASE
)
"""Names of manifests, which are no configs."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a config file, without those that are null.

    Raises:
        ConfigError: the file cannot be read, is not YAML in UTF-8, has a key twice, or is not a mapping.
    """
    if _MANIFEST.fullmatch(path.name):
        msg = f"{path} is a manifest, not a config in YAML; write --manifest {path}"
        raise ConfigError(msg)
    try:
        content = yaml_text.parse(_text(path.read_bytes()))
    except OSError as err:
        found = None if isinstance(err, IsADirectoryError) else environment_remedy(err)
        remedy = found or "give a YAML file, or --manifest and --output alone"
        raise ConfigError(f"cannot read config {path}: {err.strerror}; {remedy}") from None
    except UnicodeDecodeError as err:
        msg = f"cannot read config {path}: {message_of(err)}; it must be YAML in UTF-8"
        raise ConfigError(msg) from None
    except ValueError as err:
        problem = message_of(err)
        located = problem.startswith("line ")
        remedy = "correct the YAML there, or just before" if located else "it must be YAML in UTF-8"
        remedy = "write spaces in place of tabs" if r"character '\t'" in problem else remedy
        msg = f"cannot read config {path}{', ' if located else ': '}{problem}; {remedy}"
        raise ConfigError(msg) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        msg = (
            f"config {path} must be a mapping of keys to values, not {type(content).__name__}; "
            "write lines such as `manifest: requests.parquet`"
        )
        raise ConfigError(msg)
    return {key: value for key, value in content.items() if value is not None}  # a section with all lines commented out


def _text(data: bytes) -> str:
    """Return the text of a file, without its byte order marks: programs that join files leave more than one.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    wide = file_kinds.wide_encoding(data)
    if wide is not None:
        msg = f"text in {wide}"
        raise ValueError(msg)
    return data.decode().lstrip("\ufeff")


def embedded() -> dict[str, Any]:
    """Return the keys of a config that suit the embedded model, in the nesting of `RunConfig`; fresh at every call."""
    content: dict[str, Any] = yaml_text.parse(_EMBEDDED.read_text(encoding="utf-8"))
    return content


_EMBEDDED = Path(__file__).with_name("embedded.yaml")


def assign(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set a key such as `placement.batch_size` in the tree, and create the sections that contain it.

    Raises:
        ConfigError: one of these is a value, not a section.
    """
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = tree[name] = {} if tree.get(name) is None else tree[name]
        if not isinstance(child, dict):
            msg = f"cannot set {dotted}: {name} is a value, not a section; correct one of the two"
            raise ConfigError(msg)
        tree = child
    tree[leaf] = value


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `override`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def complete(name: object, entry: object, default: object) -> object:
    """Return an entry of `models` whose absent keys are those of `model`; pydantic refuses entries of other types."""
    if isinstance(entry, ModelConfig):
        return entry.model_copy(update={"name": name})
    if not isinstance(default, dict) or not isinstance(entry, dict | None):
        return entry
    entry = entry or {}
    if entry.get("base") == EMBEDDED:
        entry = merge(embedded()["model"], entry)
    replaced = {key for part, keys in _BELONGS_TO.items() if part in entry for key in keys}
    return merge({key: value for key, value in default.items() if key not in replaced}, entry) | {"name": name}


_BELONGS_TO = {
    "base": ("revision", "variant", "config", "sha256"),
    "motion_adapter": ("motion_adapter_revision", "motion_adapter_variant"),
    "vae": ("vae_revision",),
}
"""Keys that an entry of `models` does not take from `model` if it replaces the weights that they belong to."""
