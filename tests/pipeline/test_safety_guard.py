"""Images and clips that the safety checker flags: what their results say, and what is not stored."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from animated import animated, stored
from fakes import FakeEngine
from inputs import png, requests_table
from PIL import Image
from safety_checkers import preprocessor, safety_checker, save

from pia_batch.config import RunConfig, SafetyConfig
from pia_batch.engine.safety_checker import SafetyChecker
from pia_batch.errors import ConfigError, UnsafeError
from pia_batch.pipeline.safety_guard import SafetyGuard
from pia_batch.planning.plan import make_plan

MakeConfig = Callable[..., RunConfig]


class Reddish:
    """Checker that flags what is more red than the threshold, and counts the images that it sees."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self.seen = threshold, 0

    def scores(self, images: Sequence[Any]) -> Any:
        self.seen += len(images)
        return np.array([image[..., 0].mean() / 255 - self.threshold for image in images])


def clip(*reds: int) -> Any:
    return np.stack([np.full((8, 8, 3), (red, 0, 0), np.uint8) for red in reds])


def test_a_clip_is_measured_by_its_checked_frames() -> None:
    guard = SafetyGuard(SafetyConfig(), Reddish(0.5))

    assert guard.measures(clip(0, 255, 204, 0)) == {"nsfw_frames": 2, "nsfw_score": 0.5}
    assert SafetyGuard(SafetyConfig(), None).measures(clip(255)) == {}


@pytest.mark.parametrize(
    ("frames", "num_frames", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        (None, 3, [0, 1, 2]),
        (1, 16, [0]),
        (2, 16, [0, 15]),
        (4, 16, [0, 5, 10, 15]),
        (40, 3, [0, 1, 2]),
    ],
)
def test_frames_are_chosen_evenly(frames: Any, num_frames: int, expected: list[int]) -> None:
    assert SafetyGuard(SafetyConfig(frames=frames), None).frames_checked(num_frames) == expected


def test_a_flagged_clip_is_refused_under_the_policy_fail_only() -> None:
    measured = {"nsfw_frames": 2, "nsfw_score": 0.25}

    SafetyGuard(SafetyConfig(), Reddish(0.5)).refuse_unsafe(measured)
    with pytest.raises(UnsafeError, match=r"flags 2 frames \(score 0\.250.*safety\.policy"):
        SafetyGuard(SafetyConfig(policy="fail"), Reddish(0.5)).refuse_unsafe(measured)
    SafetyGuard(SafetyConfig(policy="fail"), Reddish(0.5)).refuse_unsafe({"nsfw_frames": 0, "nsfw_score": -0.1})


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A real checker whose threshold parts the three pictures of the test's manifest."""
    network = safety_checker(threshold=0.0, special=0.9)
    images = [np.asarray(picture) for picture in pictures()]
    scores = sorted(SafetyChecker(network, preprocessor()).scores(images))
    network.concept_embeds_weights.data.fill_(float(np.mean(scores[1:])))
    return str(save(tmp_path / "checker", network))


def pictures() -> list[Any]:
    return [Image.open(io.BytesIO(png(k))).convert("RGB").resize((64, 64)) for k in range(3)]


SMALL = {"format": ["gif"] * 3, "num_frames": [1] * 3, "width": [64] * 3, "height": [64] * 3}


def test_results_say_what_is_flagged_and_keys_do_not(make_config: MakeConfig, folder: str) -> None:
    config = make_config(requests_table(3, **SMALL), safety__checker=folder, safety__inputs=True)
    plain = make_config(requests_table(3, **SMALL))

    rows = animated(config, FakeEngine(device="cpu"))

    assert {row["status"] for row in rows.values()} == {"succeeded"}
    assert sum(row["nsfw_frames"] for row in rows.values()) == 1
    assert all((row["nsfw_score"] > 0) == (row["nsfw_frames"] == 1) for row in rows.values())
    assert {row["nsfw_input"] for row in rows.values()} == {True, False}
    assert make_plan(config).wanted.high.tolist() == make_plan(plain).wanted.high.tolist()


@pytest.mark.parametrize("inputs", [False, True])
def test_what_is_flagged_fails_and_is_not_stored(make_config: MakeConfig, folder: str, inputs: bool) -> None:
    options = {"safety__checker": folder, "safety__policy": "fail", "safety__inputs": inputs}
    config, engine = make_config(requests_table(3, **SMALL), **options), FakeEngine(device="cpu")

    rows = animated(config, engine)

    (unsafe,) = [row for row in rows.values() if row["status"] == "failed"]
    assert unsafe["error_kind"] == "unsafe"
    assert unsafe["animation_uri"] is None
    assert unsafe["attempts"] == 1
    assert set(stored(config)) == {row["animation_uri"] for row in rows.values() if row["animation_uri"]}
    assert len(stored(config)) == 2
    assert sum(map(len, engine.calls)) == (2 if inputs else 3)  # nothing is generated from a flagged image
    assert unsafe["nsfw_input"] is (True if inputs else None)
    assert unsafe["nsfw_frames"] == (None if inputs else 1)


def test_without_a_checker_the_columns_are_null(make_config: MakeConfig) -> None:
    rows = animated(make_config(requests_table(3, **SMALL)))

    assert {(row["nsfw_input"], row["nsfw_frames"], row["nsfw_score"]) for row in rows.values()} == {(None, None, None)}


def test_a_plan_refuses_a_checker_that_is_not_there(tmp_path: Path) -> None:
    pq.write_table(requests_table(3), tmp_path / "requests.parquet")
    paths = {"manifest": str(tmp_path / "requests.parquet"), "output": str(tmp_path / "out")}

    with pytest.raises(ConfigError, match=r"safety\.checker: there is no folder or file"):
        make_plan(RunConfig.load(None, paths | {"safety.checker": str(tmp_path / "none")}))
