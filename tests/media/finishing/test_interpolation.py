"""Interpolation: frames of the input bit for bit, known motion in between, loops that close, few frames at a time."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from pia_batch.media.finishing.interpolation import interpolated

RNG = np.random.default_rng(0)


def texture(height: int, width: int) -> np.ndarray:
    """A smooth random picture, in which every block is unlike its neighbours."""
    small = RNG.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def moving(num_frames: int, step: int, side: int = 96) -> np.ndarray:
    """A window that moves over a texture by `step` pixels a frame to the right; also at parts of a frame."""
    wide = texture(side, side + num_frames * step)
    return np.stack([wide[:, step * t : step * t + side] for t in range(num_frames)])


@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize("closing", [False, True], ids=["open", "loop"])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 8])
def test_frames_of_the_input_stay_bit_for_bit(num_frames: int, times: int, closing: bool) -> None:
    frames = RNG.integers(0, 256, (num_frames, 24, 40, 3), np.uint8)  # noise: what a conversion of colours would change

    found = list(interpolated(frames, times, closing=closing))

    assert len(found) == (num_frames * times if closing else (num_frames - 1) * times + 1)
    assert np.array_equal(np.stack(found[::times]), frames)


def test_a_known_motion_is_continued_between_the_frames() -> None:
    every = moving(33, step=1)  # the truth, of which the input has each fourth frame

    found = np.stack(list(interpolated(every[::4], 4, closing=False)))

    inner = (slice(None), slice(16, -16), slice(16, -16))
    error = np.abs(found.astype(int) - every)[inner].mean(axis=(1, 2, 3))
    mixed = np.abs((every[:-4:4].astype(int) + every[4::4]) / 2 - every[2:-2:4])[inner].mean()
    assert error.max() < 2
    assert mixed > 10


def test_what_does_not_move_does_not_change() -> None:
    still = np.stack([texture(64, 64)] * 4)

    assert all(np.array_equal(frame, still[0]) for frame in interpolated(still, 3, closing=False))


def test_the_end_of_a_loop_moves_on_to_its_start() -> None:
    tile = texture(64, 64)
    wide = np.concatenate([tile] * 3, axis=1)
    every = np.stack([wide[:, 4 * t : 4 * t + 64] for t in range(16)])  # after 16 frames of 4 pixels it is at its start

    found = np.stack(list(interpolated(every[::2], 2, closing=True)))

    error = np.abs(found.astype(int) - every)[:, 16:-16, 16:-16].mean(axis=(1, 2, 3))
    step = np.abs(every[1].astype(int) - every[0]).mean()
    assert len(found) == 16
    assert error.max() < step / 4  # the last one, between the last frame and the first, among them


def test_frames_are_taken_only_as_they_are_needed() -> None:
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        for frame in moving(40, step=2, side=64):
            taken += 1
            yield frame

    for number, _ in enumerate(interpolated(source(), 2, closing=True)):
        assert taken <= number // 2 + 4
    assert taken == 40


def test_a_clip_without_frames_has_none_and_once_is_as_it_was() -> None:
    assert list(interpolated([], 2, closing=True)) == []
    frames = moving(3, step=1)
    listed = list(frames)
    assert all(found is frame for found, frame in zip(interpolated(listed, 1, closing=True), listed, strict=True))
