"""Measures by embeddings: likeness to the image and the prompt, and consistency. `measures` has their formulas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
"""(n, D) embeddings, of any length."""

_MAX_WEIGHT, _MEAN_WEIGHT, _MIN_WEIGHT = 0.4, 0.3, 0.3
"""Weights of `dino_i2v`, from VBench-I2V, `i2v_subject`."""


def likeness_to_image(image: Vectors, frames: Vectors, cond_frame: int) -> dict[str, float | None]:
    """Return `clip_i`, `clip_i_min` and `clip_i_rest`.

    Args:
        image: Embedding of the condition image, shape (1, D).
        frames: Embeddings of the frames, shape (F, D).
        cond_frame: Index of the frame that repeats the image.
    """
    alike = cosines(frames, image)
    rest = np.delete(alike, cond_frame)
    return {
        "clip_i": float(alike.mean()),
        "clip_i_min": float(alike.min()),
        "clip_i_rest": float(rest.mean()) if len(rest) else None,
    }


def likeness_to_prompts(prompts: Vectors, frames: Vectors, prompt_of: Sequence[int]) -> float:
    """Return `clip_t`.

    Args:
        prompts: Embeddings of the prompts, shape (P, D).
        frames: Embeddings of the frames, shape (F, D).
        prompt_of: Index of the prompt of each frame.
    """
    return float(cosines(frames, prompts[list(prompt_of)]).mean())


def consistency(frames: Vectors) -> float | None:
    """Return `subject_consistency` of embeddings of the frames, shape (F, D); None for a single frame."""
    if len(frames) < 2:  # noqa: PLR2004 - a pair
        return None
    to_previous = np.maximum(0, cosines(frames[1:], frames[:-1]))
    to_first = np.maximum(0, cosines(frames[1:], frames[:1]))
    return float(((to_previous + to_first) / 2).mean())


def image_to_video(image: Vectors, frames: Vectors) -> float | None:
    """Return `dino_i2v`; None for a single frame. Arguments are those of `likeness_to_image`."""
    if len(frames) < 2:  # noqa: PLR2004 - a pair
        return None
    alike = np.maximum(0, cosines(frames, image))
    steps = np.maximum(0, cosines(frames[1:], frames[:-1]))
    return float(_MAX_WEIGHT * alike.max() + _MEAN_WEIGHT * steps.mean() + _MIN_WEIGHT * steps.min())


def nearest_prompts(starts: Sequence[int], num_frames: int) -> list[int]:
    """Return for each frame the index of the prompt whose frame is nearest; of two as near, the earlier one.

    Args:
        starts: Frame of each prompt, rising.
        num_frames: Number of frames.
    """
    return [min(range(len(starts)), key=lambda at: abs(starts[at] - frame)) for frame in range(num_frames)]


def cosines(these: Vectors, those: Vectors) -> npt.NDArray[np.float64]:
    """Return the cosine of each row of `these` with its row of `those`, or with its only row; float64, shape (n,)."""
    a, b = (np.asarray(each, dtype=np.float64) for each in (these, those))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    product: npt.NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return product
