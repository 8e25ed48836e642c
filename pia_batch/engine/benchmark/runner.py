"""The engine and what one would use without it, side by side on one device, in one run, over the same shots.

The contestants of `contestants` take turns, so that what else happens on the machine happens to all of them. What is
known is told after each turn, a contestant that fails is told with its error, and the others go on: a run that somebody
ends, or that has only so many minutes, loses nothing.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from pia_batch.engine.benchmark.baselines import (
    GUIDANCE,
    Contestant,
    Encode,
    Entry,
    Frames,
    Lineup,
    Size,
    flops_per_clip,
    networks,
    pipeline,
    single_call,
)
from pia_batch.engine.benchmark.calibration import (
    Calibration,
    calibrate,
    device_name,
    seconds,
    state,
    synchronize,
)
from pia_batch.engine.benchmark.profiling import profile
from pia_batch.engine.compiling import Call, Mode, reason_of
from pia_batch.engine.loading import quiet
from pia_batch.engine.shots import Shot

__all__ = [
    "IDENTICAL_DB",
    "LETTERS",
    "BenchmarkOptions",
    "conditions",
    "flops_per_clip",
    "merged",
    "pipeline",
    "psnr_db",
    "run",
    "single_call",
]

IDENTICAL_DB = 120.0
"""What stands for the PSNR of identical frames, which is infinite."""

LETTERS = "abcde"
"""What the names of the contestants begin with."""

_SHAPES = {"full": (512, 16, 25), "tiny": (64, 8, 8)}
"""Side in pixels, frames and steps of each size."""

Told = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BenchmarkOptions:
    """What to measure.

    Attributes:
        size: `full`: Stable Diffusion 1.5 and PIA's motion modules with random weights; `tiny`: the embedded model.
        rounds: how often every contestant takes its turn.
        batches: batch sizes of the engine. Every contestant draws as many rows a turn as the largest has.
        device: such as `cuda:0`; None: a GPU if there is one.
        compiles: whether (c) runs, and (d) and (e) compile; compiling the full network takes minutes.
        only: letters of the contestants, in the order of their turns.
        side_px: width and height; None: 512, and 64 of the tiny model.
        frames: of a clip; None: 16, and 8 of the tiny model.
        steps: None: 25, and 8 of the tiny model.
        minutes: after which no turn begins that would end later; None: as long as it takes.
        profiles: whether the calls of (d) in its largest batch are taken apart by kind of kernel.
        mode: of Inductor, for all who compile.
        backend: of `torch.compile`.
    """

    size: Size = "full"
    rounds: int = 3
    batches: tuple[int, ...] = (1, 2, 4)
    device: str | None = None
    compiles: bool = True
    only: str = LETTERS
    side_px: int | None = None
    frames: int | None = None
    steps: int | None = None
    minutes: float | None = None
    profiles: bool = False
    mode: Mode = "default"
    backend: str | Call = "inductor"

    @property
    def place(self) -> torch.device:
        """Where to measure."""
        place = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return torch.device("cuda", place.index or 0) if place.type == "cuda" else place

    @property
    def shape(self) -> dict[str, int]:
        """Of every clip."""
        asked = (self.side_px, self.frames, self.steps)
        known = zip(("side_px", "frames", "steps"), asked, _SHAPES[self.size], strict=True)
        return {name: default if own is None else own for name, own, default in known}


@dataclass(slots=True)
class _Turns:
    """What is known of one contestant."""

    name: str
    contestant: Contestant | None = None
    told: Told = field(default_factory=dict)
    rows: int = 1
    compiled: bool = False
    first_s: float = 0.0
    """Of the first turn, which warms up and compiles, over as many rows as are drawn together."""
    seconds: list[float] = field(default_factory=list)
    drawing_s: list[float] = field(default_factory=list)
    """Of those, without encoding."""
    peaks: list[int] = field(default_factory=list)
    """Bytes of each turn."""


def conditions(options: BenchmarkOptions) -> Told:
    """What numbers must have in common to stand in one table: device, versions, network, shape and dtype."""
    versions = {name: module.__version__ for name, module in _MODULES.items()}
    return {
        "device": device_name(options.place),
        "dtype": str(_dtype(options.place)).removeprefix("torch."),
        "size": options.size,
        **options.shape,
        "guidance_scale": GUIDANCE[options.size],
        "versions": versions | {"cuda": torch.version.cuda, "cudnn": _cudnn()},
    }


_MODULES = {"torch": torch, "diffusers": diffusers, "transformers": transformers}


def merged(known: Mapping[str, Any], told: Mapping[str, Any]) -> Told:
    """Numbers of an earlier run under the same `conditions`, and over them those of a later one, where it has any."""
    contestants = dict(known.get("contestants", {}))
    for name, one in told["contestants"].items():
        if one["turns"] or not contestants.get(name, {}).get("turns"):
            contestants[name] = one
    return {**known, **told, "contestants": contestants}


def run(
    options: BenchmarkOptions,
    encode_mp4: Encode,
    tell: Callable[[Told, str], None] = lambda _told, _line: None,
    make: Callable[[Size], Any] = pipeline,
) -> Told:
    """Measure the contestants.

    Args:
        options: what to measure.
        encode_mp4: how every contestant but (a) makes its file, from uint8 (F, H, W, 3).
        tell: given all that is known, as it will be returned, and a line about what is new.
        make: the networks, as a float32 `PIAPipeline` on the CPU.

    Returns:
        JSON: the conditions, calibration, operations of a clip, and of every contestant clips a second (median, least,
        most; and drawn without encoding), UNet milliseconds for one step of one guided row, shares of the peaks, bytes
        of the device's memory with only its own networks on it, seconds of compilation, and the PSNR of its first clip
        against float32; the weights at full size are random, and so say nothing of a preset's. What cannot be measured
        here is null; of a contestant that failed there is an `error`, which says why.
    """
    with quiet():
        return _Benchmark(options, encode_mp4, tell).run(make(options.size))


class _Benchmark:
    """One run."""

    def __init__(self, options: BenchmarkOptions, encode_mp4: Encode, tell: Callable[[Told, str], None]) -> None:
        self._options = options
        self._device = options.place
        self._encode = encode_mp4
        self._tell = tell
        self._began = time.monotonic()
        self._shots = _shots(options)
        self._told: Told = {"contestants": {}}

    def run(self, pipe: Any) -> Told:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._told |= {"date": _now(), "conditions": conditions(self._options)}
        self._reference = self._float32(pipe.to(self._device))
        pipe.to(self._device, _dtype(self._device))
        self._flops = flops_per_clip(pipe, self._shots[0])
        self._calibration = calibrate(self._device, _dtype(self._device))
        self._told |= {"tflop_per_clip": self._flops / 1e12, "calibration": self._calibration.as_dict()}
        self._tell(self._told, f"calibrated: {self._calibration.matmul_tflops:.3g} TFLOP/s in matrix products")
        entries = self._chosen(pipe)
        turns = [self._first(entry) for entry in entries]
        for number in range(1, self._options.rounds):
            for each in turns:
                if each.contestant is not None and self._has(each.seconds[-1]):
                    self._attempt(each, self._turn, f"turn {number + 1}")
        if self._options.profiles:
            self._profile(turns)
        return self._told

    def _chosen(self, pipe: Any) -> list[Entry]:
        options = self._options
        lineup = Lineup(
            pipe, self._shots, options.batches, self._encode, options.compiles, options.mode, options.backend
        )
        entries = list(lineup.entries())
        return [entry for letter in dict.fromkeys(options.only) for entry in entries if entry.name[0] == letter]

    def _has(self, needed_s: float) -> bool:
        """Whether there is as much time left."""
        minutes = self._options.minutes
        return minutes is None or time.monotonic() - self._began + needed_s <= 60 * minutes

    def _first(self, entry: Entry) -> _Turns:
        """Its first turns: one that warms up and compiles, and one that counts."""
        turns = _Turns(entry.name)
        if not self._has(0.0):
            turns.told = {"error": f"not measured: the {self._options.minutes:g} minutes were over"}
            self._known(turns, turns.told["error"])
            return turns

        def begin(turns: _Turns) -> None:
            turns.contestant = entry.make()
            self._warm_up(turns, turns.contestant)
            self._turn(turns)

        self._attempt(turns, begin, "turn 1")
        return turns

    def _attempt(self, turns: _Turns, do: Callable[[_Turns], None], what: str) -> None:
        """What fails is an error of this contestant, whose networks are let go; what it has measured stays."""
        try:
            do(turns)
        except Exception as err:  # noqa: BLE001 - whatever it is, the others are measured
            turns.told["error"] = reason_of(err)
        if "error" in turns.told:  # the exception is gone, and with it what its traceback held
            turns.contestant = None
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._known(turns, turns.told["error"])
        else:
            self._known(turns, f"{what} in {turns.seconds[-1]:.3g} s")

    def _warm_up(self, turns: _Turns, contestant: Contestant) -> None:
        turns.rows, turns.compiled = contestant.rows, contestant.compiled
        began = time.perf_counter()
        clips = contestant.draw(self._shots[: contestant.rows])
        synchronize(self._device)
        turns.first_s = time.perf_counter() - began
        for frames in clips:
            contestant.encode(frames)
        unet_s = sum(each.share * seconds(self._device, each.call, repeats=3) for each in contestant.unet_calls())
        psnr = None if self._reference is None else psnr_db(clips[0], self._reference)
        turns.told |= {"psnr_db": psnr, "unet_ms": 1000 * unet_s}
        if contestant.compiler is not None and contestant.compiler.refused:
            turns.told["not_compiled"] = dict(contestant.compiler.refused)

    def _turn(self, turns: _Turns) -> None:
        contestant = turns.contestant
        if contestant is None:
            return
        gc.collect()
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device) if cuda else 0
        synchronize(self._device)
        began = time.perf_counter()
        clips = contestant.draw(self._shots)
        synchronize(self._device)
        drawn = time.perf_counter()
        for frames in clips:
            contestant.encode(frames)
        turns.seconds.append(time.perf_counter() - began)
        turns.drawing_s.append(drawn - began)
        if cuda:
            grown = torch.cuda.max_memory_allocated(self._device) - before
            turns.peaks.append(grown + _bytes_on(self._device, contestant.pipe))
            turns.told["gpu_after"] = state(self._device)

    def _known(self, turns: _Turns, line: str) -> None:
        told = turns.told | _summary(turns, self._options, self._flops, self._calibration)
        self._told["contestants"][turns.name] = told
        self._tell(self._told, f"{turns.name}: {line}")

    def _profile(self, turns: Sequence[_Turns]) -> None:
        """Of the engine's whole network in its largest batch."""
        able = [each.contestant for each in turns if each.name[0] == "d" and each.contestant is not None]
        if not able:
            return
        largest = max(able, key=lambda contestant: contestant.rows)
        whole = largest.unet_calls()[0]
        self._told["profile"] = {"what": f"one step of the engine, {largest.rows} guided row{'s' * (largest.rows > 1)}"}
        try:
            told = profile(self._device, whole.call, whole.directly, self._calibration.matmul_tflops)
        except RuntimeError as err:
            told = {"error": reason_of(err)}
        self._told["profile"] |= told
        self._tell(self._told, f"profile: {told.get('error', 'done')}")

    def _float32(self, pipe: Any) -> Frames | None:
        """The first clip, without the shorter mantissa that a GPU's convolutions take by default; None: no memory."""
        with _full_mantissa():
            try:
                return single_call(pipe, self._shots[0])
            except torch.OutOfMemoryError:
                return None


