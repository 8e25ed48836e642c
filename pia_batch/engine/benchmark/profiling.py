"""Where the time of a call goes, by kind of kernel, beside what its multiplications would take at the measured peak.

Read from the trace that torch's profiler writes: on a GPU its kernels and copies, on a CPU torch's operators, each
without those that it calls. What is left of the window is gaps: in them a GPU waits for the host, and on a CPU Python
runs.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pia_batch.engine.benchmark.calibration import synchronize

Kind = Literal["convolution", "matmul", "attention", "norm", "elementwise", "copies"]

_KINDS: tuple[tuple[Kind, str], ...] = (
    ("attention", r"flash|fmha|attention|sdpa|softmax"),
    ("norm", r"norm|RowwiseMoments|ComputeFusedParams|welford|var_mean"),
    ("copies", r"nchwToNhwc|nhwcToNchw|Memcpy|Memset"),
    ("convolution", r"conv(?!ert)|fprop|implicit_gemm|winograd"),
    ("matmul", r"gemm|gemv|splitK|cutlass|nvjet|xmma|\bb?mm\b|\baddb?mm\b|baddbmm|matmul|linear"),
    ("copies", r"copy|CatArray|::(cat|clone|contiguous|index|index_select|to|fill_|zero_|empty\w*|resize_)\b|concat"),
)
"""What the name of a kernel, or of the operator that launched it, tells of its kind; the first that fits counts."""

_MOVES = frozenset(
    ["cat", "clone", "constant", "copy", "index", "nd", "pad", "permute", "to", "transpose", "unsafe", "view"]
)
"""Of what Inductor fused into one kernel: operators that only move numbers."""

_COUNTED: dict[str, Kind] = {"convolution": "convolution", "attention": "attention", "mm": "matmul"}
"""What the name of an operator that is counted holds; the first that fits counts."""

MOST_KERNELS = 20
"""Told one by one, those that take most."""


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel, or one operator without those that it called.

    Attributes:
        name: as the profiler has it.
        begin: in microseconds.
        end: in microseconds.
        taken: microseconds of its own.
        launcher: the operator that launched it; empty where it is one itself.
    """

    name: str
    begin: float
    end: float
    taken: float
    launcher: str = ""


def profile(
    device: torch.device,
    call: Callable[[], Any],
    count: Callable[[], Any],
    matmul_tflops: float,
    repeats: int = 3,
) -> dict[str, Any]:
    """What so many calls spend, as JSON.

    Args:
        device: where they compute.
        call: what is looked at; once before it is.
        count: computes the same without compiled graphs, whose multiplications nobody sees.
        matmul_tflops: the measured peak, 10**12 operations a second.
        repeats: calls one behind the other.

    Returns:
        Of one call: `window_ms` from its first kernel to its last, `gaps_ms` of it without any; of each kind `ms`,
        `share` of the window, `floor_ms` of its multiplications at the measured peak, and `above_floor_ms`; and the
        `kernels` that take most.

    Raises:
        RuntimeError: the profiler is not allowed to look at the GPU, and so saw no kernel.
    """
    call()
    synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    spans = kernels(events) if device.type == "cuda" else operators(events)
    if not spans:
        raise RuntimeError(f"torch's profiler saw nothing of {device}; it may lack the right to look at it")
    with counting() as counter:
        count()
    counted = counter.get_flop_counts().get("Global", {})
    floors = {kind: flops / matmul_tflops / 1e9 for kind, flops in _by_kind(counted).items()}
    return {"calls": repeats, **told(spans, floors, repeats)}


def counting() -> FlopCounterMode:
    """Counts multiplications and additions; torch's own counter, which does not know the attention of a CPU."""
    ours = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # noqa: SLF001 - its name
    return FlopCounterMode(display=False, custom_mapping=ours)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return count


