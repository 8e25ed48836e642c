"""Index of weights in several files: the names of its shards, all of which must be in its own folder. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pia_batch.errors import ConfigError, printable
from pia_batch.weights import safetensors

_LONGEST_NAME = 255
"""Bytes of the longest file name that the file systems of Linux, macOS and Windows take."""

_MOST_SHOWN = 100
_MOST_LISTED = 3


def find(folder: Path, stem: str, variant: str | None, single: str) -> Path | None:
    """Return the index of weights in a folder, or None.

    Args:
        folder: Folder of the network.
        stem: File name stem of the weights.
        variant: Variant of the weights, or None.
        single: Name of the file that has all weights; the index of old releases counts only without that file.

    Sources: transformers and diffusers `_add_variant`; diffusers 0.42.1 `_fetch_index_file_legacy`.
    """
    index = folder / f"{stem}.safetensors.index{'' if variant is None else f'.{variant}'}.json"
    if index.is_file():
        return index
    old = folder / f"{stem}.safetensors.{variant}.index.json"
    return old if variant is not None and old.is_file() and not (folder / single).is_file() else None


def shards(index: Mapping[str, Any], path: Path) -> set[str]:
    """Return the file names of the shards that an index names.

    Args:
        index: Content of the index.
        path: Path of the index, for messages.

    Raises:
        ConfigError: It names none, or a file that is outside of its folder, pickled, or impossible.
    """
    held = index.get("weight_map")
    if not isinstance(held, dict) or not held:
        raise ConfigError(
            f"{path} names no shards (no tensor in weight_map): it is not the index of weights, or it is damaged; "
            "fetch it again"
        )
    found = set()
    for tensor, name in held.items():
        problem = _problem(name)
        if problem is not None:
            raise ConfigError(
                f"{path}: the shard {printable(repr(name)[:_MOST_SHOWN])} of tensor {printable(tensor[:_MOST_SHOWN])} "
                f"{problem}"
            )
        found.add(name)
    return found


def _problem(name: Any) -> str | None:
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        return "is not the name of a file; fetch the index again"
    if "/" in name or "\\" in name:
        return "is not in the folder of the index, where shards must be; move it there, and correct its name"
    if name.endswith(safetensors.PICKLED):
        return "is a pickle, which is refused, because opening it runs its code; use weights in safetensors"
    if not name.endswith(safetensors.SUFFIX):
        return f"is not a {safetensors.SUFFIX} file; fetch the index again"
    return None


def check_present(found: set[str], index: Path, single: str) -> None:
    """Check that all shards are next to their index.

    Args:
        found: File names of the shards.
        index: Path of the index.
        single: Name of the file that has all weights if there are no shards.

    Raises:
        ConfigError: A shard is missing.
    """
    missing = sorted(name for name in found if not (index.parent / name).is_file())
    if not missing:
        return
    remedy = "fetch the rest of the folder"
    if (index.parent / single).is_file():
        remedy += f", or remove the index to use {single}"
    raise ConfigError(
        f"{index}: missing shards: {len(missing)} of {len(found)} ({_listed(missing)}); the folder was not copied in "
        f"full: {remedy}"
    )


def without_index(folder: Path, stem: str, variant: str | None) -> str | None:
    """Return a message about shards of these weights that no index names, or None if there are none."""
    middle = "" if variant is None else f".{variant}"
    patterns = {f"{stem}{middle}-*-of-*.safetensors", f"{stem}-*-of-*{middle}.safetensors"}
    found = sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
    if not found:
        return None
    index = f"{stem}.safetensors.index{middle}.json"
    return f"has shards of weights ({_listed(found)}), but no index ({index}); fetch that file, too"


def _listed(found: Sequence[str]) -> str:
    more = f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    return ", ".join(found[:_MOST_LISTED]) + more
