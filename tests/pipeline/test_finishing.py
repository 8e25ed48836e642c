"""Clips become what their requests want stored: matched, sharpened, interpolated, in that order, frame by frame."""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from animated import animated, fetched, stored
from fakes import FakeEngine
from inputs import requests_table
from PIL import Image, ImageSequence

from pia_batch.config import RunConfig
from pia_batch.config.finishing import StoredSize, closes, generated_frames, stored_size
from pia_batch.media import codecs
from pia_batch.media.codecs import FrameStream
from pia_batch.media.finishing.color_match import ColorMatch
from pia_batch.media.finishing.interpolation import interpolated
from pia_batch.media.finishing.sharpening import sharpen
from pia_batch.media.provenance import Provenance
from pia_batch.pipeline.finishing import finish
from pia_batch.schema.columns import Row

MakeConfig = Callable[..., RunConfig]

RNG = np.random.default_rng(0)
SIDE = 48
ROW: Row = {
    "width": SIDE, "height": SIDE, "num_frames": 4, "fps": 8.0, "format": "png_zip", "motion_scale": 0, "loop": False,
    "motion_curve": None, "color_match": False, "sharpen": 0.0, "interpolate": 1,
    "upscale": 1,
}  # fmt: skip


def clip(num_frames: int = 4) -> np.ndarray:
    picture = np.repeat(np.repeat(RNG.integers(0, 256, (SIDE // 4, SIDE // 4, 3), np.uint8), 4, axis=0), 4, axis=1)
    return np.stack([np.roll(picture, 2 * t, axis=1) for t in range(num_frames)])


FRAMES = clip()
IMAGE = (FRAMES[0] // 2 + 60).astype(np.uint8)
PIXELS = {"pixels": IMAGE.tobytes()}


def test_a_clip_without_finishing_is_the_generated_one() -> None:
    finished = finish(ROW, FRAMES)

    assert finished.frames is FRAMES
    assert (finished.size, finished.seconds) == (StoredSize(SIDE, SIDE, 4, 8.0), None)


def test_frames_are_matched_then_sharpened_then_interpolated() -> None:
    finished = finish(ROW | PIXELS | {"color_match": True, "sharpen": 0.5, "interpolate": 3}, FRAMES)

    single = [sharpen(ColorMatch(IMAGE)(frame), 0.5) for frame in FRAMES]
    assert isinstance(finished.frames, FrameStream)
    assert finished.seconds == 0
    assert np.array_equal(finished.frames.array(), np.stack(list(interpolated(single, 3, closing=False))))
    assert finished.size == StoredSize(SIDE, SIDE, 10, 24.0)
    assert finished.seconds > 0


@pytest.mark.parametrize(
    ("settings", "is_loop"),
    [
        ({}, False),
        ({"motion_scale": 4, "num_frames": 16}, True),
        ({"motion_scale": 4, "num_frames": 12}, False),
        ({"motion_scale": 3, "loop": True}, True),
        ({"motion_scale": 3, "loop": True, "num_frames": 1}, False),
        ({"motion_scale": 4, "num_frames": 16, "motion_curve": [1.0]}, False),
        ({"motion_scale": 7, "num_frames": 16}, False),
    ],
)
def test_only_the_end_of_a_loop_is_followed_by_its_start(settings: Row, is_loop: bool) -> None:
    row = ROW | settings

    assert closes(row) is is_loop
    for times in (1, 2, 3, 4, None):
        size = stored_size(row | {"interpolate": times})
        assert size.num_frames == (row["num_frames"] - (0 if is_loop else 1)) * (times or 1) + (0 if is_loop else 1)
        assert size.fps == 8.0 * (times or 1)
        assert generated_frames(size.num_frames, times) == row["num_frames"]


def read(data: bytes, fmt: str) -> tuple[np.ndarray, float]:
    """Frames and rate of a file, read without this package."""
    if fmt == "png_zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".png"))
            frames = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
            return np.stack(frames), json.loads(archive.read("animation.json"))["fps"]
    if fmt in ("mp4", "webm"):
        with av.open(io.BytesIO(data)) as container:
            rate = float(container.streams.video[0].average_rate or 0)
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate
    with Image.open(io.BytesIO(data)) as file:
        shown = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(file)]
    return np.stack([frame for frame, _ in shown]), 1000 * len(shown) / sum(delay for _, delay in shown)


@pytest.mark.parametrize("fmt", codecs.CODECS)
def test_a_finished_animation_is_what_its_result_and_its_provenance_say(make_config: MakeConfig, fmt: str) -> None:
    settings: dict[str, Any] = {
        "interpolate": [2, 3, 1],
        "sharpen": [0.0, 0.5, 0.0],
        "color_match": [False, True, False],
    }
    table = requests_table(3, format=[fmt] * 3, num_frames=[4] * 3, fps=[5.0] * 3, **settings)
    config = make_config(table)

    rows = animated(config)

    files = stored(config)
    for number, times in enumerate(settings["interpolate"]):
        row = rows[f"r{number:03d}"]
        frames, rate = read(files[row["animation_uri"]], fmt)
        assert row["status"] == "succeeded", row["error"]
        assert frames.shape == (row["num_frames"], row["height"], row["width"], 3)
        assert (row["num_frames"], row["fps"]) == (3 * times + 1, 5.0 * times)
        assert rate == pytest.approx(row["fps"], rel=0.02)
        assert row["duration_s"] == pytest.approx(row["num_frames"] / row["fps"], abs=0.011)
        assert (row["finish_seconds"] is None) == (number == 2)
        record = Provenance.found_in(codecs.comments(files[row["animation_uri"]]))
        assert record is not None
        assert (record.settings["num_frames"], record.settings["fps"]) == (4, 5.0)
        size = {name: row[name] for name in ("width", "height", "num_frames", "fps")}
        assert record.stored == (None if times == 1 else size)


def test_frames_of_the_engine_are_in_an_interpolated_file_bit_for_bit(make_config: MakeConfig) -> None:
    plain, interpolated_twice = (
        animated(make_config(requests_table(1, format=["png_zip"], num_frames=[5], interpolate=[times], seed=[1])))
        for times in (1, 2)
    )

    one, two = (
        read(Path(rows["r000"]["animation_uri"].removeprefix("file:")).read_bytes(), "png_zip")[0]
        for rows in (plain, interpolated_twice)
    )
    assert np.array_equal(two[::2], one)
    assert not any(np.array_equal(between, frame) for between, frame in zip(two[1::2], one, strict=False))


def test_measures_are_those_of_the_generated_frames(make_config: MakeConfig) -> None:
    rows = animated(make_config(requests_table(2, num_frames=[4, 4], interpolate=[1, 4], image=["images/0.png"] * 2)))

    for name in ("frame_mean", "frame_std", "motion", "first_frame_psnr_db"):
        assert rows["r000"][name] == rows["r001"][name]


def test_a_failed_request_keeps_the_size_that_it_asked_for(make_config: MakeConfig) -> None:
    table = requests_table(2, prompt=["fine", "not finite"], num_frames=[4, 4], interpolate=[2, 2], fps=[5.0, 5.0])

    rows = animated(make_config(table))

    assert [(rows[name]["num_frames"], rows[name]["fps"]) for name in ("r000", "r001")] == [(7, 10.0), (4, 5.0)]


def test_an_interrupted_finished_animation_is_taken_over(make_config: MakeConfig) -> None:
    """The object is there already, from an attempt that died before its commit."""
    config = make_config(requests_table(1, num_frames=[4], interpolate=[2]))
    first = animated(config)["r000"]
    for path in (Path(config.output) / "_journal").rglob("*.parquet"):
        path.unlink()

    again = animated(config, FakeEngine())["r000"]

    assert {name: again[name] for name in ("sha256", "num_frames", "fps")} == {
        name: first[name] for name in ("sha256", "num_frames", "fps")
    }


def test_the_provenance_of_a_finished_file_makes_it_again(make_config: MakeConfig) -> None:
    config = make_config(requests_table(1, num_frames=[4], interpolate=[2], sharpen=[0.25], color_match=[True]))
    (request,) = fetched(config).to_pylist()
    (data,) = (animated(config), stored(config))[1].values()

    record = Provenance.found_in(codecs.comments(data))

    assert record is not None
    row = record.manifest_row()
    assert {name: row[name] for name in ("num_frames", "interpolate", "sharpen", "color_match")} == {
        "num_frames": 4, "interpolate": 2, "sharpen": 0.25, "color_match": True,
    }  # fmt: skip
    assert record.key == request["key"]


def test_a_long_clip_is_finished_with_a_few_frames_in_memory() -> None:
    program = Path(__file__).parents[1] / "support" / "long_finishing.py"

    done = subprocess.run([sys.executable, program, "mp4", "160", "128"], check=True, capture_output=True, text=True)

    generated, peak = map(int, done.stdout.split())
    assert peak < generated / 2  # the stored frames are twice as many
