"""Finishing, measured: colours, sharpness and steps of clips of the embedded model before and after each setting.

`python jobs/tiny/finishing.py` generates clips of 16 frames of the sample's images, and prints one table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pia_batch import ModelConfig, PiaEngine, Shot, tiny
from pia_batch.media.codecs import Frames, FrameStream
from pia_batch.media.finishing.color_match import lab
from pia_batch.pipeline.finishing import finish

SIDE = 64

SCENES = {
    "red-circle": "a red circle moving right",
    "green-triangle": "a green triangle growing",
    "blue-square": "a blue square moving up",
    "purple-square-orange-circle": "an orange circle bouncing",
}

WAYS: dict[str, dict[str, Any]] = {
    "as generated": {},
    "color_match: true": {"color_match": True},
    "sharpen: 0.5": {"sharpen": 0.5},
    "interpolate: 2": {"interpolate": 2},
    "interpolate: 4": {"interpolate": 4},
}


def shots(seeds: Iterable[int]) -> list[Shot]:
    """Return a shot of every scene and seed."""
    common: dict[str, Any] = {"width": SIDE, "height": SIDE, "num_inference_steps": 4, "guidance_scale": 1.5}
    return [
        Shot(image=_picture(name), prompt=prompt, motion_scale=1, seed=seed, **common)
        for name, prompt in SCENES.items()
        for seed in seeds
    ]


def _picture(name: str) -> Image.Image:
    path = tiny.SAMPLE / "images" / f"{name}.png"
    return Image.open(path).convert("RGB").resize((SIDE, SIDE))


def finished(image: Image.Image, frames: Frames, settings: dict[str, Any]) -> Frames:
    """Return the frames that would be stored of a clip with these settings; shape (F, H, W, 3)."""
    row: dict[str, Any] = {"width": SIDE, "height": SIDE, "num_frames": len(frames), "fps": 8.0, "loop": False}
    row |= {"motion_scale": 1, "upscale": 1}
    row |= {"motion_curve": None, "color_match": False, "sharpen": 0.0, "interpolate": 1, "pixels": image.tobytes()}
    found = finish(row | settings, frames).frames
    return found.array() if isinstance(found, FrameStream) else found


def measures(image: npt.NDArray[np.uint8], frames: Frames) -> dict[str, float]:
    """Return the measures of one clip.

    Returns:
        `rgb`: mean over frames and channels of |mean of the frame - mean of the image|, 0-255. `lab`: the same, as the
        distance of the means in CIE Lab. `detail`: mean difference of neighbouring pixels of a row, 0-255. `step`: mean
        difference of neighbouring frames, 0-255. `largest`: the largest such difference of one pixel's mean over
        channels, averaged over the pairs of frames.
    """
    wide = frames.astype(np.float64)
    wanted = lab(image).mean(axis=(0, 1))
    change = np.abs(np.diff(wide, axis=0)).mean(axis=-1)
    return {
        "rgb": float(np.abs(wide.mean(axis=(1, 2)) - image.mean(axis=(0, 1))).mean()),
        "lab": float(np.mean([np.linalg.norm(lab(frame).mean(axis=(0, 1)) - wanted) for frame in frames])),
        "detail": float(np.abs(np.diff(wide, axis=2)).mean()),
        "step": float(change.mean()),
        "largest": float(change.max(axis=(1, 2)).mean()),
    }


def table(engine: PiaEngine, seeds: Iterable[int]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each way to finish with the mean of every measure over all clips."""
    wanted = shots(seeds)
    clips = [clip.frames for clip in engine.animate(wanted)]
    for way, settings in WAYS.items():
        found = [
            measures(np.asarray(shot.image), finished(shot.image, frames, settings))
            for shot, frames in zip(wanted, clips, strict=True)
        ]
        yield way, {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def main() -> None:
    """Print the table."""
    rows = dict(table(PiaEngine.load(ModelConfig()), (1, 2, 3)))
    write = sys.stdout.write
    write(f"{'':20}" + "".join(f"{name:>9}" for name in next(iter(rows.values()))) + "\n")
    for way, found in rows.items():
        write(f"{way:20}" + "".join(f"{value:9.2f}" for value in found.values()) + "\n")


if __name__ == "__main__":
    main()
