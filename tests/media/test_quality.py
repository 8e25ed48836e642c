"""Measures of clips, and the check of a stored animation."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pia_batch.config import RunConfig
from pia_batch.errors import EncodingError
from pia_batch.media import codecs
from pia_batch.media.quality import check_animation, measures

MakeConfig = Callable[..., RunConfig]


def test_check_animation_accepts_the_right_and_refuses_other_sizes(make_config: MakeConfig) -> None:
    data = codecs.encode(np.zeros((3, 16, 24, 3), np.uint8), "gif", 10, make_config().encoding)
    row = {"format": "gif", "width": 24, "height": 16, "num_frames": 3}

    assert check_animation(data, row).duration_s == pytest.approx(0.3)
    for name in ("width", "height", "num_frames"):
        with pytest.raises(EncodingError, match="another gif was found"):
            check_animation(data, row | {name: 8})
    with pytest.raises(EncodingError):
        check_animation(data, row | {"format": "webp"})


def test_measures_of_known_frames() -> None:
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1], frames[2] = 30, 10
    condition = np.full((2, 2, 3), 10, np.uint8)

    found = measures(frames, condition)

    assert found["frame_mean"] == pytest.approx(40 / 3)
    assert found["frame_std"] == pytest.approx(np.std([0, 30, 10]))
    assert found["motion"] == pytest.approx((30 + 20) / 2)  # not wrapped around 256
    assert found["first_frame_psnr_db"] == pytest.approx(10 * math.log10(255**2 / 100))


def test_measures_of_a_still_a_single_and_a_perfect_clip() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)

    assert measures(np.stack([picture] * 3), picture)["motion"] == 0
    single = measures(picture[None], picture)
    assert (single["motion"], single["first_frame_psnr_db"]) == (0, None)
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert measures(black, white)["first_frame_psnr_db"] == pytest.approx(0)


@pytest.mark.long
@pytest.mark.parametrize("fmt", ["mp4", "gif"])
def test_a_long_clip_is_decoded_measured_encoded_and_checked_frame_by_frame(fmt: str) -> None:
    """Beyond the frames themselves, less than twice what one copy of them in float32 would take."""
    program = Path(__file__).parents[1] / "support" / "long_encoding.py"

    done = subprocess.run([sys.executable, program, fmt, "192", "256"], check=True, capture_output=True, text=True)

    frames, _, peak = map(int, done.stdout.split())
    assert peak <= frames + 2 * 4 * frames
