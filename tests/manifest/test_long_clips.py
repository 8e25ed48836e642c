"""Checks of long clips that depend on the model: what its motion modules know, and what its speed preset keeps."""

from __future__ import annotations

from typing import Any

import pytest
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.config.model_limits import ModelLimits
from pia_batch.manifest.validation import check

PATHS = {"manifest": "m.parquet", "output": "out", "model.base": "some/model"}
LIMITS = {"short": ModelLimits(positions=24), "long": ModelLimits(positions=64)}


def checked(model: str | None = None, settings: dict[str, Any] | None = None, **columns: Any) -> Any:
    config = RunConfig.load(None, PATHS | {"models": {"short": {}, "long": {}}} | (settings or {}))
    table = requests_table(1, **{name: [value] for name, value in columns.items()}, model=[model])
    return check(table, config, dict.fromkeys(config.all_models, "e" * 32), LIMITS)


@pytest.mark.parametrize(
    ("model", "num_frames", "context"),
    [
        ("short", 24, None),
        ("short", 25, "windows"),
        (None, 32, None),
        (None, 33, "windows"),
        ("long", 64, None),
        ("long", 65, "windows"),
    ],
)
def test_windows_begin_beyond_what_the_motion_modules_of_the_rows_model_know(model, num_frames, context):
    assert checked(model, num_frames=num_frames).requests["context"].to_pylist() == [context]


def test_a_window_of_more_frames_than_the_motion_modules_know_is_refused_by_name():
    (error,) = checked("short", num_frames=40, context_length=25).rejected["error"].to_pylist()

    assert "context_length" in error
    assert "1 to 24, the frames that the motion modules know" in error
    for model, length in (("short", 24), (None, 25), ("long", 32)):
        assert not len(checked(model, num_frames=40, context_length=length).rejected)


@pytest.mark.parametrize(
    ("changed", "computed"),
    [
        ({}, 4 * 16),  # windows at 0, 11, 21 and 32
        ({"context_overlap": 8}, 5 * 16),
        ({"loop": True}, 4 * 16),  # at 0, 12, 24 and 36
        ({"loop": True, "context_overlap": 7}, 6 * 16),  # at 0, 9, ... 45
    ],
)
def test_the_features_that_a_speed_preset_keeps_count_as_memory(changed, computed):
    pixels = 512 * 512
    row = {"num_frames": 48, **changed}
    fits = pixels * (16 + computed // 16)
    fast = {"model.speed": "fast", "limits.max_call_pixels": fits}

    assert not len(checked(settings=fast, **row).rejected)
    assert not len(checked(settings=fast | {"model.speed": "exact"}, **row).rejected)
    assert not len(
        checked(settings=fast | {"limits.max_call_pixels": fits - 1, "model.speed": "exact"}, **row).rejected
    )
    (error,) = checked(settings=fast | {"limits.max_call_pixels": fits - 1}, **row).rejected["error"].to_pylist()
    assert "deep features of every window are kept; set model.speed to exact" in error
