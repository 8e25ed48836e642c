"""Seams of long clips of the embedded model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs" / "tiny"))

import seams

from pia_batch import ModelConfig, PiaEngine


def test_a_step_at_a_seam_is_told_from_one_inside() -> None:
    shot = seams.scene("moving", 1, context="windows", context_overlap=0)
    frames = np.zeros((48, 2, 2, 3), np.uint8)
    for frame in range(1, 48):
        frames[frame] = frames[frame - 1] + (3 if frame in (16, 32) else 1)

    assert seams.seams(shot) == {16, 32}
    assert seams.ratio([(shot, frames)]) == pytest.approx(3.0)


@pytest.mark.long
@pytest.mark.slow
def test_overlapping_windows_have_no_seams_where_something_moves_and_windows_without_overlap_have() -> None:
    shots = {
        overlap: [seams.scene(name, 1, context="windows", context_overlap=overlap) for name in ("moving", "growing")]
        for overlap in (0, 4)
    }
    clips = iter(PiaEngine.load(ModelConfig()).animate([shot for each in shots.values() for shot in each]))
    ratios = {overlap: seams.ratio((shot, next(clips).frames) for shot in each) for overlap, each in shots.items()}

    assert ratios[4] <= 1.1
    assert ratios[0] >= 1.5
