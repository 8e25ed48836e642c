"""A whole run on a real Ray with the embedded model: clips are enlarged, interpolated, published and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import pyarrow.parquet as pq
import pytest
from inputs import requests_table
from upscalers import save

from pia_batch.config import RunConfig
from pia_batch.driver import run as driver_run
from pia_batch.planning.plan import make_plan

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("local_ray")]


def test_clips_are_enlarged_and_interpolated_and_a_run_resumes(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    model = save(tmp_path / "upscaler" / "x2.safetensors", "Compact x2")
    table = requests_table(2, num_frames=[4, 4], interpolate=[2, 2])
    config = make_config(table, upscale__model=str(model), defaults__num_inference_steps=2)

    first = driver_run.run(config.model_copy(update={"budget": config.budget.model_copy(update={"limit": 1})}))
    second = driver_run.run(config)
    third = driver_run.run(config)

    assert [each.computed for each in (first, second, third)] == [1, 1, 0]
    assert (second.succeeded, second.failed) == (2, 0)
    for row in pq.read_table(f"{config.output}/results/{second.run_id}").to_pylist():
        sizes = {name: row[name] for name in ("width", "height", "num_frames", "upscale", "interpolate")}
        assert sizes == {"width": 128, "height": 128, "num_frames": 7, "upscale": 2, "interpolate": 2}
        video = cv2.VideoCapture(row["animation_uri"].removeprefix("file://"), cv2.CAP_FFMPEG)
        assert {video.read()[1].shape for _ in range(7)} == {(128, 128, 3)}
        assert not video.read()[0]
    without = make_config(table, defaults__num_inference_steps=2)
    assert make_plan(without).num_pending == 2  # the network is part of the keys
