"""Repair of animations that a store does not find, and lists all the same."""

from __future__ import annotations

import pytest
from finished_outputs import make_output

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
