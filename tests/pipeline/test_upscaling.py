"""Animations are stored enlarged: what their results, keys, provenance and plans say, and what is refused."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from animated import animated, fetched, stored
from fakes import FakeEngine
from inputs import requests_table
from PIL import Image
from upscalers import save

from pia_batch.config import RunConfig
from pia_batch.config.finishing import stored_size
from pia_batch.engine.upscaling import Upscaler
from pia_batch.errors import ConfigError
from pia_batch.manifest.validation import check
from pia_batch.media import codecs
from pia_batch.media.finishing.interpolation import interpolated
from pia_batch.media.finishing.sharpening import sharpen
from pia_batch.media.provenance import Provenance
from pia_batch.pipeline.finishing import finish
from pia_batch.planning.model_limits import limits_of
from pia_batch.planning.plan import make_plan
from pia_batch.weights.upscaler_files import with_upscaler

MakeConfig = Callable[..., RunConfig]
CPU = {"placement__num_gpus": 0}


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save(tmp_path / "upscaler" / "x4.safetensors", "Compact x4"))


def frames_of(archive: bytes) -> np.ndarray:
    """Frames of a zip of PNGs, read without this package."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        return np.stack([np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names])


def test_an_enlarged_animation_is_what_its_result_and_its_provenance_say(
    make_config: MakeConfig, model: str, tmp_path: Path
) -> None:
    table = requests_table(
        4, upscale=[None, 1, 4, 2], interpolate=[2, 1, 1, 1], num_frames=[4] * 4, format=["mp4", "gif", "webp", "webm"]
    )
    config = with_upscaler(make_config(table, upscale__model=model, upscale__scale=2, **CPU))

    rows = animated(config, FakeEngine(device="cpu"))

    files = stored(config)
    for number, factor in enumerate([2, 1, 4, 2]):
        row = rows[f"r{number:03d}"]
        assert row["status"] == "succeeded", row["error"]
        assert (row["width"], row["height"], row["upscale"]) == (64 * factor, 64 * factor, factor)
        assert row["num_frames"] == (7 if number == 0 else 4)
        assert (row["finish_seconds"] is None) == (factor == 1)
        data = files[row["animation_uri"]]
        record = Provenance.found_in(codecs.comments(data))
        assert record is not None
        assert (record.settings["width"], record.settings["upscale"]) == (64, factor)
        assert record.upscaler == (None if factor == 1 else f"sha256={config.upscale.sha256} dtype=float32")
        assert (record.stored is None) == (factor == 1)
        assert ("upscaler" in json.loads(record.comment)["pia_batch"]) == (factor > 1)
        path = tmp_path / f"file.{row['format']}"
        path.write_bytes(data)
        if row["format"] in {"mp4", "webm"}:  # by OpenCV, which has an FFmpeg of its own
            video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
            shapes = [video.read()[1].shape for _ in range(row["num_frames"])]
            assert set(shapes) == {(64 * factor, 64 * factor, 3)}
            assert not video.read()[0]
        else:
            with Image.open(path) as file:
                assert (file.size, file.n_frames) == ((64 * factor, 64 * factor), 4)


def test_stored_frames_are_those_of_the_network_and_measures_those_of_the_engine(
    make_config: MakeConfig, model: str
) -> None:
    table = requests_table(2, upscale=[1, 4], num_frames=[3] * 2, format=["png_zip"] * 2, image=["images/0.png"] * 2)
    config = with_upscaler(make_config(table, upscale__model=model, **CPU))

    rows = animated(config, FakeEngine(device="cpu"))

    files = stored(config)
    plain, enlarged = (frames_of(files[rows[name]["animation_uri"]]) for name in ("r000", "r001"))
    upscaler = Upscaler.load(config.upscale, "cpu", "float32")
    assert upscaler is not None
    assert np.array_equal(enlarged, np.stack([upscaler(frame, 4) for frame in plain]))
    for name in ("frame_mean", "frame_std", "motion", "first_frame_psnr_db"):
        assert rows["r000"][name] == rows["r001"][name]


def test_frames_are_enlarged_then_sharpened_then_interpolated() -> None:
    row: dict[str, Any] = {"width": 48, "height": 40, "num_frames": 3, "fps": 8.0, "motion_scale": 0, "loop": False}
    row |= {"motion_curve": None, "color_match": False, "sharpen": 0.5, "interpolate": 2, "upscale": 2}
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), np.uint8)

    def twice(picture: np.ndarray, factor: int) -> np.ndarray:
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)

    finished = finish(row, frames, twice)

    single = [sharpen(twice(frame, 2), 0.5) for frame in frames]
    assert np.array_equal(finished.frames.array(), np.stack(list(interpolated(single, 2, closing=False))))  # type: ignore[union-attr]
    assert finished.size == stored_size(row)
    assert (finished.size.width, finished.size.height) == (96, 80)


