"""Clips to measure: frames of a file are those that were generated, times what was interpolated."""

import pytest

from pia_batch.evaluation.clips import cond_frame, prompt_keys
from pia_batch.schema.columns import Row

PROMPTS = [{"frame": 8, "prompt": "winter"}, {"frame": 0, "prompt": "spring"}]


@pytest.mark.parametrize(("row", "times"), [({}, 1), ({"interpolate": None}, 1), ({"interpolate": 3}, 3)])
def test_frames_of_settings_become_frames_of_the_file(row: Row, times: int) -> None:
    assert prompt_keys(row | {"prompt": None, "prompts": PROMPTS}) == [(0, "spring"), (8 * times, "winter")]
    assert prompt_keys(row | {"prompt": "spring"}) == [(0, "spring")]
    assert cond_frame(row | {"cond_frame": 5}) == 5 * times
    assert cond_frame(row | {"cond_frame": None}) == cond_frame(row) == 0
