"""Cache of what functions return for Arrow types, those included that have no hash."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

T = TypeVar("T")


def cached_by_type(function: Callable[[pa.DataType], T]) -> Callable[[pa.DataType], T]:
    """Return `function` with a cache of its results.

    Extension types that a program registers, such as those of geometries, often define `__eq__` and so have no hash.
    """
    cached = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def call(data_type: pa.DataType) -> T:
        try:
            hash(data_type)
        except TypeError:
            return function(data_type)
        return cached(data_type)

    return call
