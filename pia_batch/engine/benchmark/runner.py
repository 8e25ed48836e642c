"""Benchmark: compares the engine with the alternatives to it, on one device, in one run, with the same shots.

The variants of `baselines` take turns, so that other load on the machine affects all of them alike. Results are
reported after each turn. A variant that fails is reported with its error, and the others continue. So a run that is
stopped, or has a time limit, loses no results.
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
    Encode,
    Frames,
    Size,
    Variant,
    VariantEntry,
    Variants,
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
    "full_mantissa",
    "merged",
    "pipeline",
    "psnr_db",
    "run",
    "single_call",
]

IDENTICAL_DB = 120.0
"""Value reported for the PSNR of identical frames, which is infinite."""

LETTERS = "abcde"
"""First letters of the variants' names."""

_SHAPES = {"full": (512, 16, 25), "tiny": (64, 8, 8)}
"""Side in pixels, frames and steps of each size."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BenchmarkOptions:
    """Options of a benchmark run.

    Attributes:
        size: `full`: Stable Diffusion 1.5 and PIA's motion modules with random weights; `tiny`: the embedded model.
        rounds: Number of turns of each variant.
        batches: Batch sizes of the engine. In each turn, every variant generates as many rows as the largest has.
        device: Torch device such as `cuda:0`. None: a GPU if there is one, else the CPU.
        compiles: True to run (c), and to compile in (d) and (e); compiling the full network takes minutes.
        only: Letters of the variants to run, in the order of their turns.
        side_px: Width and height of the clips, in pixels. None: 512; tiny model: 64.
        frames: Number of frames of a clip. None: 16; tiny model: 8.
        steps: Number of denoising steps. None: 25; tiny model: 8.
        minutes: Time limit: no turn starts that would end later. None: no limit.
        profiles: True to profile the UNet calls of (d) in its largest batch by kind of kernel.
        mode: Mode of Inductor, for all variants that compile.
        backend: Backend of `torch.compile`.
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
        """Device to measure on."""
        place = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return torch.device("cuda", place.index or 0) if place.type == "cuda" else place

    @property
    def shape(self) -> dict[str, int]:
        """Shape of every clip: `side_px`, `frames` and `steps`."""
        asked = (self.side_px, self.frames, self.steps)
        known = zip(("side_px", "frames", "steps"), asked, _SHAPES[self.size], strict=True)
        return {name: default if own is None else own for name, own, default in known}


@dataclass(slots=True)
class _Turns:
    """Measurements of one variant."""

    name: str
    variant: Variant | None = None
    record: Record = field(default_factory=dict)
    rows: int = 1
    compiled: bool = False
    first_s: float = 0.0
    """Duration of the first turn, which warms up and compiles, for one batch."""
    seconds: list[float] = field(default_factory=list)
    generating_s: list[float] = field(default_factory=list)
    """Duration of each turn without encoding, in seconds."""
    peaks: list[int] = field(default_factory=list)
    """Peak memory of each turn, in bytes."""


def conditions(options: BenchmarkOptions) -> Record:
    """Return the conditions that comparable results have in common: device, versions, network, shape and dtype."""
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


def merged(known: Mapping[str, Any], later: Mapping[str, Any]) -> Record:
    """Return the results of an earlier run under the same `conditions`, updated with those of a later run."""
    variants = dict(known.get("variants", {}))
    for name, one in later["variants"].items():
        if one["turns"] or not variants.get(name, {}).get("turns"):
            variants[name] = one
    return {**known, **later, "variants": variants}


def run(
    options: BenchmarkOptions,
    encode_mp4: Encode,
    report: Callable[[Record, str], None] = lambda _record, _line: None,
    make: Callable[[Size], Any] = pipeline,
) -> Record:
    """Measure the variants.

    Args:
        options: Options of the benchmark.
        encode_mp4: Encoder of every variant but (a), from uint8 (F, H, W, 3) to MP4.
        report: Callback that receives all results so far, in the form of the return value, and a line about the newest.
        make: Function that returns the networks as a float32 `PIAPipeline` on the CPU.

    Returns:
        JSON values: the conditions, the calibration, the operations of a clip, and for every variant: clips per second
        (median, least and most, and without encoding), UNet milliseconds for one step of one guided row, shares of the
        measured and the datasheet peak, peak bytes of device memory with only its own networks on the device, seconds
        of compilation, and the PSNR of its first clip against float32. At full size the weights are random, so the PSNR
        of a lossy preset has no meaning there. Values that cannot be measured on this device are null. A variant that
        failed has an `error` with the reason.
    """
    with quiet():
        return _Benchmark(options, encode_mp4, report).run(make(options.size))


