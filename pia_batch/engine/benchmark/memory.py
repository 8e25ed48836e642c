"""Memory of the exact engine: the largest batch that fits, and clips longer than the motion modules know."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from pia_batch.engine.compiling import reason_of
from pia_batch.engine.engine import PiaEngine
from pia_batch.engine.loading import quiet
from pia_batch.engine.shots import Shot
from pia_batch.errors import DeviceMemoryError

Record = dict[str, Any]

LARGEST_BATCH = 32
"""Rows in the largest batch that is tried."""


class Meter(Protocol):
    """Measurement of a device's memory."""

    def begin(self) -> None:
        """Forget the peak and the failures so far."""

    def peak_bytes(self) -> int | None:
        """Return the peak since `begin`, in bytes, weights included; None where it cannot be measured."""

    def overflowed(self) -> bool:
        """Return True if an allocation has failed since `begin`."""


class CudaMeter:
    """Counters of torch's allocator on the current GPU; without a GPU, no measurement."""

    def __init__(self) -> None:
        """Create a meter of the current device."""
        self._failures = 0

    def begin(self) -> None:
        """Forget the peak and the failures so far, and return unused memory to the device."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._failures = self._num_failures()

    def peak_bytes(self) -> int | None:
        """Return the peak of what torch has reserved, in bytes."""
        return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None

    def overflowed(self) -> bool:
        """Return True if an allocation has failed, so that the engine halved the batch."""
        return torch.cuda.is_available() and self._num_failures() > self._failures

    def _num_failures(self) -> int:
        return int(torch.cuda.memory_stats().get("num_ooms", 0))


def by_batch(
    engine: PiaEngine,
    sides: Sequence[int],
    report: Callable[[Record], None],
    known: Record | None = None,
    *,
    frames: int = 16,
    largest: int = LARGEST_BATCH,
    meter: Meter | None = None,
) -> Record:
    """Measure batches of one row, then of twice as many, until one does not fit; then look for the largest that does.

    Args:
        engine: Exact engine, not compiled.
        sides: Width and height of the clips, in pixels.
        report: Callback that receives all results so far, after each batch.
        known: Results of an earlier call that was stopped; batches in it are not measured again.
        frames: Number of frames of a clip.
        largest: Rows in the largest batch that is tried.
        meter: Measurement of the device's memory. None: that of torch's allocator.

    Returns:
        By side (`512`): `batches`, by the number of guided rows: `peak_bytes` and `seconds` of one step and the
        decoding, or `fits` false; and `largest_batch`, null until it is known, which is a lower bound where all
        batches fitted.
    """
    meter = meter or CudaMeter()
    record: Record = {side: dict(one) for side, one in (known or {}).items()}
    for side in sides:
        found = record.setdefault(str(side), {"largest_batch": None, "batches": {}})
        batches: dict[str, Record] = found["batches"]
        fitting, failing, size = 0, None, 1
        while fitting < size <= largest:
            if str(size) not in batches:
                batches[str(size)] = _batch(engine, size, side, frames, meter)
            if batches[str(size)]["fits"]:
                fitting = size
            else:
                failing = size
            size = min(2 * fitting, largest) if failing is None else (fitting + failing) // 2
            report(record)
        found["largest_batch"] = fitting
        report(record)
    return record


def _batch(engine: PiaEngine, size: int, side: int, frames: int, meter: Meter) -> Record:
    shots = [_shot(seed, side, frames, steps=1) for seed in range(size)]
    meter.begin()
    began = time.perf_counter()
    with quiet():
        clips = engine.fresh().animate(shots)
    seconds = time.perf_counter() - began
    errors = [clip.error for clip in clips if clip.error is not None]
    for error in errors:
        if not isinstance(error, DeviceMemoryError):
            raise error
    if errors or meter.overflowed():
        return {"fits": False}
    return {"fits": True, "peak_bytes": meter.peak_bytes(), "seconds": seconds}


def long_clips(
    engine: PiaEngine,
    frames: Sequence[int],
    report: Callable[[Record], None],
    known: Record | None = None,
    *,
    side: int = 512,
    steps: int = 4,
    meter: Meter | None = None,
) -> Record:
    """Measure clips that are longer than the motion modules know, by each way to generate them.

    Args:
        engine: Exact engine, not compiled.
        frames: Numbers of frames; the first one is generated once more before, which counts as warming up.
        report: Callback that receives all results so far, after each clip.
        known: Results of an earlier call that was stopped; clips in it without an `error` are not measured again.
        side: Width and height of the clips, in pixels.
        steps: Denoising steps.
        meter: Measurement of the device's memory. None: that of torch's allocator.

    Returns:
        By name (`windows, 48 frames`): `frames`, `steps`, `seconds`, `seconds_per_frame` and `peak_bytes`, or an
        `error`.
    """
    meter = meter or CudaMeter()
    record: Record = {name: one for name, one in (known or {}).items() if "error" not in one}
    length = min(16, engine.limits.max_frames)
    asked: list[tuple[str, str | None, int]] = [("one window", None, length)]
    asked += [(context, context, count) for count in frames for context in ("windows", "freenoise", "chain")]
    with quiet():
        engine.animate([_shot(0, side, length, steps=1)])
        for word, context, count in asked:
            name = f"{word}, {count} frames"
            if name in record:
                continue
            settings: dict[str, Any] = {}
            if context is not None:
                settings = {"context": context, "context_length": length}
                overlap = {"windows": "context_overlap", "freenoise": "context_stride"}.get(context)
                settings |= {overlap: length // 4} if overlap else {}
            meter.begin()
            began = time.perf_counter()
            (clip,) = engine.animate([_shot(0, side, count, steps, **settings)])
            seconds = time.perf_counter() - began
            record[name] = {"frames": count, "steps": steps}
            if clip.error is not None:
                record[name]["error"] = reason_of(clip.error)
            else:
                measured = {"seconds": seconds, "seconds_per_frame": seconds / count, "peak_bytes": meter.peak_bytes()}
                record[name] |= measured
            report(record)
    return record


def _shot(seed: int, side: int, frames: int, steps: int, **settings: Any) -> Shot:
    """Return a guided shot with an image of its own."""
    picture = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Shot(
        image=Image.fromarray(picture).resize((side, side)),
        prompt="a red circle moving left",
        seed=seed,
        guidance_scale=7.5,
        num_inference_steps=steps,
        num_frames=frames,
        width=side,
        height=side,
        **settings,
    )