def keys_of(config: RunConfig) -> list[str]:
    return list(fetched(with_upscaler(config))["key"].to_pylist())


def test_the_network_is_part_of_the_keys_of_rows_that_it_enlarges_and_of_no_other(
    make_config: MakeConfig, model: str, tmp_path: Path
) -> None:
    table = requests_table(3, upscale=[1, 2, 4])
    other = str(save(tmp_path / "other.safetensors", "ESRGAN x4"))
    copy = str(save(tmp_path / "copy.safetensors", "Compact x4"))

    keys = keys_of(make_config(table, upscale__model=model, **CPU))

    assert keys_of(make_config(table, upscale__model=copy, **CPU)) == keys
    assert keys_of(make_config(table, upscale__model=model, upscale__scale=1, **CPU)) == keys
    without = make_config(table.drop_columns(["upscale"]), **CPU)
    assert keys_of(without)[0] == keys[0]
    changed = keys_of(make_config(table, upscale__model=other, **CPU))
    assert [one == two for one, two in zip(keys, changed, strict=True)] == [True, False, False]
    in_half = keys_of(make_config(table, upscale__model=model, upscale__dtype="float16", **CPU))
    assert [one == two for one, two in zip(keys, in_half, strict=True)] == [True, False, False]
    by_scale = keys_of(make_config(table.drop_columns(["upscale"]), upscale__model=model, upscale__scale=2, **CPU))
    assert by_scale[1] == keys[1]  # as by the column
    by_default = keys_of(make_config(table.drop_columns(["upscale"]), upscale__model=model, **CPU))
    assert by_default[2] == keys[2]  # the factor of the network


@pytest.mark.parametrize(
    ("row", "options", "error"),
    [
        ({"upscale": 2}, {"model": None}, "allowed: 1, or null; the config has no `upscale.model`"),
        ({"upscale": 5}, {}, "allowed: 1 to 4, the factor of `upscale.model`"),
        ({"upscale": 9}, {}, "a whole number from 1 to 8"),
        ({"upscale": 4, "width": 1032, "num_frames": 1}, {}, "width x upscale and height x upscale up to 4096"),
        (
            {"upscale": 4, "width": 1024, "height": 1024, "num_frames": 17},
            {},
            "width x height x num_frames x upscale^2 up to 268435456 (limits.max_frame_pixels)",
        ),
        (
            {"upscale": 4, "width": 1024, "height": 1024, "num_frames": 8, "interpolate": 4},
            {},
            "width x height x num_frames x upscale^2 x interpolate up to 268435456 (limits.max_frame_pixels)",
        ),
    ],
)
def test_what_cannot_be_enlarged_is_rejected_before_anything_is_generated(
    make_config: MakeConfig, model: str, row: dict[str, Any], options: dict[str, Any], error: str
) -> None:
    table = requests_table(1, **{name: [value] for name, value in row.items()})
    config = with_upscaler(make_config(table, **({"upscale__model": model} if options == {} else {}), **CPU))

    found = check(table, config, {"default": "e" * 32}, limits_of(config))

    (message,) = found.rejected["error"].to_pylist()
    assert message.startswith(("column 'upscale'", "column 'interpolate'"))
    assert error in message


@pytest.mark.parametrize(
    "row", [{"upscale": 4, "width": 1024, "height": 8, "num_frames": 1}, {"upscale": 1}, {"upscale": None}]
)
def test_what_can_be_enlarged_is_accepted(make_config: MakeConfig, model: str, row: dict[str, Any]) -> None:
    table = requests_table(1, **{name: pa.array([value], pa.int64()) for name, value in row.items()})
    config = with_upscaler(make_config(table, upscale__model=model, **CPU))

    assert len(check(table, config, {"default": "e" * 32}, limits_of(config)).requests) == 1


def test_a_plan_refuses_an_upscaler_that_is_not_there(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(requests_table(1), upscale__model=str(tmp_path / "none"), **CPU)

    with pytest.raises(ConfigError, match=r"upscale\.model: there is no folder or file"):
        make_plan(config)


def test_a_worker_with_another_file_refuses_to_start(make_config: MakeConfig, model: str) -> None:
    config = with_upscaler(make_config(requests_table(1), upscale__model=model, **CPU))
    save(Path(model), "Compact x2")

    with pytest.raises(ConfigError, match="give every node the same one"):
        animated(config, FakeEngine(device="cpu"))


def test_the_provenance_of_an_enlarged_file_makes_it_again(make_config: MakeConfig, model: str) -> None:
    config = with_upscaler(make_config(requests_table(1, num_frames=[2]), upscale__model=model, **CPU))
    (request,) = fetched(config).to_pylist()
    (data,) = (animated(config, FakeEngine(device="cpu")), stored(config))[1].values()

    record = Provenance.found_in(codecs.comments(data))

    assert record is not None
    assert record.manifest_row()["upscale"] == 4
    assert record.key == request["key"]