class _Benchmark:
    """State of one benchmark run."""

    def __init__(self, options: BenchmarkOptions, encode_mp4: Encode, report: Callable[[Record, str], None]) -> None:
        self._options = options
        self._device = options.place
        self._encode = encode_mp4
        self._report = report
        self._began = time.monotonic()
        self._shots = _shots(options)
        self._record: Record = {"variants": {}}

    def run(self, pipe: Any) -> Record:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._record |= {"date": _now(), "conditions": conditions(self._options)}
        self._reference = self._float32(pipe.to(self._device))
        pipe.to(self._device, _dtype(self._device))
        self._flops = flops_per_clip(pipe, self._shots[0])
        self._calibration = calibrate(self._device, _dtype(self._device))
        self._record |= {"tflop_per_clip": self._flops / 1e12, "calibration": self._calibration.as_dict()}
        self._report(self._record, f"calibrated: {self._calibration.matmul_tflops:.3g} TFLOP/s in matrix products")
        entries = self._chosen(pipe)
        turns = [self._first(entry) for entry in entries]
        for number in range(1, self._options.rounds):
            for each in turns:
                if each.variant is not None and self._has_time(each.seconds[-1]):
                    self._attempt(each, self._turn, f"turn {number + 1}")
        if self._options.profiles:
            self._profile(turns)
        return self._record

    def _chosen(self, pipe: Any) -> list[VariantEntry]:
        options = self._options
        variants = Variants(
            pipe, self._shots, options.batches, self._encode, options.compiles, options.mode, options.backend
        )
        entries = list(variants.entries())
        return [entry for letter in dict.fromkeys(options.only) for entry in entries if entry.name[0] == letter]

    def _has_time(self, needed_s: float) -> bool:
        """Return True if `needed_s` seconds remain before the time limit."""
        minutes = self._options.minutes
        return minutes is None or time.monotonic() - self._began + needed_s <= 60 * minutes

    def _first(self, entry: VariantEntry) -> _Turns:
        """Take the first two turns of a variant: one that warms up and compiles, and one that counts."""
        turns = _Turns(entry.name)
        if not self._has_time(0.0):
            turns.record = {"error": f"not measured: the limit of {self._options.minutes:g} minutes was reached"}
            self._publish(turns, turns.record["error"])
            return turns

        def begin(turns: _Turns) -> None:
            turns.variant = entry.make()
            self._warm_up(turns, turns.variant)
            self._turn(turns)

        self._attempt(turns, begin, "turn 1")
        return turns

    def _attempt(self, turns: _Turns, do: Callable[[_Turns], None], what: str) -> None:
        """Run a turn. A failure is recorded as the variant's error and frees its networks; its measurements stay."""
        try:
            do(turns)
        except Exception as err:  # noqa: BLE001 - any failure of one variant must not stop the others
            turns.record["error"] = reason_of(err)
        if "error" in turns.record:  # outside the handler, whose traceback holds tensors
            turns.variant = None
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._publish(turns, turns.record["error"])
        else:
            self._publish(turns, f"{what} in {turns.seconds[-1]:.3g} s")

    def _warm_up(self, turns: _Turns, variant: Variant) -> None:
        turns.rows, turns.compiled = variant.rows, variant.compiled
        began = time.perf_counter()
        clips = variant.generate(self._shots[: variant.rows])
        synchronize(self._device)
        turns.first_s = time.perf_counter() - began
        for frames in clips:
            variant.encode(frames)
        unet_s = sum(each.share * seconds(self._device, each.call, repeats=3) for each in variant.unet_calls())
        psnr = None if self._reference is None else psnr_db(clips[0], self._reference)
        turns.record |= {"psnr_db": psnr, "unet_ms": 1000 * unet_s}
        if variant.compiler is not None and variant.compiler.failures:
            turns.record["not_compiled"] = dict(variant.compiler.failures)

    def _turn(self, turns: _Turns) -> None:
        variant = turns.variant
        if variant is None:
            return
        gc.collect()
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device) if cuda else 0
        synchronize(self._device)
        began = time.perf_counter()
        clips = variant.generate(self._shots)
        synchronize(self._device)
        generated = time.perf_counter()
        for frames in clips:
            variant.encode(frames)
        turns.seconds.append(time.perf_counter() - began)
        turns.generating_s.append(generated - began)
        if cuda:
            grown = torch.cuda.max_memory_allocated(self._device) - before
            turns.peaks.append(grown + _bytes_on(self._device, variant.pipe))
            turns.record["gpu_after"] = state(self._device)

    def _publish(self, turns: _Turns, line: str) -> None:
        record = turns.record | _summary(turns, self._options, self._flops, self._calibration)
        self._record["variants"][turns.name] = record
        self._report(self._record, f"{turns.name}: {line}")

    def _profile(self, turns: Sequence[_Turns]) -> None:
        """Profile the engine's whole network in its largest batch."""
        engines = [each.variant for each in turns if each.name[0] == "d" and each.variant is not None]
        if not engines:
            return
        largest = max(engines, key=lambda variant: variant.rows)
        whole = largest.unet_calls()[0]
        self._record["profile"] = {
            "what": f"one step of the engine, {largest.rows} guided row{'s' * (largest.rows > 1)}"
        }
        try:
            found = profile(self._device, whole.call, whole.directly, self._calibration.matmul_tflops)
        except RuntimeError as err:
            found = {"error": reason_of(err)}
        self._record["profile"] |= found
        self._report(self._record, f"profile: {found.get('error', 'done')}")

    def _float32(self, pipe: Any) -> Frames | None:
        """Return the first clip in full float32, without TF32 convolutions; None if there is too little memory."""
        with full_mantissa():
            try:
                return single_call(pipe, self._shots[0])
            except torch.OutOfMemoryError:
                return None


