"""Seams of long clips, measured: the step between frames where the windows change, relative to the steps inside.

`python jobs/tiny/seams.py` generates 48 frames of the embedded model in every way, and prints one line for each. A clip
without visible seams has a ratio of about 1 wherever something moves. Its standard error is 0.02 to 0.05 with SEEDS;
with three seeds a clip that bounces varies by 0.1, because it depends on the phase at the few seams.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pia_batch import ModelConfig, PiaEngine, Shot, tiny
from pia_batch.config import contexts

NUM_FRAMES, LENGTH = 48, 16

SEEDS = range(1, 9)

SETTLED = 8
"""Number of first frames that are left out: there the motion curve falls, and every clip moves most."""

SCENES = {
    "moving": ("red-circle", "a red circle moving right"),
    "growing": ("green-triangle", "a green triangle growing"),
    "bouncing": ("purple-square-orange-circle", "an orange circle bouncing"),
    "still": ("purple-square-orange-circle", "a purple square standing still"),
}

WAYS: dict[str, dict[str, Any]] = {
    "windows, no overlap": {"context": "windows", "context_overlap": 0},
    "windows, overlap 4": {"context": "windows", "context_overlap": 4},
    "windows, overlap 8": {"context": "windows", "context_overlap": 8},
    "freenoise, stride 4": {"context": "freenoise", "context_stride": 4},
    "chain": {"context": "chain"},
}


def scene(name: str, seed: int, **settings: Any) -> Shot:
    """Return a shot of 48 frames of the embedded model."""
    picture, prompt = SCENES[name]
    image = Image.open(tiny.SAMPLE / "images" / f"{picture}.png").convert("RGB").resize((64, 64))
    common: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 1.5}
    common |= {"num_frames": NUM_FRAMES, "context_length": LENGTH, "motion_scale": 1, "seed": seed}
    return Shot(image=image, prompt=prompt, **(common | settings))


def seams(shot: Shot) -> set[int]:
    """Return the frames at which a window or a piece begins, or another one has just ended."""
    if shot.context == "chain":
        return {start + 1 for start in range(LENGTH - 1, NUM_FRAMES - 1, LENGTH - 1)}
    if shot.context == "freenoise":
        starts = contexts.sliding_starts(NUM_FRAMES, LENGTH, shot.context_stride)
    else:
        starts = contexts.window_starts(NUM_FRAMES, LENGTH, shot.context_overlap)
    return {*starts[1:], *(start + LENGTH for start in starts[:-1])}


def steps(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the mean absolute difference of each frame to the one before, 0-255; shape (F - 1,)."""
    moved: npt.NDArray[np.float64] = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    return moved


def ratio(clips: Iterable[tuple[Shot, npt.NDArray[np.uint8]]]) -> float:
    """Return the mean step at the seams of clips, divided by the mean step inside."""
    at: list[float] = []
    inside: list[float] = []
    for shot, frames in clips:
        for frame, step in enumerate(steps(frames), 1):
            if frame >= SETTLED:
                (at if frame in seams(shot) else inside).append(float(step))
    return float(np.mean(at) / np.mean(inside))


def table(engine: PiaEngine, seeds: Iterable[int]) -> Iterator[tuple[str, list[float]]]:
    """Yield each way to generate a long clip with the ratio of every scene."""
    for way, settings in WAYS.items():
        shots = {name: [scene(name, seed, **settings) for seed in seeds] for name in SCENES}
        clips = iter(engine.animate([shot for each in shots.values() for shot in each]))
        yield way, [ratio((shot, next(clips).frames) for shot in each) for each in shots.values()]


def loops(engine: PiaEngine, seeds: Iterable[int]) -> dict[str, float]:
    """Return the mean difference of the last frame to the first, 0-255: open, looped in one call, looped in windows."""
    ways: dict[str, dict[str, Any]] = {
        "open, one call": {"context": None},
        "loop, one call": {"context": None, "loop": True},
        "loop, windows": {"context": "windows", "loop": True},
        "loop, freenoise": {"context": "freenoise", "loop": True},
    }
    found = {}
    for way, settings in ways.items():
        plain = [scene(name, seed, **settings) for name in SCENES for seed in seeds]
        clips = engine.animate([dataclasses.replace(shot, num_frames=32) for shot in plain])
        ends = [np.abs(clip.frames[-1].astype(np.int16) - clip.frames[0]).mean() for clip in clips]
        found[way] = float(np.mean(ends))
    return found


def main() -> None:
    """Print the tables."""
    engine, seeds = PiaEngine.load(ModelConfig()), SEEDS
    write = sys.stdout.write
    write(f"{'':22}" + "".join(f"{name:>10}" for name in SCENES) + "\n")
    for way, ratios in table(engine, seeds):
        write(f"{way:22}" + "".join(f"{value:10.2f}" for value in ratios) + "\n")
    write("\n|last - first| of 32 frames\n")
    for way, distance in loops(engine, seeds).items():
        write(f"{way:22}{distance:10.2f}\n")


if __name__ == "__main__":
    main()
