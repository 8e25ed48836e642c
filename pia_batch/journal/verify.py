"""Whether the animations of an output are what its results say, and how what is not is drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from pia_batch.errors import RequestError
from pia_batch.journal.layout import animation_name_in
from pia_batch.journal.log import Journal, Outcomes
from pia_batch.schema.keys import keys_from_hex
from pia_batch.storage.object_store import Store

T = TypeVar("T")
V = TypeVar("V")

VERIFY_THREADS = 16
"""Animations that `verify` reads and decodes at a time; each is a few MB."""


@dataclass(frozen=True)
class Problem:
    """An animation that is not what its result says.

    Attributes:
        key: of its request.
        request_id: of its request.
        animation_uri: where it was when it was committed.
        name: the object's name in the store as it lies today.
        kind: one of PROBLEMS.
        what: the particulars, in words.
    """

    key: str
    request_id: str
    animation_uri: str
    name: str
    kind: str
    what: str


PROBLEMS = {
    "missing": "the object is not there",
    "size": "the object has another size than was committed",
    "content": "the object has other bytes than were committed",
    "undecodable": "the object does not decode, or has other frames than its result says",
}
"""What can be wrong with an animation, in the order in which it is looked at."""


def verify(
    journal: Journal,
    outcomes: Outcomes,
    decode: Callable[[bytes, dict[str, Any]], object],
    on_examined: Callable[[], None] = lambda: None,
) -> Iterator[Problem]:
    """Read every succeeded animation again and compare it with its result row, VERIFY_THREADS of them at a time.

    Args:
        journal: the journal of the output.
        outcomes: what it says now.
        decode: raises RequestError if bytes do not decode to what their result row tells.
        on_examined: called after each animation, good or not.

    Raises:
        StorageError: the store refused or did not answer; that is no problem of an animation.
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
    """Delete what is left of broken animations, then take their rows back: the next run draws them again.

    In this order a repair that is killed in between leaves what `verify` finds again. A sound animation is not touched.

    Args:
        journal: of the output, on which nobody else works now.
        seen: what it said when the problems were found.
        problems: as `verify` found them.
        check: called before every deletion; raises if another run has come.
    """
    broken = list(problems)
    for problem in broken:
        check()
        if problem.kind != "missing":
            journal.store.delete(problem.name)
    check()
    journal.withdraw(keys_from_hex(pa.array([problem.key for problem in broken], pa.string())), seen)


def _examine(store: Store, row: dict[str, Any], decode: Callable[[bytes, dict[str, Any]], object]) -> Problem | None:
    name = animation_name_in(row["animation_uri"])

    def problem(kind: str, what: str) -> Problem:
        return Problem(row["key"], row["request_id"], row["animation_uri"], name, kind, what)

    try:
        data = store.read(name)
    except FileNotFoundError:
        return problem("missing", "it is not there")
    if len(data) != row["num_bytes"]:
        return problem("size", f"it has {len(data)} bytes, its result says {row['num_bytes']}")
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return problem("content", "its bytes are not those that were committed")
    try:
        decode(data, row)
    except RequestError as err:
        return problem("undecodable", str(err))
    return None


_EXAMINED = ["key", "request_id", "animation_uri", "num_bytes", "sha256", "format", "width", "height", "num_frames"]
