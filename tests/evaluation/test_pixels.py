"""Measures of frames alone, against formulas in floating point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.evaluation.pixels import pixel_measures


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
def test_every_measure_is_its_formula(seed: int, num_frames: int, height: int, width: int) -> None:
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    x = frames.astype(np.float64)

    found = pixel_measures(frames)

    flicker = 1 - np.abs(x[1:] - x[:-1]).mean() / 255 if num_frames > 1 else None
    second = np.abs(x[2:] - 2 * x[1:-1] + x[:-2]).mean() if num_frames > 2 else None
    gap = np.abs(x[-1] - x[0]).mean() if num_frames > 1 else None
    assert found == {
        "flicker": flicker if flicker is None else pytest.approx(flicker),
        "second_difference": second if second is None else pytest.approx(second),
        "loop_gap": gap if gap is None else pytest.approx(gap),
    }


def test_a_known_flicker_is_found() -> None:
    frames = np.full((9, 16, 16, 3), 100, dtype=np.uint8)
    frames[1::2] = 151  # 51 of 255 at every step

    assert pixel_measures(frames) == {"flicker": 0.8, "second_difference": 102.0, "loop_gap": 0.0}


def test_a_steady_change_has_no_second_difference() -> None:
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full((9, 8, 8, 3), 10, dtype=np.uint8)

    assert pixel_measures(frames) == {"flicker": pytest.approx(245 / 255), "second_difference": 0.0, "loop_gap": 80.0}


def test_a_loop_that_closes_has_a_small_gap() -> None:
    turns = np.array([0, 40, 80, 40], dtype=np.uint8)
    closed = np.broadcast_to(turns[:, None, None, None], (4, 8, 8, 3)).copy()

    assert pixel_measures(closed)["loop_gap"] == 40.0
    assert pixel_measures(np.concatenate([closed, closed[:1]]))["loop_gap"] == 0.0
