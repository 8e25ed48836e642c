"""The canary: a small fixed request that shows whether a device draws what it should, before it draws for anyone.

The embedded model's clip is compared with an answer that the package holds. Any model's is compared with itself, drawn
alone and between two batch-mates. That finds kernels that compute something else than they should. It does not find a
fault that comes later, nor one as small as what half precision does. It draws too few calls to be compiled: `compiling`
compares each graph with the function's own call itself.

`python jobs/tiny/self_test.py` stores the embedded model's answer.
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

ANSWER: Path = tiny.PATH.parent / "self_test.json"
"""What the embedded model draws: JSON of `engine_id` and, in base64, the `thumbnails` of its frames."""

_SIDE = 64
_THUMBNAIL = 8

_MEAN_TOLERANCE, _MAX_TOLERANCE = 1.0, 10.0
"""Of thumbnails, in steps of 255. Measured on a CPU: bfloat16 0.25 and 2.8 from float32, float16 0.04 and 0.7."""

_BATCH_TOLERANCE = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.15}
"""Of a row beside others, relative to its deviation. A GPU may pick other kernels for another batch size, and computes
float32 convolutions with 10 bits of mantissa; rows that leak into each other differ by about 1."""

_FLAT = 1.0
"""Deviation of all pixels, in steps of 255, below which a clip shows nothing."""

_COMMAND = "`python jobs/tiny/self_test.py` of the repository writes it again"
_REMEDY = (
    "Take this machine out, and look at its driver, its memory and its build of torch. If every machine says so, it is "
    "the model: try model.dtype float32, or other weights"
)


class Engine(Protocol):
    """The part of `PiaEngine` that the self-test uses."""

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
    """The canary's own scheduler, so that neither the answer nor the number of steps depends on the configured one.

    Args:
        shipped: the model's, for what its UNet predicts.
        embedded: then it is the one that the embedded model was trained with.
    """
    if embedded:
        return DDIMScheduler.from_pretrained(tiny.PATH / "scheduler", local_files_only=True)
    # One step, from the middle: at the end of the schedule the network's word counts for nothing, at its beginning it
    # is multiplied by 25.
    predicts = shipped.config.get("prediction_type", "epsilon")
    known = predicts if predicts in ("epsilon", "sample", "v_prediction") else "epsilon"
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=500, prediction_type=known)


def request(limits: Limits, *, embedded: bool) -> Shot:
    """What the canary draws: three frames of a red disc, in one step; in two for the embedded model."""
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


def check(engine: Engine, *, embedded: bool, answer: Path = ANSWER) -> None:
    """Return if the device draws as it should.

    Args:
        engine: under the scheduler that `scheduler` makes.
        embedded: whether it is the embedded model with nothing laid over it.
        answer: where `write_answer` stored what that one draws.

    Raises:
        BrokenDeviceError: it draws another clip than it should, a flat one or NaN, or it fails.
        ConfigError: the stored answer is missing, or of another embedded model.
    """
    known = _read_answer(answer) if embedded else None
    shot = request(engine.limits, embedded=embedded)
    mates = [replace(shot, seed=seed, prompt="a blue square", guidance_scale=1.0) for seed in (1, 2)]
    alone = _drawn(engine, [shot])[0]
    among = _drawn(engine, [mates[0], shot, mates[1]])[1]
    deviation = float(alone.frames.std())
    if deviation < _FLAT:
        raise _broken(engine, f"its clip is flat, with a deviation of {deviation:.2f} of 255 over all pixels")
    if known is not None:
        _compare(engine, np.abs(thumbnails(alone.frames).astype(np.float32) - known))
    most = _BATCH_TOLERANCE.get(engine.dtype, _BATCH_TOLERANCE["float32"])
    for what, one, other in (("latents", alone.latents, among.latents), ("frames", alone.frames, among.frames)):
        distance = float((other - one).std() / one.std())
        if not distance <= most:
            raise _broken(
                engine, f"a row's {what} change by {distance:.3f} of their deviation where others are beside it"
            )


def write_answer(engine: Engine, path: Path = ANSWER) -> None:
    """Store what `engine`, the embedded model under the scheduler that `scheduler` makes, draws."""
    drawn = _drawn(engine, [request(engine.limits, embedded=True)])[0]
    answer = {
        "engine_id": _embedded_id(),
        "thumbnails": base64.b64encode(thumbnails(drawn.frames).tobytes()).decode(),
    }
    path.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


def thumbnails(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Means of squares: frames (F, H, W, 3) in 0-255 to uint8 (F, 8, 8, 3)."""
    count, height, width, channels = frames.shape
    squares = frames.reshape(count, _THUMBNAIL, height // _THUMBNAIL, _THUMBNAIL, width // _THUMBNAIL, channels)
    rounded: NDArray[np.uint8] = squares.mean(axis=(2, 4)).round().astype(np.uint8)
    return rounded


class _Drawn(NamedTuple):
    frames: NDArray[np.float32]
    latents: NDArray[np.float32]


def _drawn(engine: Engine, shots: Sequence[Shot]) -> list[_Drawn]:
    try:
        clips = engine.animate(shots, keep_latents=True)
    except RuntimeError as err:  # what torch raises when a device is gone, or has no code for a kernel
        raise _broken(engine, str(err)) from err
    drawn = []
    for clip in clips:
        if clip.error is not None or clip.latents is None:
            raise _broken(engine, str(clip.error)) from clip.error
        drawn.append(_Drawn(clip.frames.astype(np.float32), clip.latents.float().numpy()))
    return drawn


def _read_answer(path: Path) -> NDArray[np.float32]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        pixels = np.frombuffer(base64.b64decode(stored["thumbnails"], validate=True), np.uint8)
        answer = pixels.reshape(-1, _THUMBNAIL, _THUMBNAIL, 3).astype(np.float32)
        engine_id = stored["engine_id"]
    except (KeyError, OSError, TypeError, ValueError) as err:
        raise ConfigError(f"{path} is missing or damaged ({err}); {_COMMAND}") from err
    if engine_id != _embedded_id():
        raise ConfigError(f"{path} belongs to another embedded model or engine version; {_COMMAND}")
    return answer


def _embedded_id() -> str:
    """The identity that the embedded model has by itself: in float32, with the default config."""
    plain = ModelConfig()
    return engine_id(plain, resolve(plain), "float32")


def _compare(engine: Engine, difference: NDArray[np.float32]) -> None:
    mean, most = float(difference.mean()), float(difference.max())
    if not (mean <= _MEAN_TOLERANCE and most <= _MAX_TOLERANCE):
        raise _broken(
            engine,
            f"its clip differs from the stored one by {mean:.1f} of 255 on average and {most:.0f} at most, where "
            f"{_MEAN_TOLERANCE} and {_MAX_TOLERANCE} are allowed",
        )


def _broken(engine: Engine, what: str) -> BrokenDeviceError:
    place = f"{engine.device} of {platform.node()}"
    if engine.device.startswith("cuda"):
        place += f" ({torch.cuda.get_device_name(engine.device)})"
    return BrokenDeviceError(f"{place} fails the check of {engine.dtype}: {what}. {_REMEDY}")
