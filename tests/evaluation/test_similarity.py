"""Measures by embeddings, against formulas written as loops."""

from __future__ import annotations

import numpy as np
import pytest

from pia_batch.evaluation import similarity


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("seed", range(5))
def test_every_measure_is_its_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, frames, texts = (rng.normal(0.3, 1, (n, 6)).astype(np.float32) for n in (1, 5, 2))
    alike = [cos(image[0].astype(float), frame.astype(float)) for frame in frames]
    double = frames.astype(float)
    pairs = [
        (max(0, cos(double[t - 1], double[t])) + max(0, cos(double[0], double[t]))) / 2 for t in range(1, len(frames))
    ]
    steps = [max(0, cos(double[t - 1], double[t])) for t in range(1, len(frames))]

    assert similarity.likeness_to_image(image, frames, 2) == pytest.approx(
        {"clip_i": np.mean(alike), "clip_i_min": min(alike), "clip_i_rest": np.mean(alike[:2] + alike[3:])}
    )
    prompt_of = [0, 0, 1, 1, 1]
    expected = np.mean([cos(texts[at].astype(float), double[t]) for t, at in enumerate(prompt_of)])
    assert similarity.likeness_to_prompts(texts, frames, prompt_of) == pytest.approx(expected)
    assert similarity.consistency(frames) == pytest.approx(np.mean(pairs))
    i2v = 0.4 * max(max(0, each) for each in alike) + 0.3 * np.mean(steps) + 0.3 * min(steps)
    assert similarity.image_to_video(image, frames) == pytest.approx(i2v)


def test_a_single_frame_has_no_neighbours() -> None:
    one = np.ones((1, 4), dtype=np.float32)

    assert similarity.consistency(one) is None
    assert similarity.image_to_video(one, one) is None
    assert similarity.likeness_to_image(one, one, 0) == {
        "clip_i": pytest.approx(1),
        "clip_i_min": pytest.approx(1),
        "clip_i_rest": None,
    }


def test_each_frame_has_the_prompt_of_its_nearest_key() -> None:
    assert similarity.nearest_prompts([0, 4, 9], 10) == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert similarity.nearest_prompts([0], 3) == [0, 0, 0]
