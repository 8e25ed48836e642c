"""Self-test: generates a small fixed clip to check that a device computes correctly before it serves requests.

The embedded model's clip is compared with a stored one. Every model's clip is compared with itself, generated alone and
between two other rows. This finds kernels that compute wrong results. It does not find a fault that appears later, nor
one as small as the error of half precision. The self-test makes too few calls to be compiled: `compiling` compares each
compiled graph with the uncompiled function.

`python jobs/tiny/self_test.py` stores the clip that is expected of the embedded model.
"""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pia_batch import tiny
from pia_batch.config import ModelConfig
from pia_batch.engine.shots import Clip, Limits, Shot
from pia_batch.errors import BrokenDeviceError, ConfigError
from pia_batch.weights.identity import engine_id
from pia_batch.weights.resolve import resolve

EXPECTED: Path = tiny.PATH.parent / "self_test.json"
"""File with the clip expected of the embedded model: JSON with `engine_id` and base64 `thumbnails` of the frames."""

_SIDE = 64
_THUMBNAIL = 8

_MEAN_TOLERANCE, _MAX_TOLERANCE = 1.0, 10.0
"""Tolerances of thumbnails, in steps of 255.

Measured on a CPU, differences from float32: bfloat16 0.25 (mean) and 2.8 (maximum), float16 0.04 and 0.7.
"""

_BATCH_TOLERANCE = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.15}
"""Tolerance of a row within a batch against the row alone, relative to its standard deviation.

A GPU may choose other kernels for another batch size, and computes float32 convolutions with 10 bits of mantissa. Rows
that leak into each other differ by about 1.
"""

_FLAT = 1.0
"""Standard deviation over all pixels, in steps of 255, below which a clip counts as flat."""

_COMMAND = "run `python jobs/tiny/self_test.py` in the repository to store it again"
_REMEDY = (
    "Take this machine out of service and check its driver, its memory and its build of torch. If every machine fails, "
    "the model is the cause: try model.dtype float32, or other weights"
)


class Engine(Protocol):
    """Interface of `PiaEngine` that the self-test uses."""

    limits: Limits

    @property
    def device(self) -> str:
        """Device of the networks, such as `cpu` or `cuda:0`."""

    @property
    def dtype(self) -> str:
        """Dtype of the networks: `float32`, `float16` or `bfloat16`."""

    def animate(self, shots: Sequence[Shot], *, keep_latents: bool = False) -> list[Clip]:
        """Return one clip per shot, in their order."""


def scheduler(shipped: Any, *, embedded: bool) -> DDIMScheduler:
    """Return the self-test's scheduler, so that its result and its cost do not depend on the configured scheduler.

    Args:
        shipped: Scheduler of the model; defines the prediction type of its UNet. Unused for the embedded model.
        embedded: True to return the scheduler that the embedded model was trained with.
    """
    if embedded:
        return DDIMScheduler.from_pretrained(tiny.PATH / "scheduler", local_files_only=True)
    # One step, from the middle of the schedule: at its end the network's output has no effect, and at its beginning it
    # is multiplied by 25.
    predicts = shipped.config.get("prediction_type", "epsilon")
    known = predicts if predicts in ("epsilon", "sample", "v_prediction") else "epsilon"
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=500, prediction_type=known)