@contextlib.contextmanager
def full_mantissa() -> Iterator[None]:
    """Let convolutions on a GPU use all bits of float32 inside a block."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept


def psnr_db(frames: Frames, reference: Frames) -> float:
    """Return the PSNR of uint8 frames against others of the same shape, in dB; `IDENTICAL_DB` if no pixel differs."""
    error = float(np.mean((frames.astype(np.float64) - reference) ** 2))
    return IDENTICAL_DB if error == 0 else float(10 * np.log10(255**2 / error))


def _shots(options: BenchmarkOptions) -> list[Shot]:
    """Return as many shots as the largest batch has, each with its own image and seed."""
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


def _summary(turns: _Turns, options: BenchmarkOptions, flops: int, calibration: Calibration) -> Record:
    """Return the results of the turns so far."""
    if not turns.seconds:
        return {"date": _now(), "turns": 0}
    rows, taken = max(options.batches), turns.seconds
    rate, generating_s = rows / statistics.median(taken), statistics.median(turns.generating_s)
    reached = rate * flops / 1e12
    sheet = calibration.datasheet_tflops
    return {
        "date": _now(),
        "turns": len(taken),
        "clips_per_s": rate,
        "clips_per_s_range": [rows / max(taken), rows / min(taken)],
        "clips_per_s_generated": rows / generating_s,
        "share_of_measured_matmul": reached / calibration.matmul_tflops,
        "share_of_datasheet": None if sheet is None else reached / sheet,
        "peak_bytes": max(turns.peaks, default=None),
        "compile_s": max(0.0, turns.first_s - generating_s * turns.rows / rows) if turns.compiled else None,
        "compile_mode": options.mode if turns.compiled else None,
    }


def _bytes_on(device: torch.device, pipe: Any) -> int:
    """Return the number of bytes of a pipeline's networks on this device."""
    tensors = {id(each): each for _, network in networks(pipe) for each in (*network.parameters(), *network.buffers())}
    return sum(each.nbytes for each in tensors.values() if each.device == device)


def _cudnn() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