def kernels(events: Sequence[dict[str, Any]]) -> list[Span]:
    """Of a trace, what ran on a GPU."""
    launchers: dict[Any, str] = {}
    spans = []
    for event in events:
        category, given = event.get("cat"), event.get("args", {})
        if category == "cpu_op" and "External id" in given:
            launchers[given["External id"]] = event["name"]
    for event in events:
        if event.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"}:
            launcher = launchers.get(event.get("args", {}).get("External id"), "")
            begin, taken = float(event["ts"]), float(event["dur"])
            spans.append(Span(event["name"], begin, begin + taken, taken, launcher))
    return spans


def operators(events: Iterable[dict[str, Any]]) -> list[Span]:
    """Of a trace, torch's operators on the CPU, each without the time of those that it called."""
    calls: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op" and event.get("ph") == "X":
            calls[event.get("tid")].append(event)
    spans = []
    for thread in calls.values():
        inside: list[tuple[float, list[float]]] = []  # of each operator that has begun, its end, and what others took
        for event in sorted(thread, key=lambda each: (each["ts"], -each["dur"])):
            begin, taken = float(event["ts"]), float(event["dur"])
            while inside and inside[-1][0] <= begin:
                inside.pop()
            if inside:
                inside[-1][1].append(taken)
            others: list[float] = []
            inside.append((begin + taken, others))
            spans.append((event["name"], begin, taken, others))
    return [Span(name, begin, begin + taken, max(0.0, taken - sum(others))) for name, begin, taken, others in spans]


def told(spans: Sequence[Span], floors: dict[Kind, float], repeats: int) -> dict[str, Any]:
    """A profile as JSON, of one of so many calls; `floors` in milliseconds. See `profile`."""
    by_kind: dict[Kind, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        by_kind[kind_of(span.name, span.launcher)] += span.taken / repeats / 1000
        by_name[span.name].append(span.taken / 1000)
    window = _window(spans) / repeats / 1000
    kinds = {
        kind: {
            "ms": by_kind.get(kind, 0.0),
            "share": by_kind.get(kind, 0.0) / window if window else 0.0,
            "floor_ms": floors.get(kind, 0.0),
            "above_floor_ms": by_kind.get(kind, 0.0) - floors.get(kind, 0.0),
        }
        for kind in sorted({*by_kind, *floors}, key=lambda kind: -by_kind.get(kind, 0.0))
    }
    launchers = {span.name: span.launcher for span in spans}
    most = sorted(by_name.items(), key=lambda each: -sum(each[1]))[:MOST_KERNELS]
    return {
        "window_ms": window,
        "gaps_ms": max(0.0, window - sum(by_kind.values())),
        "kinds": kinds,
        "kernels": [
            {
                "name": name,
                "kind": kind_of(name, launchers[name]),
                "ms": sum(taken) / repeats,
                "calls": len(taken) / repeats,
            }
            for name, taken in most
        ],
    }


def kind_of(name: str, launcher: str = "") -> Kind:
    """The kind of a kernel, by its name and that of the operator that launched it."""
    if match := re.match(r"triton_(\w\w\w)_fused_(\w+)", name):
        return _of_inductor(*match.groups())
    text = f"{name} {launcher}"
    return next((kind for kind, pattern in _KINDS if re.search(pattern, text, re.IGNORECASE)), "elementwise")


def _of_inductor(template: str, fused: str) -> Kind:
    """Of a kernel that Inductor wrote, by what it fused; `tem` are its own products and convolutions."""
    if template == "tem":
        return "convolution" if "conv" in fused else "matmul"
    if re.search(r"norm|var_mean|softmax", fused):
        return "norm" if "softmax" not in fused else "attention"
    words = {word for word in fused.split("_") if word and not word.isdigit()}
    return "copies" if words <= _MOVES else "elementwise"


def _by_kind(counted: dict[Any, int]) -> dict[Kind, float]:
    """Multiplications and additions of each operator to those of each kind."""
    flops: dict[Kind, float] = defaultdict(float)
    for operator, count in counted.items():
        kind = next((kind for part, kind in _COUNTED.items() if part in str(operator)), None)
        if kind is not None:
            flops[kind] += count
    return flops


def _window(spans: Sequence[Span]) -> float:
    """From the first to the last, in microseconds."""
    return max((span.end for span in spans), default=0.0) - min((span.begin for span in spans), default=0.0)
