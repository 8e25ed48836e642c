"""Folders named as Hive and Spark name them: partitions in `name=value`, and files that are hidden."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""Value in the name of a partition's folder that means null."""


def partitions_in(folders: Iterable[str]) -> dict[str, str | None]:
    """Return the partitions that the folders of a file name: {"dt": "2026-11-22"} for `dt=2026-11-22`.

    Names and values are percent-encoded, as writers do; what is no such encoding of UTF-8 stays as it is.
    """
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    return {_decoded(name): None if value == NULL_PARTITION else _decoded(value) for name, value in pairs}


def is_hidden(parts: Iterable[str]) -> bool:
    """Return True if a path below a manifest's folder has a part that readers skip.

    These are names that begin with a dot, or with an underscore, except partitions by a column of such a name.
    """
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text