@contextlib.contextmanager
def _full_mantissa() -> Iterator[None]:
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept


def psnr_db(frames: Frames, reference: Frames) -> float:
    """Of uint8 frames against others of their shape, in dB; `IDENTICAL_DB` where no pixel differs."""
    error = float(np.mean((frames.astype(np.float64) - reference) ** 2))
    return IDENTICAL_DB if error == 0 else float(10 * np.log10(255**2 / error))


def _shots(options: BenchmarkOptions) -> list[Shot]:
    """As many as the largest batch has, each with a picture and a seed of its own."""
    shape, count = options.shape, max(options.batches)
    side, rng = shape["side_px"], np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8) for _ in range(count)]
    return [
        Shot(
            image=Image.fromarray(picture).resize((side, side)),
            prompt=f"a red circle moving {('left', 'right', 'up', 'down')[seed % 4]}",
            seed=seed,
            motion_scale=1,
            guidance_scale=GUIDANCE[options.size],
            num_inference_steps=shape["steps"],
            num_frames=shape["frames"],
            width=side,
            height=side,
        )
        for seed, picture in enumerate(pictures)
    ]


def _summary(turns: _Turns, options: BenchmarkOptions, flops: int, calibration: Calibration) -> Told:
    """What the turns taken so far say."""
    if not turns.seconds:
        return {"date": _now(), "turns": 0}
    rows, taken = max(options.batches), turns.seconds
    rate, drawn_s = rows / statistics.median(taken), statistics.median(turns.drawing_s)
    reached = rate * flops / 1e12
    sheet = calibration.datasheet_tflops
    return {
        "date": _now(),
        "turns": len(taken),
        "clips_per_s": rate,
        "clips_per_s_range": [rows / max(taken), rows / min(taken)],
        "clips_per_s_drawn": rows / drawn_s,
        "share_of_measured_matmul": reached / calibration.matmul_tflops,
        "share_of_datasheet": None if sheet is None else reached / sheet,
        "peak_bytes": max(turns.peaks, default=None),
        "compile_s": max(0.0, turns.first_s - drawn_s * turns.rows / rows) if turns.compiled else None,
        "compile_mode": options.mode if turns.compiled else None,
    }


def _bytes_on(device: torch.device, pipe: Any) -> int:
    """Of a pipeline's networks, what lies there."""
    tensors = {id(each): each for _, network in networks(pipe) for each in (*network.parameters(), *network.buffers())}
    return sum(each.nbytes for each in tensors.values() if each.device == device)


def _cudnn() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
