"""World of the embedded model: coloured shapes that move as a prompt describes. Needs only numpy and Pillow.

Prompt, first image and true clip come from one generator, so that a seed identifies a case. The motion is a function of
frame, kind of motion and motion scale: scales 0, 1 and 2 travel a short, medium and long way; 3, 4 and 5 go as far and
return at frame 15, as PIA's loop presets do. Positions and lengths are in pixels of a 64 x 64 image.

`python jobs/tiny/world.py OUT` writes the sample manifest and its images.
"""

# ruff: noqa: PLR2004 - shares and ranges of random cases are easiest to read where they are used

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

Motion = Literal["left", "right", "up", "down", "growing", "shrinking", "spinning", "bouncing", "still"]
Kind = Literal["circle", "square", "triangle", "star"]
Rgb = tuple[int, int, int]

SIDE = 64
"""Width and height in pixels of every image that the model was trained on."""

MOTIONS: tuple[Motion, ...] = (
    "left", "right", "up", "down", "growing", "shrinking", "spinning", "bouncing", "still",
)  # fmt: skip
KINDS: tuple[Kind, ...] = ("circle", "square", "triangle", "star")
COLOURS: dict[str, Rgb] = {
    "red": (222, 44, 44),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 165, 70),
    "cyan": (50, 195, 215),
    "blue": (45, 90, 220),
    "purple": (135, 60, 185),
    "pink": (245, 130, 185),
}
WORDINGS: dict[Motion, tuple[str, ...]] = {
    "left": ("moving left", "moving to the left", "going left", "sliding left", "drifting to the left"),
    "right": ("moving right", "moving to the right", "going right", "sliding right", "drifting to the right"),
    "up": ("moving up", "moving upwards", "going up", "rising up", "drifting upwards"),
    "down": ("moving down", "moving downwards", "going down", "falling down", "drifting downwards"),
    "growing": ("growing", "growing larger", "getting bigger", "expanding", "that grows"),
    "shrinking": ("shrinking", "shrinking away", "getting smaller", "contracting", "that shrinks"),
    "spinning": ("spinning", "spinning around", "rotating", "turning around", "that spins"),
    "bouncing": ("bouncing", "bouncing up and down", "hopping", "jumping up and down", "that bounces"),
    "still": ("still", "standing still", "not moving", "resting", "that stays still"),
}

