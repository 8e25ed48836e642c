"""Verification and repair: compares the animations of an output with their results, and has broken ones regenerated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pia_batch.errors import RequestError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal, Outcomes
from pia_batch.schema.keys import keys_from_hex
from pia_batch.storage.object_store import Store

VERIFY_THREADS = 16
"""Animations that `find_problems` reads and decodes at a time; each is a few MB."""


@dataclass(frozen=True)
class Problem:
    """A difference between an animation and its result.

    Attributes:
        key: Key of the request.
        request_id: Id of the request.
        animation_uri: URI of the animation when it was committed.
        name: Name of the object under the output, which may have been moved since.
        kind: One of PROBLEMS.
        detail: Particulars, in words.
    """

    key: str
    request_id: str
    animation_uri: str
    name: str
    kind: str
    detail: str


PROBLEMS = {
    "missing": "the object does not exist",
    "size": "the object has another size than was committed",
    "content": "the object has other bytes than were committed",
    "undecodable": "the object does not decode, or has other frames than its result states",
}
"""Problems that an animation can have, in the order of the checks."""


def find_problems(
    journal: Journal,
    outcomes: Outcomes,
    decode: Callable[[bytes, dict[str, Any]], object],
    on_examined: Callable[[], None] = lambda: None,
) -> Iterator[Problem]:
    """Read every succeeded animation and compare it with its result row, VERIFY_THREADS of them at a time.

    Args:
        journal: Journal of the output.
        outcomes: Its current outcomes.
        decode: Function that raises RequestError if bytes do not decode to what their result row states.
        on_examined: Function to call after each animation, valid or not.

    Raises:
        StorageError: the store refused the request or did not answer, which is not a problem of an animation.
    """
    rows = (
        row
        for table in journal.winning_rows(outcomes.of(outcomes.succeeded_keys))
        for row in table.select(_EXAMINED).to_pylist()
    )
    for found in journal.store.each(lambda row: _examine(journal.store, row, decode), rows, VERIFY_THREADS):
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
    """
    broken = list(problems)
    for problem in broken:
        check()
        if problem.kind != "missing":
            journal.store.delete(problem.name)
    check()
    journal.add_tombstones(keys_from_hex(pa.array([problem.key for problem in broken], pa.string())), seen)


def _examine(store: Store, row: dict[str, Any], decode: Callable[[bytes, dict[str, Any]], object]) -> Problem | None:
    name = layout.animation_name_in(row["animation_uri"])

    def problem(kind: str, detail: str) -> Problem:
        return Problem(row["key"], row["request_id"], row["animation_uri"], name, kind, detail)

    try:
        data = store.read(name)
    except FileNotFoundError:
        return problem("missing", "it does not exist")
    if len(data) != row["num_bytes"]:
        return problem("size", f"it has {len(data)} bytes, its result states {row['num_bytes']}")
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return problem("content", "its bytes are not those that were committed")
    try:
        decode(data, row)
    except RequestError as err:
        return problem("undecodable", str(err))
    return None


_EXAMINED = ["key", "request_id", "animation_uri", "num_bytes", "sha256", "format", "width", "height", "num_frames"]
