"""Repair of animations that a store does not find, and lists all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished_outputs import make_output
from journals import outages

from pia_batch.errors import StorageError
from pia_batch.journal.log import Journal
from pia_batch.journal.verify import Problem, find_problems, repair
from pia_batch.storage.object_store import Store


class Gateway(Store):
    """Answers as a gateway whose store is down for a while: one object is not found."""

    lost = ""

    def read(self, name: str) -> bytes:
        if name == self.lost:
            raise FileNotFoundError(name)
        return super().read(name)


def problems_of(journal: Journal) -> list[Problem]:
    return list(find_problems(journal, journal.outcomes(), lambda *_: None, lambda *_: None))


def test_an_animation_that_is_listed_is_not_taken_for_a_missing_one(store: Store) -> None:
    make_output(store, ["gif", "mp4"])
    gateway = Gateway(store.uri)
    journal = Journal(gateway)
    gateway.lost = next(item.name for item in store.list("animations/") if item.name.endswith("mp4"))
    before = {item.name for item in store.list("")}
    found = problems_of(journal)
    assert [problem.kind for problem in found] == ["missing"]

    with pytest.raises(StorageError, match=r"mp4: the store answered that it does not exist, and now lists it; noth"):
        repair(journal, journal.outcomes(), found, lambda: None)
    assert {item.name for item in store.list("")} == before

    store.delete(gateway.lost)
    repair(journal, journal.outcomes(), problems_of(journal), lambda: None)
    assert journal.outcomes().needs_regeneration == 1
    assert problems_of(journal) == []


def test_an_outage_at_any_request_of_a_repair_loses_nothing_and_the_next_one_ends_it(
    store: Store, tmp_path: Path
) -> None:
    make_output(store, ["gif", "mp4", "mp4"], posters=[2])
    valid, *broken = sorted(
        (item.name for item in store.list("animations/") if not item.name.endswith("jpg")),
        key=lambda name: name.endswith("mp4"),
    )
    store.replace(broken[0], b"damaged")
    store.delete(broken[1])
    before = store.read(valid)

    def repaired(store: Store) -> None:
        journal = Journal(store)
        repair(journal, journal.outcomes(), problems_of(journal), lambda: None)

    for copy in outages(store, tmp_path / "copies", repaired):
        repaired(copy)
        journal = Journal(copy)
        assert problems_of(journal) == []
        assert journal.outcomes().needs_regeneration == 2
        assert copy.read(valid) == before