def request(limits: Limits, *, embedded: bool) -> Shot:
    """Return the self-test's shot: three frames of a red disc, in one step; two steps for the embedded model."""
    picture = Image.new("RGB", (_SIDE, _SIDE), (40, 60, 120))
    ImageDraw.Draw(picture).ellipse((14, 18, 42, 46), fill=(222, 44, 44))
    step = lcm(8, limits.latent_stride)
    side = -(-_SIDE // step) * step
    return Shot(
        image=picture.resize((side, side)),
        prompt="a red circle moving right",
        seed=7,
        motion_scale=1,
        guidance_scale=1.5,
        num_inference_steps=2 if embedded else 1,
        num_frames=min(3, limits.max_frames),
        width=side,
        height=side,
    )


def check(engine: Engine, *, embedded: bool, expected: Path = EXPECTED) -> None:
    """Return if the device generates the expected clip.

    Args:
        engine: Engine with the scheduler that `scheduler` returns.
        embedded: True for the embedded model without adapters.
        expected: File that `write_expected` wrote; read for the embedded model only.

    Raises:
        BrokenDeviceError: The clip differs from the expected one, is flat, holds NaN, or could not be generated.
        ConfigError: The stored clip is missing, or belongs to another embedded model.
    """
    known = _read_expected(expected) if embedded else None
    shot = request(engine.limits, embedded=embedded)
    mates = [replace(shot, seed=seed, prompt="a blue square", guidance_scale=1.0) for seed in (1, 2)]
    alone = _generate(engine, [shot])[0]
    among = _generate(engine, [mates[0], shot, mates[1]])[1]
    deviation = float(alone.frames.std())
    if deviation < _FLAT:
        raise _broken(engine, f"its clip is flat: the standard deviation over all pixels is {deviation:.2f} of 255")
    if known is not None:
        _compare(engine, np.abs(thumbnails(alone.frames).astype(np.float32) - known))
    most = _BATCH_TOLERANCE.get(engine.dtype, _BATCH_TOLERANCE["float32"])
    for what, one, other in (("latents", alone.latents, among.latents), ("frames", alone.frames, among.frames)):
        distance = float((other - one).std() / one.std())
        if not distance <= most:
            raise _broken(
                engine,
                f"a row's {what} change by {distance:.3f} of their standard deviation when other rows share the batch "
                f"(allowed: {most:g})",
            )


def write_expected(engine: Engine, path: Path = EXPECTED) -> None:
    """Store the clip of `engine`, which must be the embedded model with the scheduler that `scheduler` returns."""
    clip = _generate(engine, [request(engine.limits, embedded=True)])[0]
    content = {
        "engine_id": _embedded_id(),
        "thumbnails": base64.b64encode(thumbnails(clip.frames).tobytes()).decode(),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def thumbnails(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the means of an 8 x 8 grid of tiles: frames (F, H, W, 3) in 0-255 to uint8 (F, 8, 8, 3)."""
    count, height, width, channels = frames.shape
    squares = frames.reshape(count, _THUMBNAIL, height // _THUMBNAIL, _THUMBNAIL, width // _THUMBNAIL, channels)
    rounded: NDArray[np.uint8] = squares.mean(axis=(2, 4)).round().astype(np.uint8)
    return rounded


class _Generated(NamedTuple):
    frames: NDArray[np.float32]
    latents: NDArray[np.float32]


def _generate(engine: Engine, shots: Sequence[Shot]) -> list[_Generated]:
    try:
        clips = engine.animate(shots, keep_latents=True)
    except RuntimeError as err:  # torch raises it when a device is lost, or a kernel has no code for it
        raise _broken(engine, str(err)) from err
    generated = []
    for clip in clips:
        if clip.error is not None or clip.latents is None:
            raise _broken(engine, str(clip.error)) from clip.error
        generated.append(_Generated(clip.frames.astype(np.float32), clip.latents.float().numpy()))
    return generated


def _read_expected(path: Path) -> NDArray[np.float32]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        pixels = np.frombuffer(base64.b64decode(stored["thumbnails"], validate=True), np.uint8)
        expected = pixels.reshape(-1, _THUMBNAIL, _THUMBNAIL, 3).astype(np.float32)
        engine_id = stored["engine_id"]
    except (KeyError, OSError, TypeError, ValueError) as err:
        raise ConfigError(f"{path} is missing or damaged ({err}); {_COMMAND}") from err
    if engine_id != _embedded_id():
        raise ConfigError(f"{path} belongs to another embedded model or engine version; {_COMMAND}")
    return expected


def _embedded_id() -> str:
    """Return the engine id of the embedded model in float32 with the default config."""
    plain = ModelConfig()
    return engine_id(plain, resolve(plain), "float32")


def _compare(engine: Engine, difference: NDArray[np.float32]) -> None:
    mean, most = float(difference.mean()), float(difference.max())
    if not (mean <= _MEAN_TOLERANCE and most <= _MAX_TOLERANCE):
        raise _broken(
            engine,
            f"its clip differs from the stored one by {mean:.1f} of 255 on average and {most:.0f} at most (allowed: "
            f"{_MEAN_TOLERANCE} and {_MAX_TOLERANCE})",
        )


def _broken(engine: Engine, what: str) -> BrokenDeviceError:
    place = f"{engine.device} of {platform.node()}"
    if engine.device.startswith("cuda"):
        place += f" ({torch.cuda.get_device_name(engine.device)})"
    return BrokenDeviceError(f"{place} fails the self-test in {engine.dtype}: {what}. {_REMEDY}")
