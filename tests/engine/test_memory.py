"""Search for the largest batch that fits, with a device whose memory is known; and clips longer than a window."""

from __future__ import annotations

import pytest
from pipelines import build

from pia_batch.engine import PiaEngine
from pia_batch.engine.benchmark import memory

ENGINE = PiaEngine.from_pipeline(build())


class Known:
    """Meter of a device on which batches of a few rows fit."""

    def __init__(self, rows: int) -> None:
        self.rows, self.sizes = rows, iter([1, 2, 4, 3])
        self.size = 0

    def begin(self) -> None:
        self.size = next(self.sizes)

    def peak_bytes(self) -> int | None:
        return 10 * self.size

    def overflowed(self) -> bool:
        return self.size > self.rows


@pytest.mark.parametrize(("rows", "largest", "tried"), [(3, 3, 4), (2, 2, 4), (9, 4, 3), (0, 0, 1)])
def test_the_largest_batch_that_fits_is_found(rows: int, largest: int, tried: int) -> None:
    reports: list[int] = []

    found = memory.by_batch(
        ENGINE, [32], lambda it: reports.append(len(it["32"]["batches"])), frames=2, largest=4, meter=Known(rows)
    )

    assert found["32"]["largest_batch"] == largest
    assert len(found["32"]["batches"]) == tried
    assert reports == [*range(1, tried + 1), tried]
    if rows:
        assert found["32"]["batches"]["1"]["peak_bytes"] == 10


def test_batches_that_are_known_are_not_measured_again() -> None:
    known = {"32": {"largest_batch": None, "batches": {"1": {"fits": True}, "2": {"fits": False}}}}

    found = memory.by_batch(ENGINE, [32], lambda _: None, known, frames=2, largest=4, meter=Known(0))

    assert found["32"]["largest_batch"] == 1
    assert found["32"]["batches"] == known["32"]["batches"]


def test_every_way_to_generate_long_clips_is_measured() -> None:
    found = memory.long_clips(ENGINE, [14], lambda _: None, side=32, steps=1)

    assert list(found) == [
        "one window, 12 frames",
        *(f"{each}, 14 frames" for each in ("windows", "freenoise", "chain")),
    ]
    assert all(one["seconds"] > 0 and one["peak_bytes"] is None for one in found.values())
