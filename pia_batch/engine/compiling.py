"""Compilation of the engine's most frequent calls: one graph for each frequent shape, direct calls for all others.

A graph is compiled for exactly one shape, because kernels for a fixed shape are the fastest. Rows that differ make many
shapes (each row whose schedule ends makes the batch smaller), and compiling the full network takes minutes. So a shape
is called directly until it is frequent, and the number of graphs is limited. The compiler never makes a row fail: if it
cannot compile, or if the first result of a graph differs from the direct call, it logs this once and all later calls of
that function are direct. Later results of a graph are not checked, because the host would have to wait for the device.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pia_batch.errors import is_out_of_memory

log = logging.getLogger(__name__)

USUAL_CALLS = 20
"""Number of direct calls of a shape before it is compiled.

Less than the 25 steps of one clip, more than the last steps of a batch that gets smaller.
"""

MAX_GRAPHS = 16
"""Largest number of graphs of each function. Batches of four guided rows that end at different steps have 8 shapes."""

FOLDER = Path("~/.cache/pia_batch/compiled")
"""Folder that keeps compiled kernels for the next process, unless `TORCHINDUCTOR_CACHE_DIR` names another one."""

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference of a graph's first result from the direct call, relative to the root mean square of the latter.

Measured on a CPU, for the embedded UNet and a full one with random weights: float16 differs from float32 by 0.0009 to
0.0014, bfloat16 by 0.008 to 0.011. A GPU computes float32 convolutions with the mantissa of float16.
"""

_PIXEL_TOLERANCE = 2.0
"""Largest difference of uint8 frames, in steps of 255; absolute, because frames may be flat.

Measured as above: float16 0.15, bfloat16 0.49.
"""

Call = Callable[..., Any]
"""Callable that takes a function and its arguments, and returns the function's result."""

Mode = Literal["default", "max-autotune-no-cudagraphs"]
"""Effort with which Inductor searches for fast kernels.

The modes that replay CUDA graphs are left out: each call overwrites the previous result.
"""


def directly(function: Call, *args: Any) -> Any:
    """Call the function without compilation."""
    return function(*args)


@dataclass(slots=True)
class _Graph:
    call: Call
    proven: bool = False
    """True once a result of the graph has been compared with the direct call."""


class Compiler:
    """Caller of functions of tensors and networks, which compiles them for frequent shapes."""

    def __init__(
        self,
        backend: str | Call = "inductor",
        *,
        usual_calls: int = USUAL_CALLS,
        max_graphs: int = MAX_GRAPHS,
        mode: Mode = "default",
    ) -> None:
        """Create a compiler without graphs.

        Args:
            backend: Backend of `torch.compile`.
            usual_calls: Number of direct calls of a shape before it is compiled.
            max_graphs: Largest number of graphs of each function; further shapes are called directly.
            mode: Mode of Inductor; unused by other backends.
        """
        self._options: dict[str, Any] = {"backend": backend} | ({"mode": mode} if backend == "inductor" else {})
        self._usual_calls = usual_calls
        self._max_graphs = max_graphs
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Call, dict[Hashable, _Graph]] = {}
        self.failures: dict[str, str] = {}
        """Names of the functions that are no longer compiled, each with the reason."""
        if backend == "inductor":
            _keep_kernels()

    def __call__(self, function: Call, *args: Any) -> Any:
        """Return the function's result. The function must not change its arguments.

        Args:
            function: Module-level function without a closure; the same object in every call.
            args: Tensors, networks, values, and tuples, dictionaries and dataclasses of them.
        """
        if function.__name__ in self.failures:
            return function(*args)
        graphs = self._graphs.setdefault(function, {})
        key = shape_of(args)
        try:
            if key in graphs and graphs[key].proven:
                return graphs[key].call(*args)
            if key not in graphs and not self._should_compile(function, key):
                return function(*args)
            with warnings.catch_warnings(action="ignore"):  # the compiler warns about what it cannot optimize
                graph = graphs.get(key) or _Graph(
                    torch.compile(_with_own_code(function), fullgraph=True, dynamic=False, **self._options)
                )
                compiled = graph.call(*args)
            graphs[key] = graph
        except Exception as err:
            if is_out_of_memory(err):
                raise
            result = function(*args)  # raises the same error if the compiler did not cause it
            self._give_up(function, reason_of(err))
            return result
        return self._compared(function, graph, compiled, function(*args))

    @torch.no_grad()
    def _compared(self, function: Call, graph: _Graph, compiled: Any, direct: Any) -> Any:
        """Return the direct result. Trust a graph with the same result; else stop compiling the function."""
        if all(map(_is_comparable, _tensors(direct))):
            graph.proven = True
            distances = [_distance(*pair) for pair in zip(_tensors(compiled), _tensors(direct), strict=True)]
            wrong = [(distance, most) for distance, most in distances if not distance <= most]
            if wrong:
                self._give_up(
                    function, "the first result of its graph differs by {:.3g} (allowed: {:g})".format(*wrong[0])
                )
        return direct

    def _give_up(self, function: Call, reason: str) -> None:
        self._graphs[function].clear()
        self.failures[function.__name__] = reason
        log.warning("compile_failed function=%s reason=%s", function.__name__, reason)

    def num_graphs(self) -> int:
        """Return the number of graphs."""
        return sum(len(graphs) for graphs in self._graphs.values())

    def _should_compile(self, function: Call, key: Hashable) -> bool:
        """Count the call of a shape without a graph; return True if the shape must be compiled now."""
        if len(self._graphs[function]) == self._max_graphs:
            return False
        self._calls[function, key] += 1
        return self._calls[function, key] > self._usual_calls


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a result, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)]


