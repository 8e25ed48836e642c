"""Verification and repair: compares animations and posters with their results, and has broken ones regenerated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pia_batch.errors import RequestError, StorageError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal, Outcomes
from pia_batch.schema.columns import RESULT, conformed
from pia_batch.schema.keys import keys_from_hex
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri

VERIFY_THREADS = 16
"""Animations that `find_problems` reads and decodes at a time; each is a few MB."""


@dataclass(frozen=True)
class Problem:
    """A difference between an animation, or its poster, and their result.

    Attributes:
        key: Key of the request.
        request_id: Id of the request.
        uri: URI of the object when it was committed.
        names: Names of the objects under the output that are of no use, which may have been moved since: the broken
            one, and the poster of a broken animation.
        kind: One of PROBLEMS.
        detail: Particulars, in words.
    """

    key: str
    request_id: str
    uri: str
    names: tuple[str, ...]
    kind: str
    detail: str


PROBLEMS = {
    "missing": "the object does not exist",
    "size": "the object has another size than was committed",
    "content": "the object has other bytes than were committed",
    "undecodable": "the object does not decode, or has other frames than its result states",
}
"""Problems that an animation or a poster can have, in the order of the checks."""

Decode = Callable[[bytes, dict[str, Any]], object]
"""Function that raises RequestError if bytes do not decode to what their result row states."""


def find_problems(
    journal: Journal,
    outcomes: Outcomes,
    decode: Decode,
    decode_poster: Decode,
    on_examined: Callable[[], None] = lambda: None,
) -> Iterator[Problem]:
    """Read every succeeded animation with its poster and compare them with their result row, at most one problem each.

    VERIFY_THREADS of them are read at a time.

    Args:
        journal: Journal of the output.
        outcomes: Its current outcomes.
        decode: Decoder of animations.
        decode_poster: Decoder of posters.
        on_examined: Function to call after each animation, valid or not.

    Raises:
        StorageError: the store refused the request or did not answer, which is not a problem of an animation.
    """
    rows = (
        row
        for table in journal.winning_rows(outcomes.of(outcomes.succeeded_keys))
        for row in conformed(table, _EXAMINED).to_pylist()
    )
    decoders = (decode, decode_poster)
    for found in journal.store.each(lambda row: _examine(journal.store, row, *decoders), rows, VERIFY_THREADS):
        on_examined()
        if found is not None:
            yield found


def repair(journal: Journal, seen: Outcomes, problems: Iterable[Problem], check: Callable[[], None]) -> None:
    """Delete what is left of broken animations, then remove their rows: the next run generates them again.

    In this order, a repair that is killed halfway leaves problems that are found again. Valid animations are not
    touched.

    Args:
        journal: Journal of the output, which no other process may use meanwhile.
        seen: Its outcomes when the problems were found.
        problems: Problems, as `find_problems` found them.
        check: Function to call before every deletion; it raises if another run has taken over.

    Raises:
        StorageError: The store now lists an object that it did not find; nothing was changed.
    """
    broken = list(problems)
    _check_missing(journal.store, {problem.names[0] for problem in broken if problem.kind == "missing"})
    for problem in broken:
        check()
        for name in problem.names:
            journal.store.delete(name)
    check()
    journal.add_tombstones(keys_from_hex(pa.array([problem.key for problem in broken], pa.string())), seen)


def _check_missing(store: Store, names: AbstractSet[str]) -> None:
    """Check that no listing has these objects. A gateway in front of a store that is down may answer 404 for each.

    Raises:
        StorageError: One is there, or the store lists nothing at all.
    """
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        found = next((item.name for item in store.list(f"{folder}/") if item.name in names), None)
        if found is not None:
            msg = (
                f"{redacted_uri(store.uri_of(found))}: the store answered that it does not exist, and now lists it; "
                "nothing was changed, start again"
            )
            raise StorageError(msg)


def _examine(store: Store, row: dict[str, Any], decode: Decode, decode_poster: Decode) -> Problem | None:
    """Return the problem of an animation, else that of its poster, else None."""
    animation = layout.animation_name_in(row["animation_uri"])
    poster = row["poster_uri"] and layout.animation_name_in(row["poster_uri"])
    found = _difference(store, animation, row["num_bytes"], row["sha256"], lambda data: decode(data, row))
    if found:
        names = (animation, poster) if poster else (animation,)
        return Problem(row["key"], row["request_id"], row["animation_uri"], names, *found)
    if poster is None:
        return None
    found = _difference(
        store, poster, row["poster_num_bytes"], row["poster_sha256"], lambda data: decode_poster(data, row)
    )
    return Problem(row["key"], row["request_id"], row["poster_uri"], (poster,), *found) if found else None


def _difference(
    store: Store, name: str, num_bytes: int, sha256: str, decode: Callable[[bytes], object]
) -> tuple[str, str] | None:
    """Return the kind and the particulars of what is wrong with an object, or None."""
    try:
        data = store.read(name)
    except FileNotFoundError:
        return "missing", "it does not exist"
    if len(data) != num_bytes:
        return "size", f"it has {len(data)} bytes, its result states {num_bytes}"
    if hashlib.sha256(data).hexdigest() != sha256:
        return "content", "its bytes are not those that were committed"
    try:
        decode(data)
    except RequestError as err:
        return "undecodable", str(err)
    return None


_EXAMINED = pa.schema(
    [
        RESULT.field(name)
        for name in (
            *("key", "request_id", "animation_uri", "num_bytes", "sha256", "format", "width", "height", "num_frames"),
            *("poster_uri", "poster_num_bytes", "poster_sha256"),
        )
    ]
)
"""Columns that are compared. Results of earlier releases have no posters."""
