"""Colour match: the formulas in CIE Lab, computed by scikit-image."""

import numpy as np
import pytest
from skimage import color, data

from pia_batch.media.finishing.color_match import RATIOS, ColorMatch, lab

PHOTO = np.ascontiguousarray(data.astronaut()[::4, ::4])
OTHER = np.ascontiguousarray(data.coffee()[::5, ::5])


def moments(picture: np.ndarray) -> np.ndarray:
    values = color.rgb2lab(picture).reshape(-1, 3)
    return np.stack([values.mean(axis=0), values.std(axis=0)])


def matched(frame: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The frame with the image's mean and deviation, in float64."""
    mean, deviation = moments(frame)
    wanted_mean, wanted = moments(image)
    ratio = np.clip(wanted / deviation, *RATIOS)
    return color.lab2rgb((color.rgb2lab(frame) - mean) * ratio + wanted_mean) * 255


def test_lab_is_that_of_the_standard() -> None:
    assert np.abs(lab(PHOTO) - [16, 0, 0] - color.rgb2lab(PHOTO)).max() < 0.03


@pytest.mark.parametrize("image", [PHOTO, OTHER], ids=["drifted", "another picture"])
def test_a_frame_gets_mean_and_deviation_of_the_image(image: np.ndarray) -> None:
    frame = np.clip(PHOTO * [0.8, 0.85, 0.9] + [10, 5, 20], 0, 255).astype(np.uint8)

    found = ColorMatch(image)(frame)

    with np.errstate(all="ignore"):
        assert np.abs(found - matched(frame, image)).max() <= 1.01
    if image is PHOTO:
        left, drift = (np.abs(moments(each) - moments(image)).max() for each in (found, frame))
        assert left < 1
        assert drift > 10  # what is left are colours that sRGB has not


def test_the_image_itself_stays_as_it_is() -> None:
    assert np.array_equal(ColorMatch(PHOTO)(PHOTO), PHOTO)


def test_noise_of_a_grey_frame_is_not_made_colour() -> None:
    grey = np.full((32, 32, 3), 120, np.uint8)
    grey[::2, ::2, 0] += 1

    found = ColorMatch(OTHER)(grey)

    assert found.std(axis=(0, 1)).max() <= RATIOS[1] * 1.5
    assert np.array_equal(ColorMatch(OTHER)(np.full((8, 8, 3), 9, np.uint8)).std(axis=(0, 1)), [0, 0, 0])
