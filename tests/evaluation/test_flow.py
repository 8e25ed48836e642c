"""Measures by optical flow, of textures that move by known distances."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from evaluated import shifted, texture

from pia_batch.errors import ConfigError
from pia_batch.evaluation.flow import FlowMeasures, require_opencv


@pytest.fixture(scope="module")
def measure() -> FlowMeasures:
    return FlowMeasures()


@pytest.mark.parametrize("by", [(0, 0), (2, 1), (-3, 2), (4, 0)])
def test_a_shifted_texture_has_the_flow_of_its_shift(by: tuple[int, int], measure: FlowMeasures) -> None:
    clip = shifted(2, 128, by)
    flow = measure.flow(clip[0].mean(axis=-1).astype(np.uint8), clip[1].mean(axis=-1).astype(np.uint8))

    assert np.median(flow[..., 0]) == pytest.approx(by[0], abs=0.1)
    assert np.median(flow[..., 1]) == pytest.approx(by[1], abs=0.1)


def test_what_only_moves_has_almost_no_warp_error_and_is_smooth(measure: FlowMeasures) -> None:
    moving = measure(shifted(8, 128, (3, 2)), 8.0)
    still = measure(np.repeat(texture(128)[None], 8, axis=0), 8.0)

    step = np.abs(np.diff(shifted(8, 128, (3, 2)).astype(float), axis=0)).mean()
    assert moving["warp_error"] < 0.15 * step
    assert 1 - moving["smoothness"] < 0.15 * step / 255 * 2
    assert still == {"smoothness": 1.0, "dynamic_degree": 0.0, "warp_error": 0.0}


def test_what_changes_without_motion_has_a_warp_error(measure: FlowMeasures) -> None:
    clip = np.repeat(texture(128)[None], 6, axis=0).astype(int) // 2
    clip[1::2] += 60

    found = measure(clip.astype(np.uint8), 8.0)

    assert found["warp_error"] > 20
    assert 1 - found["smoothness"] == pytest.approx(60 / 255, abs=0.06)


@pytest.mark.parametrize(
    ("pixels", "fps", "expected"),
    [(2, 8.0, 0.0), (4, 8.0, 1.0), (4, 4.0, 0.0), (2, 16.0, 1.0), (7, 4.0, 1.0)],
)
def test_the_dynamic_degree_follows_distance_and_rate(
    pixels: int, fps: float, expected: float, measure: FlowMeasures
) -> None:
    # 128 pixels: above 3 pixels a pair at 8 frames per second; twice that at 4, half as many frames at 16.
    assert measure(shifted(8, 128, (pixels, 0)), fps)["dynamic_degree"] == expected


def test_a_quarter_of_the_pairs_decides(measure: FlowMeasures) -> None:
    still = np.repeat(shifted(1, 128)[:1], 8, axis=0)
    moves = shifted(8, 128, (6, 0))

    # Eight frames: two pairs are enough.
    assert measure(np.concatenate([moves[:2], still[:6] * 0 + moves[1]]), 8.0)["dynamic_degree"] == 0.0
    assert measure(np.concatenate([moves[:3], still[:5] * 0 + moves[2]]), 8.0)["dynamic_degree"] == 1.0


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (8, 8, 64, 3)])
def test_a_clip_that_is_too_short_or_too_small_has_no_flow(shape: tuple[int, ...], measure: FlowMeasures) -> None:
    assert set(measure(np.zeros(shape, dtype=np.uint8), 8.0).values()) == {None}


def test_the_lack_of_opencv_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=r"pia-batch\[evaluate\].*--no-flow"):
        require_opencv()
