"""Profiling: time of a call by kind of kernel, compared with the time of its operations at the measured peak.

The times are read from the trace of torch's profiler: kernels and copies on a GPU; torch's operators, each without the
operators that it calls, on a CPU. The rest of the window is gaps: a GPU waits for the host; on a CPU, Python runs.
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

KernelKind = Literal["convolution", "matmul", "attention", "norm", "elementwise", "copies"]

_KINDS: tuple[tuple[KernelKind, str], ...] = (
    ("attention", r"flash|fmha|attention|sdpa|softmax"),
    ("norm", r"norm|RowwiseMoments|ComputeFusedParams|welford|var_mean"),
    ("copies", r"nchwToNhwc|nhwcToNchw|Memcpy|Memset"),
    ("convolution", r"conv(?!ert)|fprop|implicit_gemm|winograd"),
    ("matmul", r"gemm|gemv|splitK|cutlass|nvjet|xmma|\bb?mm\b|\baddb?mm\b|baddbmm|matmul|linear"),
    ("copies", r"copy|CatArray|::(cat|clone|contiguous|index|index_select|to|fill_|zero_|empty\w*|resize_)\b|concat"),
)
"""Kinds by a pattern of the name of the kernel or of the operator that launched it; the first match counts."""

_MOVES = frozenset(
    ["cat", "clone", "constant", "copy", "index", "nd", "pad", "permute", "to", "transpose", "unsafe", "view"]
)
"""Operators in a kernel that Inductor fused which only move data."""

_COUNTED: dict[str, KernelKind] = {"convolution": "convolution", "attention": "attention", "mm": "matmul"}
"""Kinds of counted operators by a part of their name; the first match counts."""

MOST_KERNELS = 20
"""Number of kernels listed individually, the slowest first."""


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel, or one operator without the operators that it called.

    Attributes:
        name: Name in the profiler's trace.
        begin: Start, in microseconds.
        end: End, in microseconds.
        taken: Time of its own, in microseconds.
        launcher: Operator that launched the kernel; empty for an operator.
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
    """Profile a call and return the averages of one call, as JSON values.

    Args:
        device: Device that computes.
        call: Function to profile; it is called once before.
        count: Function with the same computation but without compiled graphs, in which operations cannot be counted.
        matmul_tflops: Measured peak, in 10**12 operations per second.
        repeats: Number of profiled calls.

    Returns:
        For one call: `window_ms` from its first to its last kernel, and `gaps_ms` in it without a kernel; for each kind
        `ms`, `share` of the window, `floor_ms` of its operations at the measured peak, and `above_floor_ms`; and the
        slowest `kernels`.

    Raises:
        RuntimeError: The profiler has no permission to observe the GPU, and so saw no kernel.
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
        raise RuntimeError(f"torch's profiler saw no kernels on {device}; it may lack the permission to observe it")
    with counting() as counter:
        count()
    counted = counter.get_flop_counts().get("Global", {})
    floors = {kind: flops / matmul_tflops / 1e9 for kind, flops in _by_kind(counted).items()}
    return {"calls": repeats, **summarized(spans, floors, repeats)}


def counting() -> FlopCounterMode:
    """Return torch's counter of multiplications and additions, extended by the attention kernel of CPUs."""
    ours = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # noqa: SLF001 - its name
    return FlopCounterMode(display=False, custom_mapping=ours)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return count


def kernels(events: Sequence[dict[str, Any]]) -> list[Span]:
    """Return the spans of a trace that ran on a GPU."""
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
    """Return the CPU operators of a trace, each without the time of the operators that it called."""
    calls: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op" and event.get("ph") == "X":
            calls[event.get("tid")].append(event)
    spans = []
    for thread in calls.values():
        inside: list[
            tuple[float, list[float]]
        ] = []  # end of each open operator, and times of the operators that it called
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


def summarized(spans: Sequence[Span], floors: dict[KernelKind, float], repeats: int) -> dict[str, Any]:
    """Return the averages of one of `repeats` calls as JSON values, as `profile` does; `floors` are in milliseconds."""
    by_kind: dict[KernelKind, float] = defaultdict(float)
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


def kind_of(name: str, launcher: str = "") -> KernelKind:
    """Return the kind of a kernel, from its name and that of the operator that launched it."""
    if match := re.match(r"triton_(\w\w\w)_fused_(\w+)", name):
        return _of_inductor(*match.groups())
    text = f"{name} {launcher}"
    return next((kind for kind, pattern in _KINDS if re.search(pattern, text, re.IGNORECASE)), "elementwise")


def _of_inductor(template: str, fused: str) -> KernelKind:
    """Return the kind of a kernel by Inductor from its fused operators; `tem` are its own products and convolutions."""
    if template == "tem":
        return "convolution" if "conv" in fused else "matmul"
    if re.search(r"norm|var_mean|softmax", fused):
        return "norm" if "softmax" not in fused else "attention"
    words = {word for word in fused.split("_") if word and not word.isdigit()}
    return "copies" if words <= _MOVES else "elementwise"


def _by_kind(counted: dict[Any, int]) -> dict[KernelKind, float]:
    """Sum the multiplications and additions of operators by kind."""
    flops: dict[KernelKind, float] = defaultdict(float)
    for operator, count in counted.items():
        kind = next((kind for part, kind in _COUNTED.items() if part in str(operator)), None)
        if kind is not None:
            flops[kind] += count
    return flops


def _window(spans: Sequence[Span]) -> float:
    """Return the time from the first begin to the last end, in microseconds."""
    return max((span.end for span in spans), default=0.0) - min((span.begin for span in spans), default=0.0)
