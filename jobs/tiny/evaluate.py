"""Measure how well the embedded model follows the prompt, on cases that it was not trained on.

    python jobs/tiny/evaluate.py                         # through diffusers' PIAPipeline, one call for each clip
    python jobs/tiny/evaluate.py --through engine        # through pia_batch.engine.PiaEngine, in batches
    python jobs/tiny/evaluate.py --through presets --steps 25   # each preset of `model.speed`, against exact

Cases come from `jobs/tiny/world.py`, with a seed that training does not use. The moving shape is found in every frame
by its colour: pixels nearer to it than to the image without the shape. Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import world
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pia_batch import tiny
from pia_batch.config import RunConfig
from pia_batch.config.layers import embedded
from pia_batch.config.speed_presets import PRESETS, Speed

Clip = NDArray[np.uint8]
Animate = Callable[[list[world.Case], int], list[Clip]]

TARGETS = {"direction": 0.95, "still": 0.95, "first_frame_psnr_db": 22.0, "monotone": 0.9}
"""Smallest acceptable values; all other numbers are only reported."""

_SEED = 90_001  # not a training seed: those are tuples, see jobs/tiny/train.py
_MOVED_PX = 2.0
_STILL_PX = 1.5
_COLOUR_TOLERANCE = 60.0
_LITTLE_ROOM_PX, _MUCH_ROOM_PX = 6.0, 18.0


@dataclasses.dataclass(frozen=True)
class Track:
    """Positions of the moving shape in all frames, found by colour."""

    centres: NDArray[np.float64]  # (frames, 2) x and y in pixels; NaN where the shape is not found
    masks: NDArray[np.bool_]  # (frames, 64, 64)

    @property
    def areas(self) -> NDArray[np.int64]:
        """Number of pixels of the shape in every frame."""
        return np.asarray(self.masks.sum((1, 2)), np.int64)


def main() -> None:
    """Animate, measure and print; exit with 1 if a target is missed."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    if arguments.through == "presets":
        _print_results(compare_presets(arguments), "through each preset", arguments.json)
        return
    animate = through_pipeline(arguments) if arguments.through == "pipeline" else through_engine(arguments)
    start = time.perf_counter()
    numbers = evaluate(animate, arguments.cases)
    title = f"through {arguments.through}, {numbers['clips']:.0f} clips, {time.perf_counter() - start:.0f} s"
    _print_results({"value": numbers}, title, arguments.json)


def _print_results(columns: dict[str, dict[str, float]], title: str, path: Path | None) -> None:
    """Print the measures of each column next to their targets; exit with 1 if a target is missed."""
    table = Table(title=f"embedded model {title}")
    for column in ("measure", *columns, "target"):
        table.add_column(column)
    for name in dict.fromkeys(name for numbers in columns.values() for name in numbers):
        values = (f"{numbers[name]:.3f}" if name in numbers else "" for numbers in columns.values())
        table.add_row(name, *values, f">= {TARGETS[name]}" if name in TARGETS else "")
    Console().print(table)
    if path is not None:
        record = columns if len(columns) > 1 else next(iter(columns.values()))
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    missed = {name for name, least in TARGETS.items() for numbers in columns.values() if numbers[name] < least}
    if missed:
        print(f"targets missed: {', '.join(sorted(missed))}")
        sys.exit(1)