_DIRECTIONS: dict[Motion, tuple[float, float]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
_TRAVEL_PX = (7.0, 14.0, 21.0)  # distance from frame 0 to frame 7, for small, moderate and large motion
_GROWTH = (0.25, 0.55, 0.9)  # relative growth at frame 7
_TURN = (math.radians(35), math.radians(80), math.radians(125))  # rotation at frame 7
_BOUNCE_PX = (6.0, 11.0, 17.0)  # height of a hop; a hop takes 5 frames
_WALL_PX = 6.0  # a moving centre keeps this distance from the edge, so that the shape stays visible
_LOOP_END = 15  # PIA's loop presets hold 16 values
_DRIFT_PX = 6.0  # a shorter remaining path counts as none when a case is sampled


@dataclass(frozen=True, slots=True)
class Shape:
    """Coloured shape: centre and radius in pixels, angle in radians (clockwise, 0 upright)."""

    kind: Kind
    colour: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    rgb: Rgb | None = None  # None: the standard value of `colour`
    inner: float = 0.45  # a star's inner radius over its outer one


@dataclass(frozen=True, slots=True)
class Background:
    """Linear gradient from one colour to another in the direction `angle` (radians, 0 to the right)."""

    start: Rgb
    end: Rgb
    angle: float = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """Image with its prompt and the expected motion. `shapes[0]` moves, the other shape rests."""

    prompt: str
    motion: Motion
    motion_scale: int
    shapes: tuple[Shape, ...]
    background: Background

    def image(self, side: int = SIDE) -> NDArray[np.uint8]:
        """Return the first frame: uint8, (side, side, 3), RGB."""
        return to_uint8(_render([self.shapes], self.background, side)[0])

    def clip(self, num_frames: int = 8) -> Floats:
        """Return the true clip: float32, (num_frames, 64, 64, 3), RGB, 0 to 1."""
        return self.frames(range(num_frames))

    def backdrop(self) -> Floats:
        """Return the background without shapes: float32, (64, 64, 3), RGB, 0 to 1."""
        picture: Floats = _render([()], self.background, SIDE)[0]
        return picture

    def frames(self, indices: Iterable[int]) -> Floats:
        """Return the given frames of the true clip, counted from 0: float32, (n, 64, 64, 3), RGB, 0 to 1."""
        shapes = [(moved(self.shapes[0], self.motion, self.motion_scale, index), *self.shapes[1:]) for index in indices]
        return _render(shapes, self.background, SIDE)


def to_uint8(frames: Floats) -> NDArray[np.uint8]:
    """Convert colours from 0-1 to uint8."""
    return np.asarray((frames * 255).round().clip(0, 255), np.uint8)


def progress(motion_scale: int, frame: int) -> float:
    """Return the progress of a motion: 0 at frame 0, 1 at frame 7; then slower, or in loops back to 0 at frame 15."""
    if motion_scale >= 3:
        return math.sin(math.pi * min(frame, _LOOP_END) / _LOOP_END)
    return frame * (1 - frame / 45) / (7 * (1 - 7 / 45))


def moved(shape: Shape, motion: Motion, motion_scale: int, frame: int) -> Shape:
    """Return the shape at `frame` (0, 1, ...) of a clip; `motion_scale` is 0 to 5."""
    done, size = progress(motion_scale, frame), motion_scale % 3
    if motion in _DIRECTIONS:
        towards_x, towards_y = _DIRECTIONS[motion]
        travel = _TRAVEL_PX[size] * done
        return dataclasses.replace(
            shape, x=_walled(shape.x, towards_x * travel), y=_walled(shape.y, towards_y * travel)
        )
    if motion == "growing":
        return dataclasses.replace(shape, radius=shape.radius * (1 + _GROWTH[size] * done))
    if motion == "shrinking":
        return dataclasses.replace(shape, radius=shape.radius / (1 + _GROWTH[size] * done))
    if motion == "spinning":
        return dataclasses.replace(shape, angle=shape.angle + _TURN[size] * done)
    if motion == "bouncing":
        return dataclasses.replace(shape, y=_walled(shape.y, -_BOUNCE_PX[size] * abs(math.sin(math.pi * frame / 5))))
    return shape


def random_case(
    rng: np.random.Generator,
    *,
    motion: Motion | None = None,
    motion_scale: int | None = None,
    both: float = 0.25,
) -> Case:
    """Return a random case of this world.

    Args:
        rng: Generator of all random choices.
        motion: Kind of motion. None: a random one.
        motion_scale: Motion scale, 0 to 5. None: 0, 1 or 2 at random.
        both: Share of images with a second shape, which rests.
    """
    motion = motion or MOTIONS[rng.integers(len(MOTIONS))]
    scale = int(rng.integers(3)) if motion_scale is None else motion_scale
    kind: Kind = KINDS[rng.integers(1, 4)] if motion == "spinning" and rng.random() < 0.9 else KINDS[rng.integers(4)]
    background = _random_background(rng)
    first = _random_shape(rng, kind, background, other=None)
    for _ in range(20):
        last = moved(first, motion, scale % 3, 7)
        if rng.random() < 0.1 or math.hypot(last.x - first.x, last.y - first.y) + 0.5 >= _full_travel(
            motion, scale % 3
        ):
            break  # in most cases there is room for the whole path
        first = _random_shape(rng, kind, background, other=None)
    shapes: tuple[Shape, ...] = (first,)
    if rng.random() < both:
        second = _random_shape(rng, KINDS[rng.integers(4)], background, other=first)
        shapes = (first, second) if _apart(first, second) else shapes
    return Case(_random_prompt(rng, shapes, motion), motion, scale, shapes, background)


def write_sample(folder: Path) -> None:
    """Write the sample manifest, `requests.parquet`, and its images as PNG."""
    import pyarrow as pa  # noqa: PLC0415 - rendering does not need Arrow
    import pyarrow.parquet as pq  # noqa: PLC0415

    from pia_batch.schema.key_prompts import KEY_PROMPTS_TYPE  # noqa: PLC0415

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, case in _SAMPLE_IMAGES.items():
        Image.fromarray(case.image(4 * SIDE)).save(folder / "images" / f"{name}.png", optimize=True)
    columns: dict[str, tuple[pa.DataType, Any]] = {
        "request_id": (pa.string(), None),
        "image": (pa.string(), None),
        "prompt": (pa.string(), None),
        "seed": (pa.int64(), 7),
        "motion_scale": (pa.int64(), 1),
        "num_frames": (pa.int64(), 8),
        "context": (pa.string(), None),
        "loop": (pa.bool_(), None),
        "prompts": (KEY_PROMPTS_TYPE, None),
        "prompt_hold": (pa.float64(), None),
    }
    table = {
        name: pa.array([row.get(name, default) for row in SAMPLE_ROWS], kind)
        for name, (kind, default) in columns.items()
    }
    pq.write_table(pa.table(table), folder / "requests.parquet")


def _full_travel(motion: Motion, size: int) -> float:
    """Return the travel of an unobstructed path at frame 7, in pixels."""
    if motion in _DIRECTIONS:
        return _TRAVEL_PX[size]
    return _BOUNCE_PX[size] * abs(math.sin(math.pi * 7 / 5)) if motion == "bouncing" else 0.0


def _walled(start: float, travel: float) -> float:
    """Return the final position of a centre; walls stop it, but never move it."""
    if travel < 0:
        return max(start + travel, min(start, _WALL_PX))
    return min(start + travel, max(start, SIDE - _WALL_PX))


def _apart(one: Shape, other: Shape) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def _random_shape(rng: np.random.Generator, kind: Kind, background: Background, other: Shape | None) -> Shape:
    """Return a shape that differs from the background, and from the other shape in colour and position.

    After 50 tries, return the last one.
    """
    shape = None
    for _ in range(50):
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        rgb = _jitter(rng, COLOURS[colour], 28)
        radius = float(rng.uniform(7, 14))
        shape = Shape(
            kind,
            colour,
            float(rng.uniform(radius * 0.8, SIDE - radius * 0.8)),
            float(rng.uniform(radius * 0.8, SIDE - radius * 0.8)),
            radius,
            float(rng.normal(0, 0.4)) if rng.random() < 0.3 else 0.0,
            rgb,
            float(rng.uniform(0.38, 0.52)),
        )
        contrast = min(math.dist(rgb, background.start), math.dist(rgb, background.end))
        if contrast > 90 and (other is None or (other.colour != colour and _apart(shape, other))):
            break
    if shape is None:
        raise AssertionError
    return shape


def _random_background(rng: np.random.Generator) -> Background:
    start = _random_tint(rng)
    if rng.random() < 0.5:
        return Background(start, start)
    end = _jitter(rng, start, 70) if rng.random() < 0.6 else _random_tint(rng)
    return Background(start, end, float(rng.integers(8)) * math.pi / 4)


def _random_tint(rng: np.random.Generator) -> Rgb:
    """Return a typical background colour: white, black, a grey, a pale or a dark colour."""
    choice = rng.random()
    if choice < 0.3:
        grey = int(rng.choice((255, 255, 0, 240, 128, int(rng.integers(256)))))
        return grey, grey, grey
    low, high = (175, 256) if choice < 0.65 else (0, 90)
    red, green, blue = rng.integers(low, high, 3).tolist()
    return red, green, blue


def _jitter(rng: np.random.Generator, rgb: Rgb, spread: int) -> Rgb:
    red, green, blue = np.clip(np.asarray(rgb) + rng.integers(-spread, spread + 1, 3), 0, 255).tolist()
    return red, green, blue


def _random_prompt(rng: np.random.Generator, shapes: tuple[Shape, ...], motion: Motion) -> str:
    def pick(*choices: str) -> str:
        return choices[rng.integers(len(choices))]

    shape = shapes[0]
    name = f"{pick('', '', 'small ', 'big ')}{shape.colour} {shape.kind}"
    if len(shapes) == 1 and rng.random() < 0.1:
        name = pick(shape.kind, "shape", f"{shape.colour} shape")
    article = "an " if name[0] in "aeiou" else "a "
    what = pick(article, article, "the ", "one ", "") + name
    does = WORDINGS[motion][0] if rng.random() < 0.4 else pick(*WORDINGS[motion])
    joint = pick(" ", " ", " ", ", ", " is ") if not does.startswith("that") else " "
    prompt = what + joint + does
    if len(shapes) == 2 and rng.random() < 0.4:
        prompt += pick(" beside the ", " near the ", " and the ") + f"{shapes[1].colour} {shapes[1].kind}"
    elif rng.random() < 0.15:
        prompt += pick(
            " on a plain background",
            " in front of a gradient",
            " slowly",
            " quickly",
            " on a white background",
        )
    return prompt


def _render(frames: list[tuple[Shape, ...]], background: Background, side: int) -> Floats:
    """Render frames: float32 (frames, side, side, 3), 0 to 1, with edges smoothed over one pixel."""
    unit = np.float32(SIDE / side)
    axis = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * unit
    along = math.cos(background.angle) * (axis[None, :] / SIDE - 0.5) + math.sin(background.angle) * (
        axis[:, None] / SIDE - 0.5
    )
    reach = 0.5 * (abs(math.cos(background.angle)) + abs(math.sin(background.angle)))
    share = (along / (2 * reach) + 0.5).astype(np.float32)[..., None]
    start, end = (np.asarray(rgb, np.float32) / 255 for rgb in (background.start, background.end))
    canvas = np.broadcast_to(start + (end - start) * share, (len(frames), side, side, 3)).astype(np.float32)
    for index in reversed(range(len(frames[0]))):  # the moving shape is rendered last, on top
        path = [shapes[index] for shapes in frames]
        resting = all(shape == path[0] for shape in path)
        cover = _coverage(path[:1] if resting else path, axis, float(unit))[..., None]
        rgb = path[0].rgb or COLOURS[path[0].colour]
        canvas += cover * (np.asarray(rgb, np.float32) / 255 - canvas)
    return canvas


def _coverage(path: list[Shape], axis: Floats, unit: float) -> Floats:
    """Return the share of each pixel that the shape covers: float32 (frames, side, side), 0 to 1."""

    def column(values: list[float]) -> Floats:
        return np.asarray(values, np.float32)[:, None, None]

    across = axis[None, None, :] - column([shape.x for shape in path])
    below = axis[None, :, None] - column([shape.y for shape in path])
    radius = column([shape.radius for shape in path])
    if path[0].kind == "circle":
        outside = np.hypot(across, below) - radius
        return np.asarray(np.clip(0.5 - outside / unit, 0, 1), np.float32)
    cos, sin = (column([f(shape.angle) for shape in path]) for f in (math.cos, math.sin))
    across, below = cos * across + sin * below, cos * below - sin * across
    if path[0].kind == "square":
        outside = np.maximum(np.abs(across), np.abs(below)) - radius * np.float32(0.85)
    elif path[0].kind == "triangle":
        slanted = np.float32(math.sqrt(3) / 2) * np.abs(across) - np.float32(0.5) * below
        outside = np.maximum(slanted, below) - radius * np.float32(0.5)
    else:
        outside = _outside_star(across, below, radius, path[0].inner)
    return np.asarray(np.clip(0.5 - outside / np.float32(unit), 0, 1), np.float32)


def _outside_star(across: Floats, below: Floats, radius: Floats, inner: float) -> Floats:
    """Return the distance to a five-pointed star's edge, negative inside. By symmetry, one tenth of it is a line."""
    tenth = math.pi / 5
    turned = np.abs(np.mod(np.arctan2(across, -below) + np.float32(tenth), np.float32(2 * tenth)) - np.float32(tenth))
    away = np.hypot(across, below)
    notch_x, notch_y = inner * math.sin(tenth), inner * math.cos(tenth)  # the point is at (0, 1), for radius 1
    length = math.hypot(notch_x, 1 - notch_y)
    normal_x, normal_y = np.float32((1 - notch_y) / length), np.float32(notch_x / length)
    return np.asarray(away * np.sin(turned) * normal_x + (away * np.cos(turned) - radius) * normal_y, np.float32)


_SKY = Background((214, 232, 248), (246, 236, 214), math.pi / 2)
_NIGHT = Background((14, 18, 44), (52, 40, 90), math.pi / 2)
_PAPER = Background((248, 246, 240), (248, 246, 240))
_SAMPLE_IMAGES: dict[str, Case] = {
    "red-circle": Case("", "still", 0, (Shape("circle", "red", 32, 32, 12),), _SKY),
    "blue-square": Case("", "still", 0, (Shape("square", "blue", 17, 36, 12),), _PAPER),
    "yellow-star": Case("", "still", 0, (Shape("star", "yellow", 32, 36, 15),), _NIGHT),
    "green-triangle": Case("", "still", 0, (Shape("triangle", "green", 32, 34, 12),), _SKY),
    "purple-square-orange-circle": Case(
        "", "still", 0, (Shape("circle", "orange", 18, 46, 10), Shape("square", "purple", 46, 20, 11)), _PAPER
    ),
}
SAMPLE_ROWS: tuple[Mapping[str, object], ...] = (
    *(
        {
            "request_id": f"circle-{towards}",
            "image": "images/red-circle.png",
            "prompt": f"a red circle moving {towards}",
        }
        for towards in ("left", "right", "up", "down")
    ),
    *(
        {
            "request_id": f"square-right-{name}",
            "image": "images/blue-square.png",
            "prompt": "a blue square moving right",
            "motion_scale": scale,
        }
        for scale, name in enumerate(("small", "moderate", "large"))
    ),
    {
        "request_id": "star-loop",
        "image": "images/yellow-star.png",
        "prompt": "a yellow star moving up",
        "motion_scale": 4,
        "num_frames": 16,
    },
    {"request_id": "star-shrinking", "image": "images/yellow-star.png", "prompt": "a yellow star shrinking"},
    {"request_id": "triangle-growing", "image": "images/green-triangle.png", "prompt": "a green triangle growing"},
    {
        "request_id": "one-of-two-bouncing",
        "image": "images/purple-square-orange-circle.png",
        "prompt": "an orange circle bouncing",
        "motion_scale": 2,
    },
    {
        "request_id": "two-still",
        "image": "images/purple-square-orange-circle.png",
        "prompt": "a purple square standing still",
    },
    {
        "request_id": "two-bouncing-48-frames",
        "image": "images/purple-square-orange-circle.png",
        "prompt": "an orange circle bouncing",
        "num_frames": 48,
        "context": "windows",
    },
    {
        "request_id": "up-in-a-chain-48-frames",
        "image": "images/red-circle.png",
        "prompt": "a red circle moving up",
        "motion_scale": 0,
        "num_frames": 48,
        "context": "chain",
    },
    {
        "request_id": "triangle-loop-32-frames",
        "image": "images/green-triangle.png",
        "prompt": "a green triangle growing",
        "num_frames": 32,
        "context": "windows",
        "loop": True,
    },
    {
        "request_id": "right-then-left",
        "image": "images/red-circle.png",
        "prompts": [
            {"frame": 0, "prompt": "a red circle moving right"},
            {"frame": 24, "prompt": "a red circle moving left"},
        ],
        "prompt_hold": 0.5,
        "num_frames": 48,
        "context": "chain",
    },
)
"""Rows of the sample manifest; missing columns have the defaults of `write_sample`."""


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample manifest and its images.")
    parser.add_argument("out", type=Path, help="folder for the manifest and the images")
    write_sample(parser.parse_args().out)


if __name__ == "__main__":
    _main()
