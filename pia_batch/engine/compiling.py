"""Compilation of what the engine calls most: a graph for each shape that comes often, its own call for every other.

A graph is made for one shape and no other, as the kernels of a shape that is known are the fastest. Shapes are many
where rows differ (each row whose schedule ends makes the batch smaller), and a graph of the full network takes minutes:
so a shape is called as it is until it has proven usual, and there is a limit to the graphs. The compiler is no reason
for a row to fail: where it cannot compile, it says so once, and everything is called as it is.
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
from pathlib import Path
from typing import Any

import torch

from pia_batch.engine.room import is_out_of_memory

log = logging.getLogger(__name__)

USUAL_CALLS = 20
"""Calls of a shape before it is compiled: less than the 25 steps of one clip, more than the last ones of a batch."""

MAX_GRAPHS = 16
"""Of each function. Batches of four guided rows that end at different steps have eight shapes."""

FOLDER = Path("~/.cache/pia_batch/compiled")
"""Where compiled kernels are kept for the next process, unless `TORCHINDUCTOR_CACHE_DIR` names another folder."""

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Call = Callable[..., Any]
"""A function and its arguments to its result."""


def directly(function: Call, *args: Any) -> Any:
    """The function's own call."""
    return function(*args)


class Compiler:
    """Calls functions of tensors and networks, compiled for the shapes that come often."""

    def __init__(
        self, backend: str = "inductor", *, usual_calls: int = USUAL_CALLS, max_graphs: int = MAX_GRAPHS
    ) -> None:
        """A compiler without graphs.

        Args:
            backend: of `torch.compile`.
            usual_calls: of a shape, before it is compiled.
            max_graphs: of each function; shapes beyond them are called as they are.
        """
        self._backend = backend
        self._usual_calls = usual_calls
        self._max_graphs = max_graphs
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Call, dict[Hashable, Call]] = {}
        self._refused: set[Call] = set()
        if backend == "inductor":
            _keep_kernels()

    def __call__(self, function: Call, *args: Any) -> Any:
        """What the function returns. It must change none of its arguments.

        Args:
            function: of a module, without variables of its own, and the same object every time.
            args: tensors, networks, values, and tuples, dictionaries and dataclasses of them.
        """
        if function in self._refused:
            return function(*args)
        graphs = self._graphs.setdefault(function, {})
        key = shape_of(args)
        try:
            if key in graphs:
                return graphs[key](*args)
            if not self._is_due(function, key):
                return function(*args)
            with warnings.catch_warnings(action="ignore"):  # of the compiler, of what it leaves as it is
                graph = torch.compile(_again(function), backend=self._backend, fullgraph=True, dynamic=False)
                result = graph(*args)
            graphs[key] = graph
        except Exception as err:
            if is_out_of_memory(err):
                raise
            result = function(*args)  # raises itself where it was no fault of the compiler
            self._refused.add(function)
            graphs.clear()
            log.warning("not_compiled function=%s reason=%s", function.__name__, _reason(err))
        return result

    def num_graphs(self) -> int:
        """How many graphs there are."""
        return sum(len(graphs) for graphs in self._graphs.values())

    def _is_due(self, function: Call, key: Hashable) -> bool:
        """Whether to compile a shape now, of which there is no graph yet."""
        if len(self._graphs[function]) == self._max_graphs:
            return False
        self._calls[function, key] += 1
        return self._calls[function, key] > self._usual_calls


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


def _reason(err: Exception) -> str:
    """The first lines of the compiler's complaint, which may have hundreds."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {' '.join(lines)[:500]}"
