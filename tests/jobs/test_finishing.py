"""Measures of finished clips: known drifts, details and steps, and what each setting does to a clip of the model."""

import finishing
import numpy as np
import pytest

from pia_batch import ModelConfig, PiaEngine


def test_measures_of_known_frames() -> None:
    image = np.full((8, 8, 3), 100, np.uint8)
    image[:, ::2] += 10
    frames = np.stack([image + np.uint8(4 * number) for number in range(3)])

    found = finishing.measures(image, frames)

    assert found["rgb"] == pytest.approx(4)
    assert found["detail"] == pytest.approx(10)
    assert found["step"] == found["largest"] == pytest.approx(4)
    assert found["lab"] == pytest.approx(1.6, abs=0.1)  # 4 of 255 in this grey


@pytest.mark.long
def test_every_setting_has_its_effect_on_clips_of_the_model() -> None:
    rows = dict(finishing.table(PiaEngine.load(ModelConfig()), (1,)))

    plain, matched, sharp, twice, four_times = (rows[way] for way in finishing.WAYS)
    assert matched["lab"] < plain["lab"] / 4
    assert matched["rgb"] < plain["rgb"] / 4
    assert sharp["detail"] > 1.05 * plain["detail"]
    assert twice["step"] == pytest.approx(plain["step"] / 2, rel=0.1)
    assert four_times["step"] == pytest.approx(plain["step"] / 4, rel=0.1)
