"""Motion curves against the pipeline's own, and what must hold where the pipeline has none."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import pytest
from diffusers.pipelines.deprecated.pia import pipeline_pia
from hypothesis import given
from hypothesis import strategies as st
from pipelines import shot

from pia_batch.engine.motion import motion_coefficients

PLAIN = shot()
FRAMES = st.integers(1, 32)
CLIPS = FRAMES.flatmap(lambda frames: st.tuples(st.just(frames), st.integers(0, frames - 1)))
"""Numbers of frames, each with a frame of that clip."""


def curve(**settings: Any) -> tuple[float, ...]:
    return motion_coefficients(dataclasses.replace(PLAIN, **settings))


@given(CLIPS, st.integers(0, 8))
def test_presets_are_those_of_the_pipeline_at_any_length_and_from_any_frame(clip, motion_scale):
    frames, cond_frame = clip
    expected = pipeline_pia.prepare_mask_coef_by_statistics(frames, cond_frame, motion_scale)

    assert list(curve(num_frames=frames, cond_frame=cond_frame, motion_scale=motion_scale)) == expected


@pytest.mark.parametrize("motion_scale", range(6))
def test_a_loop_of_sixteen_frames_is_the_preset_of_its_size(motion_scale):
    loop = curve(num_frames=16, loop=True, motion_scale=motion_scale)

    assert list(loop) == pipeline_pia.RANGE_list[3 + motion_scale % 3]


@pytest.mark.parametrize("motion_scale", range(3))
def test_a_longer_loop_goes_through_every_value_of_the_preset(motion_scale):
    loop = curve(num_frames=31, loop=True, motion_scale=motion_scale)

    assert list(loop[::2]) == pipeline_pia.RANGE_list[3 + motion_scale]
    for before, between, after in zip(loop[:-2:2], loop[1::2], loop[2::2], strict=True):
        assert between == pytest.approx((before + after) / 2)


@given(CLIPS, st.integers(0, 5))
def test_a_loop_closes_from_any_frame_and_is_most_like_the_image_there(clip, motion_scale):
    frames, cond_frame = clip
    preset = pipeline_pia.RANGE_list[3 + motion_scale % 3]

    loop = curve(num_frames=frames, cond_frame=cond_frame, loop=True, motion_scale=motion_scale)

    assert loop[0] == loop[-1]
    assert loop[cond_frame] == 1.0
    assert all(min(preset) - 1e-12 <= value <= 1.0 for value in loop)


@given(FRAMES, st.integers(0, 5))
def test_a_loop_leaves_the_image_and_comes_back_without_turning_on_the_way(frames, motion_scale):
    loop = [round(value, 12) for value in curve(num_frames=frames, loop=True, motion_scale=motion_scale)]
    lowest = loop.index(min(loop))

    assert loop[: lowest + 1] == sorted(loop[: lowest + 1], reverse=True)
    assert loop[lowest:] == sorted(loop[lowest:])


@given(CLIPS, st.integers(0, 5))
def test_a_loop_from_another_frame_is_the_same_loop_turned(clip, motion_scale):
    frames, cond_frame = clip
    first = curve(num_frames=frames, loop=True, motion_scale=motion_scale)
    turned = curve(num_frames=frames, cond_frame=cond_frame, loop=True, motion_scale=motion_scale)

    one_turn = deque(first[:-1])
    one_turn.rotate(cond_frame)
    assert turned[:-1] == tuple(one_turn)


@given(CLIPS, st.sampled_from([0, 1, 2, 6, 7, 8]))
def test_what_does_not_loop_grows_less_like_the_image_with_the_distance_on_both_sides(clip, motion_scale):
    frames, cond_frame = clip

    values = curve(num_frames=frames, cond_frame=cond_frame, motion_scale=motion_scale)
    before, after = values[cond_frame::-1], values[cond_frame:]

    assert list(before) == sorted(before, reverse=True)
    assert list(after) == sorted(after, reverse=True)
    common = min(len(before), len(after))
    assert before[:common] == after[:common]


@given(CLIPS, st.lists(st.floats(0, 1), min_size=1, max_size=32).map(tuple), st.integers(0, 8), st.booleans())
def test_a_curve_of_ones_own_goes_by_distance_ends_in_its_last_value_and_overrides_scale_and_loop(
    clip, own, motion_scale, loop
):
    frames, cond_frame = clip

    values = curve(num_frames=frames, cond_frame=cond_frame, motion_curve=own, motion_scale=motion_scale, loop=loop)

    padded = own + own[-1:] * frames
    assert values == tuple(padded[abs(frame - cond_frame)] for frame in range(frames))


@pytest.mark.parametrize("motion_scale", range(6))
def test_a_clip_of_one_or_two_frames_that_loops_is_the_image(motion_scale):
    assert curve(num_frames=1, loop=True, motion_scale=motion_scale) == (1.0,)
    assert curve(num_frames=2, loop=True, motion_scale=motion_scale) == (1.0, 1.0)
