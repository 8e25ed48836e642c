"""What an operator wrote, as a tree: YAML read, dotted keys set, one layer laid over another."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pia_batch import tiny
from pia_batch.config.models import EMBEDDED, ModelConfig
from pia_batch.errors import ConfigError, message_of

_MANIFESTS = (".parquet", ".pq", ".jsonl", ".ndjson", ".csv")


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a config file; without those that are null.

    Raises:
        ConfigError: it cannot be read, is no YAML in UTF-8, has a key twice, or is not a mapping.
    """
    if path.suffix.lower() in _MANIFESTS:
        msg = f"{path} is the name of a manifest, not of a config in YAML; write --manifest {path}"
        raise ConfigError(msg)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as err:
        msg = f"cannot read config {path}: {err.strerror}; give a YAML file, or --manifest and --output alone"
        raise ConfigError(msg) from None
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        expected = f"{err.context}, " if (err.context or "").startswith("expected") else ""
        problem = expected + (err.problem or err.context or "")
        msg = f"cannot read config {path}{where}: {problem}; correct the YAML there, or just before"
        raise ConfigError(msg) from None
    except (UnicodeDecodeError, yaml.YAMLError) as err:
        msg = f"cannot read config {path}: {message_of(err)}; it must be YAML in UTF-8"
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


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: YAML forbids it, and PyYAML keeps the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As SafeLoader, once all keys are known to differ.

        Raises:
            ConstructorError: two are the same.
        """
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in lines:
                problem = f"the key {key.value!r} stands in line {lines[key.value]} already"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def assign(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set a key such as `placement.batch_size` in the tree, with the sections above it.

    Raises:
        ConfigError: what stands above it is not a section.
    """
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = tree[name] = {} if tree.get(name) is None else tree[name]
        if not isinstance(child, dict):
            msg = f"cannot set {dotted}: {name} is a value, not a section; correct the one or the other"
            raise ConfigError(msg)
        tree = child
    tree[leaf] = value


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with `over` laid over it, section by section."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def complete(name: object, entry: object, default: object) -> object:
    """An entry of `models`, with what it leaves out as in `model`; what cannot be one is left to pydantic."""
    if isinstance(entry, ModelConfig):
        return entry.model_copy(update={"name": name})
    if not isinstance(default, dict) or not isinstance(entry, dict | None):
        return entry
    entry = entry or {}
    if entry.get("base") == EMBEDDED:
        entry = merge(tiny.defaults()["model"], entry)
    replaced = {key for part, keys in _BELONGS_TO.items() if part in entry for key in keys}
    return merge({key: value for key, value in default.items() if key not in replaced}, entry) | {"name": name}


_BELONGS_TO = {
    "base": ("revision", "variant", "config", "sha256"),
    "motion_adapter": ("motion_adapter_revision", "motion_adapter_variant"),
    "vae": ("vae_revision",),
}
"""What an entry of `models` does not take over along with weights that it replaces."""
