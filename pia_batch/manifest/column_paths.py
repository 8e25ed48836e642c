"""Paths with dots into the columns of a table: the one resolver of them, and the nearest name to a mistyped one.

A source is the name of a column, or a path with dots into structs; a name that has the dots itself comes first.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pia_batch.errors import ManifestError
from pia_batch.manifest.column_layout import Path


def find_path(types: Sequence[tuple[str, pa.DataType]], source: str, place: str) -> Path | None:
    """Return the path of a source among columns or fields; None if there is none, or if it is null in every row.

    Raises:
        ManifestError: the path leads through a column that is no struct.
    """
    known = dict(types)
    if source in known:
        return (source,)
    barred = None
    for head, rest in cuts(source):
        if head not in known or pa.types.is_null(known[head]):
            continue
        if not pa.types.is_struct(known[head]):
            barred = barred or (
                f"{place}: {head!r} is {known[head]}, and only a struct has fields; name another column, or write the "
                "values as a column of their own"
            )
            continue
        below = find_path([(item.name, item.type) for item in known[head]], rest, place)
        if below is not None:
            return (head, *below)
    if barred:
        raise ManifestError(barred)
    return None


def path_of_member(members: Mapping[str, Any], source: str, barred: Callable[[str, object], None]) -> Path | None:
    """Return the path of a source in a JSON object; None if it is absent, or an object on the way is null.

    Args:
        members: Members of the object.
        source: Name of a member, or a path with dots into objects; a name that has the dots itself comes first.
        barred: Function that receives the name and the value on the way that is no object; it may raise.
    """
    if source in members:
        return (source,)
    for head, rest in cuts(source):
        value = members.get(head)
        if value is None:
            continue
        if not isinstance(value, dict):
            barred(head, value)
            continue
        below = path_of_member(value, rest, barred)
        if below is not None:
            return (head, *below)
    return None


def member_at(members: Any, path: Path) -> Any:  # any JSON value
    """Return the value at a path that `path_of_member` found."""
    for name in path:
        members = members[name]
    return members


def cuts(source: str) -> list[tuple[str, str]]:
    """Return all ways to cut a path at a dot, the longest beginning first: names may have dots themselves."""
    dots = [at for at, mark in enumerate(source) if mark == "."]
    return [(source[:at], source[at + 1 :]) for at in reversed(dots)]


def nearest(source: str, known: Sequence[str]) -> str | None:
    """Return the known path that is most like a source: as a whole, without regard to case, or in its last name."""
    lowered = {path.lower(): path for path in reversed(known)}
    leaves = {path.rpartition(".")[2]: path for path in reversed(list(lowered))}
    wanted, last = source.lower(), source.lower().rpartition(".")[2]
    if wanted not in lowered and last in leaves:
        return lowered[leaves[last]]
    found = difflib.get_close_matches(wanted, lowered, n=1, cutoff=0.6)
    found += [leaves[leaf] for leaf in difflib.get_close_matches(last, leaves, n=1, cutoff=0.6)]
    return lowered[found[0]] if found else None
