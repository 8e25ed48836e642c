"""Values of Arrow columns in the types of JSON."""

from __future__ import annotations

import datetime as dt
import decimal
import math
from collections.abc import Callable
from typing import Any


def of_any(value: Any) -> Any:  # any value that Arrow holds
    """Return a value: times in ISO 8601, durations in seconds, NaN and infinity as null, bytes in hexadecimal."""
    if isinstance(value, dict):
        return {key: of_any(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [of_any(item) for item in value]
    return next((convert(value) for kind, convert in _CONVERSIONS if isinstance(value, kind)), value)


_CONVERSIONS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (float, lambda value: value if math.isfinite(value) else None),
    (bytes, bytes.hex),
    ((dt.date, dt.time), lambda value: value.isoformat()),
    (dt.timedelta, dt.timedelta.total_seconds),
    (decimal.Decimal, str),
)