def _is_comparable(tensor: torch.Tensor) -> bool:
    """Return True if a result can be compared: it is finite, or all its frames are marked as finite.

    A graph sums in another order, and so may overflow in other places.
    """
    return bool((tensor if tensor.dtype == torch.bool else torch.isfinite(tensor)).all())


def _distance(compiled: torch.Tensor, direct: torch.Tensor) -> tuple[float, float]:
    """Return the difference of two results and the largest allowed one. NaN counts as too large."""
    if compiled.shape != direct.shape or compiled.dtype != direct.dtype:
        return float("inf"), 0.0
    if direct.dtype == torch.bool:
        return float((compiled != direct).sum()), 0.0
    difference = (compiled.float() - direct.float()).square().mean().sqrt()
    if not direct.is_floating_point():
        return float(difference), _PIXEL_TOLERANCE
    deviation = direct.float().square().mean().sqrt()
    return float(difference / deviation.clamp_min(torch.finfo(torch.float32).tiny)), _TOLERANCE[direct.dtype]


def shape_of(value: Any) -> Hashable:
    """Return the key of a graph: shape, strides, dtype and device of tensors, identity of networks, other values."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, torch.nn.Module):
        return id(value)
    if dataclasses.is_dataclass(value):
        return tuple(shape_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return tuple((name, shape_of(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(shape_of(each) for each in value)
    known: Hashable = value
    return known


def _with_own_code(function: Any) -> Call:
    """Return a copy of the function with its own code object: Dynamo keeps at most eight graphs for each of them."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _keep_kernels() -> None:
    """Let Inductor and Triton keep compiled kernels in a private folder, where the next process finds them."""
    chosen = Path(os.environ.get(_VARIABLE, ""))
    # torch sets this variable to a temporary folder as soon as Dynamo is imported; that is not the user's choice.
    if chosen.name and not (chosen.name.startswith("torchinductor_") and chosen.parent == Path(tempfile.gettempdir())):
        return
    folder = FOLDER.expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:  # for instance a read-only home folder
        log.info("compile_cache_skipped folder=%s reason=%s", folder, err)
    else:
        os.environ[_VARIABLE] = str(folder)


def reason_of(err: Exception) -> str:
    """Return an exception on one line, cut to 500 characters: compilers write hundreds of lines."""
    return f"{type(err).__name__}: {' '.join(str(err).split())[:500]}"
