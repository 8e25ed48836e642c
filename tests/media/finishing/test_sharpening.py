"""Sharpening: the unsharp mask, computed by SciPy."""

import numpy as np
import pytest
from scipy.ndimage import correlate1d

from pia_batch.media.finishing.sharpening import sharpen

RNG = np.random.default_rng(0)
BINOMIAL = np.array([1, 4, 6, 4, 1]) / 16


@pytest.mark.parametrize("amount", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(40, 24, 3), (8, 8, 3), (1, 2, 3)])
def test_a_picture_gets_the_difference_from_its_blur(amount: float, shape: tuple[int, ...]) -> None:
    picture = RNG.integers(0, 256, shape, np.uint8)
    wide = picture.astype(float)
    blurred = correlate1d(correlate1d(wide, BINOMIAL, axis=0, mode="nearest"), BINOMIAL, axis=1, mode="nearest")

    found = sharpen(picture, amount)

    assert found.dtype == np.uint8
    assert np.array_equal(found, np.clip(np.rint(wide + amount * (wide - blurred)), 0, 255))


def test_a_flat_picture_stays_as_it_is() -> None:
    for level in (0, 77, 255):
        flat = np.full((16, 16, 3), level, np.uint8)
        assert np.array_equal(sharpen(flat, 2.0), flat)