def compare_presets(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return all measures of each preset, its relative speed, and its distance from the exact clips.

    `times_as_fast` is the ratio of the engine's CPU seconds. The PSNR is given as mean and least over clips; the mean
    difference is over all pixels, 0 to 255.
    """
    columns: dict[str, dict[str, float]] = {}
    exact: list[Clip] = []
    exact_seconds = 0.0
    for speed in PRESETS:
        animate, clips, seconds = through_engine(arguments, speed), [], 0.0

        def recorded(cases: list[world.Case], num_frames: int) -> list[Clip]:
            nonlocal seconds
            began = time.process_time()
            animated = animate(cases, num_frames)  # noqa: B023 - called within this iteration only
            seconds += time.process_time() - began
            clips.extend(animated)  # noqa: B023
            return animated

        recorded([world.random_case(np.random.default_rng(0))], 8)
        clips.clear()
        seconds = 0.0
        columns[speed] = evaluate(recorded, arguments.cases)
        if not exact:
            exact, exact_seconds = clips, seconds
        psnr = [_psnr(clip, truth) for clip, truth in zip(clips, exact, strict=True)]
        differences = [
            float(np.abs(clip.astype(float) - truth).mean()) for clip, truth in zip(clips, exact, strict=True)
        ]
        columns[speed] |= {
            "times_as_fast": exact_seconds / seconds,
            "psnr_to_exact_db": float(np.mean(psnr)),
            "psnr_to_exact_db_min": float(np.min(psnr)),
            "mean_difference_to_exact": float(np.mean(differences)),
        }
    return columns


def evaluate(animate: Animate, cases: int) -> dict[str, float]:
    """Return all measures; those without a unit in their name are shares of 1.

    Args:
        animate: Function that returns one clip with the given number of frames for each case.
        cases: Number of cases for each of the four directions; other measures use numbers in proportion.
    """
    rng = np.random.default_rng(_SEED)
    numbers: dict[str, float] = {}
    everything: list[tuple[world.Case, Clip]] = []

    def animated(motion: world.Motion, count: int, scale: int | None = None) -> list[tuple[world.Case, Clip]]:
        sampled = [_roomy_case(rng, motion, scale) for _ in range(count)]
        pairs = list(zip(sampled, animate(sampled, 8), strict=True))
        everything.extend(pairs)
        return pairs

    directions: list[bool] = []
    by_shapes: dict[int, list[bool]] = {1: [], 2: []}
    for motion in track(world.MOTIONS[:4], "directions", transient=True):
        pairs = animated(motion, cases)
        right = [goes(motion, follow(case, clip)) for case, clip in pairs]
        for (case, _), well in zip(pairs, right, strict=True):
            by_shapes[len(case.shapes)].append(well)
        numbers[f"direction_{motion}"] = float(np.mean(right))
        directions += right
    numbers["direction"] = float(np.mean(directions))
    numbers["direction_one_shape"] = float(np.mean(by_shapes[1] or [True]))
    numbers["direction_two_shapes"] = float(np.mean(by_shapes[2] or [True]))
    for motion in track(world.MOTIONS[4:], "other motions", transient=True):
        pairs = animated(motion, max(1, cases * 2 // 3))
        numbers[motion] = float(np.mean([_does(case, clip) for case, clip in pairs]))
    rising, travels = [], []
    for _ in track(range(max(1, cases // 2)), "motion scales", transient=True):
        case = _roomy_case(rng, world.MOTIONS[rng.integers(4)], 2)
        trio = [dataclasses.replace(case, motion_scale=scale) for scale in (0, 1, 2)]
        travels.append([travel(follow(one, clip)) for one, clip in zip(trio, animate(trio, 8), strict=True)])
        rising.append(travels[-1][0] < travels[-1][1] < travels[-1][2])
    numbers["monotone"] = float(np.mean(rising))
    for scale, value in enumerate(np.nanmean(travels, axis=0)):
        numbers[f"travel_px_at_scale_{scale}"] = float(value)
    back = []
    for index in track(range(max(3, cases // 3)), "loops", transient=True):
        case = _roomy_case(rng, world.MOTIONS[rng.integers(4)], 3 + index % 3)
        centres = follow(case, animate([case], 16)[0]).centres
        away = np.linalg.norm(centres - centres[0], axis=1)
        back.append(bool(np.nanmax(away) > _MOVED_PX and away[-1] < max(_STILL_PX, 0.25 * np.nanmax(away))))
    numbers["loop_returns"] = float(np.mean(back))
    psnr = [_psnr(clip[0], case.image()) for case, clip in everything]
    numbers["first_frame_psnr_db"], numbers["first_frame_psnr_db_min"] = float(np.mean(psnr)), float(np.min(psnr))
    overlap = [_overlap(follow(case, clip).masks[-1], _true_mask(case, 7)) for case, clip in everything]
    numbers["last_frame_iou"] = float(np.mean(overlap))
    numbers["colour_kept"] = float(np.mean([_colour_kept(case, clip) for case, clip in everything]))
    numbers["clips"] = float(len(everything) + 3 * len(rising) + len(back))
    return numbers


def follow(case: world.Case, clip: Clip) -> Track:
    """Find the moving shape in every frame: pixels nearer to its colour than to the background behind it."""
    behind = _without_mover(case)
    colour = np.asarray(case.shapes[0].rgb, float)
    pixels = clip.astype(float)
    masks = np.linalg.norm(pixels - colour, axis=-1) < np.linalg.norm(pixels - behind, axis=-1)
    rows, columns = np.mgrid[: world.SIDE, : world.SIDE] + 0.5
    counts = masks.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        centres = np.stack([(masks * axis).sum((1, 2)) / counts for axis in (columns, rows)], 1)
    return Track(centres, masks)


def goes(motion: world.Motion, path: Track) -> bool:
    """Return True if the shape ends clearly on the requested side, and not as far in another direction."""
    across, below = path.centres[-1] - path.centres[0]
    wanted, other = {
        "left": (-across, below),
        "right": (across, below),
        "up": (-below, across),
        "down": (below, across),
    }[motion]
    return bool(wanted >= _MOVED_PX and wanted > abs(other))


def travel(path: Track) -> float:
    """Return the distance from the shape's first position to its last, in pixels."""
    return float(np.linalg.norm(path.centres[-1] - path.centres[0]))


def through_pipeline(arguments: argparse.Namespace) -> Animate:
    """Return a function that calls the unmodified pipeline for each clip, with the embedded model's defaults."""
    from diffusers import MotionAdapter, PIAPipeline  # noqa: PLC0415 - not needed with the engine

    warnings.filterwarnings("ignore")
    adapter = MotionAdapter.from_pretrained(arguments.checkpoint / "motion_adapter", dtype=torch.float32)
    pipeline = PIAPipeline.from_pretrained(arguments.checkpoint, motion_adapter=adapter, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = embedded()["defaults"]

    def animate(cases: list[world.Case], num_frames: int) -> list[Clip]:
        return [
            world.to_uint8(
                pipeline(
                    image=Image.fromarray(case.image()),
                    prompt=case.prompt,
                    motion_scale=case.motion_scale,
                    num_frames=num_frames,
                    height=world.SIDE,
                    width=world.SIDE,
                    num_inference_steps=arguments.steps or settings["num_inference_steps"],
                    guidance_scale=arguments.guidance or settings["guidance_scale"],
                    generator=torch.Generator("cpu").manual_seed(index),
                    output_type="np",
                ).frames[0]
            )
            for index, case in enumerate(cases)
        ]

    return animate


def through_engine(arguments: argparse.Namespace, speed: Speed = "exact") -> Animate:
    """Return a function that calls our engine in batches of eight, with the pipeline's settings and seeds."""
    from pia_batch.engine import PiaEngine, Shot  # noqa: PLC0415 - not needed with the pipeline

    overrides = {"manifest": "-", "output": "-", "model.speed": speed}
    if arguments.checkpoint != tiny.PATH:
        overrides["model.base"] = str(arguments.checkpoint)
    config = RunConfig.load(overrides=overrides)
    engine = PiaEngine.load(config.model, device="cpu")
    settings = embedded()["defaults"]

    def animate(cases: list[world.Case], num_frames: int) -> list[Clip]:
        shots = [
            Shot(
                image=Image.fromarray(case.image()),
                prompt=case.prompt,
                seed=index,
                motion_scale=case.motion_scale,
                num_frames=num_frames,
                width=world.SIDE,
                height=world.SIDE,
                num_inference_steps=arguments.steps or settings["num_inference_steps"],
                guidance_scale=arguments.guidance or settings["guidance_scale"],
            )
            for index, case in enumerate(cases)
        ]
        clips: list[Clip] = []
        for first in range(0, len(shots), 8):
            clips += [clip.frames for clip in engine.animate(shots[first : first + 8])]
        return clips

    return animate


def _roomy_case(rng: np.random.Generator, motion: world.Motion, scale: int | None) -> world.Case:
    """Return a case whose motion can be measured: no spinning circle, and room for a good part of the path."""
    room = 0.0
    if motion in ("left", "right", "up", "down"):
        room = _MUCH_ROOM_PX if scale == 2 else _LITTLE_ROOM_PX  # noqa: PLR2004 - PIA's large motion
    while True:
        case = world.random_case(rng, motion=motion, motion_scale=scale)
        if motion == "spinning" and case.shapes[0].kind == "circle":
            continue  # invisible
        furthest = world.moved(case.shapes[0], motion, 2, 7)
        if abs(furthest.x - case.shapes[0].x) + abs(furthest.y - case.shapes[0].y) >= room:
            return case


def _does(case: world.Case, clip: Clip) -> bool:
    """Return True if the clip shows the requested motion, for motions without a direction."""
    path = follow(case, clip)
    areas, away = path.areas / max(1, path.areas[0]), path.centres - path.centres[0]
    if case.motion == "still":
        return bool(np.linalg.norm(away, axis=1).max() <= _STILL_PX and areas.min() >= 0.75 and areas.max() <= 1.33)  # noqa: PLR2004
    if case.motion == "growing":
        return bool(areas[-1] > 1.15)  # noqa: PLR2004
    if case.motion == "shrinking":
        return bool(areas[-1] < 0.87)  # noqa: PLR2004
    if case.motion == "bouncing":
        return bool(max(_MOVED_PX, 2 * np.ptp(away[:, 0])) < np.ptp(away[:, 1]))
    turned = [_overlap(path.masks[frame], _true_mask(case, frame)) for frame in range(1, len(clip))]
    unturned = [_overlap(path.masks[frame], _true_mask(case, 0)) for frame in range(1, len(clip))]
    return bool(np.mean(turned) > np.mean(unturned))


def _colour_kept(case: world.Case, clip: Clip) -> bool:
    """Return True if the shape's median colour in the last frame is near its original colour."""
    mask = follow(case, clip).masks[-1]
    if not mask.any():
        return False
    return bool(np.linalg.norm(np.median(clip[-1][mask], axis=0) - np.asarray(case.shapes[0].rgb)) < _COLOUR_TOLERANCE)


def _true_mask(case: world.Case, frame: int) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = follow(case, world.to_uint8(case.frames([frame]))).masks[0]
    return mask


def _without_mover(case: world.Case) -> NDArray[np.float64]:
    """Return the image without the moving shape: (64, 64, 3), 0 to 255."""
    hidden = dataclasses.replace(case.shapes[0], radius=0.0, x=-1000.0)
    return dataclasses.replace(case, shapes=(hidden, *case.shapes[1:])).image().astype(float)


def _overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return the intersection over union."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def _psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-9)))


def _parse() -> Any:
    parser = argparse.ArgumentParser(
        description="Measure the embedded model on held-out cases; exit code 1: a target is missed."
    )
    parser.add_argument(
        "--through", choices=("pipeline", "engine", "presets"), default="pipeline", help="default: %(default)s"
    )
    parser.add_argument("--checkpoint", type=Path, default=tiny.PATH, help="another checkpoint of the same layout")
    parser.add_argument(
        "--cases", type=int, default=30, help="cases of each direction (default: %(default)s, about 275 clips)"
    )
    parser.add_argument("--steps", type=int, default=0, help="denoising steps; 0: the model's default")
    parser.add_argument("--guidance", type=float, default=0.0, help="guidance scale; 0: the model's default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, default=None, help="JSON file for the numbers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
