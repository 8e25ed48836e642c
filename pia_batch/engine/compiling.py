"""Compilation of what the engine calls most: a graph for each shape that comes often, its own call for every other.

A graph is made for one shape and no other, as the kernels of a shape that is known are the fastest. Shapes are many
where rows differ (each row whose schedule ends makes the batch smaller), and a graph of the full network takes minutes:
so a shape is called as it is until it has proven usual, and there is a limit to the graphs. The compiler is no reason
for a row to fail: where it cannot compile, or where the first call of a graph is not what the function's own call
computes, it says so once, and everything is called as it is. Nobody looks at later calls of a graph, as the host would
wait for the device.
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

from pia_batch.engine.batch_limit import is_out_of_memory

log = logging.getLogger(__name__)

USUAL_CALLS = 20
"""Calls of a shape before it is compiled: less than the 25 steps of one clip, more than the last ones of a batch."""

MAX_GRAPHS = 16
"""Of each function. Batches of four guided rows that end at different steps have eight shapes."""

FOLDER = Path("~/.cache/pia_batch/compiled")
"""Where compiled kernels are kept for the next process, unless `TORCHINDUCTOR_CACHE_DIR` names another folder."""

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far the first result of a graph may be from the function's own, relative to its root mean square.

Measured on a CPU: a call of the embedded UNet, or of a full one with random weights, is 0.0009 to 0.0014 from float32
in float16, and 0.008 to 0.011 in bfloat16. A GPU computes convolutions in float32 with the mantissa of float16.
"""

_PIXEL_TOLERANCE = 2.0
"""The same of uint8 frames, in steps of 255, as they may be flat. Measured as above: float16 0.15, bfloat16 0.49."""

Call = Callable[..., Any]
"""A function and its arguments to its result."""

Mode = Literal["default", "max-autotune-no-cudagraphs"]
"""How long Inductor looks for fast kernels. Without the modes that replay CUDA graphs, whose results the next call
overwrites."""


def directly(function: Call, *args: Any) -> Any:
    """The function's own call."""
    return function(*args)


@dataclass(slots=True)
class _Graph:
    call: Call
    proven: bool = False
    """Whether it has been compared with the function's own call."""


class Compiler:
    """Calls functions of tensors and networks, compiled for the shapes that come often."""

    def __init__(
        self,
        backend: str | Call = "inductor",
        *,
        usual_calls: int = USUAL_CALLS,
        max_graphs: int = MAX_GRAPHS,
        mode: Mode = "default",
    ) -> None:
        """A compiler without graphs.

        Args:
            backend: of `torch.compile`.
            usual_calls: of a shape, before it is compiled.
            max_graphs: of each function; shapes beyond them are called as they are.
            mode: of Inductor; other backends have none.
        """
        self._options: dict[str, Any] = {"backend": backend} | ({"mode": mode} if backend == "inductor" else {})
        self._usual_calls = usual_calls
        self._max_graphs = max_graphs
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Call, dict[Hashable, _Graph]] = {}
        self.refused: dict[str, str] = {}
        """The functions that are called as they are for good, by name, and why."""
        if backend == "inductor":
            _keep_kernels()

    def __call__(self, function: Call, *args: Any) -> Any:
        """What the function returns. It must change none of its arguments.

        Args:
            function: of a module, without variables of its own, and the same object every time.
            args: tensors, networks, values, and tuples, dictionaries and dataclasses of them.
        """
        if function.__name__ in self.refused:
            return function(*args)
        graphs = self._graphs.setdefault(function, {})
        key = shape_of(args)
        try:
            if key in graphs and graphs[key].proven:
                return graphs[key].call(*args)
            if key not in graphs and not self._is_due(function, key):
                return function(*args)
            with warnings.catch_warnings(action="ignore"):  # of the compiler, of what it leaves as it is
                graph = graphs.get(key) or _Graph(
                    torch.compile(_again(function), fullgraph=True, dynamic=False, **self._options)
                )
                compiled = graph.call(*args)
            graphs[key] = graph
        except Exception as err:
            if is_out_of_memory(err):
                raise
            result = function(*args)  # raises itself where it was no fault of the compiler
            self._refuse(function, reason_of(err))
            return result
        return self._compared(function, graph, compiled, function(*args))

    @torch.no_grad()
    def _compared(self, function: Call, graph: _Graph, compiled: Any, direct: Any) -> Any:
        """The function's own result. A graph that makes the same is trusted from now on; after another one, none is."""
        if all(map(_is_sound, _tensors(direct))):
            graph.proven = True
            distances = [_distance(*pair) for pair in zip(_tensors(compiled), _tensors(direct), strict=True)]
            wrong = [(distance, most) for distance, most in distances if not distance <= most]
            if wrong:
                self._refuse(function, "its graph is {:.3g} off, where {:g} is allowed".format(*wrong[0]))
        return direct

    def _refuse(self, function: Call, reason: str) -> None:
        self._graphs[function].clear()
        self.refused[function.__name__] = reason
        log.warning("not_compiled function=%s reason=%s", function.__name__, reason)

    def num_graphs(self) -> int:
        """How many graphs there are."""
        return sum(len(graphs) for graphs in self._graphs.values())

    def _is_due(self, function: Call, key: Hashable) -> bool:
        """Whether to compile a shape now, of which there is no graph yet."""
        if len(self._graphs[function]) == self._max_graphs:
            return False
        self._calls[function, key] += 1
        return self._calls[function, key] > self._usual_calls


def _tensors(value: Any) -> list[torch.Tensor]:
    """Those of a result, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)]


def _is_sound(tensor: torch.Tensor) -> bool:
    """Whether a graph must make the same: another order of sums may well overflow elsewhere. False: frames that did."""
    return bool((tensor if tensor.dtype == torch.bool else torch.isfinite(tensor)).all())


def _distance(compiled: torch.Tensor, direct: torch.Tensor) -> tuple[float, float]:
    """How far one result is from the other, and how far it may be. NaN is far."""
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
    """What a graph depends on: of tensors all but their numbers, of networks which one it is, of others the value."""
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


def _again(function: Any) -> Call:
    """The function with a code object of its own: Dynamo keeps graphs by it, and stops at eight."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _keep_kernels() -> None:
    """Let Inductor and Triton keep what they compile where the next process finds it, and nobody else writes."""
    chosen = Path(os.environ.get(_VARIABLE, ""))
    # torch writes its own default there as soon as Dynamo is imported: a folder for temporary files.
    if chosen.name and not (chosen.name.startswith("torchinductor_") and chosen.parent == Path(tempfile.gettempdir())):
        return
    folder = FOLDER.expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:  # a home that cannot be written to
        log.info("compiled_not_kept folder=%s reason=%s", folder, err)
    else:
        os.environ[_VARIABLE] = str(folder)


def reason_of(err: Exception) -> str:
    """On one line what another library complains about: of what a compiler says in hundreds, the beginning."""
    return f"{type(err).__name__}: {' '.join(str(err).split())[:500]}"
