"""Pictures and manifests that more than one file of tests needs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image


def png(seed: int = 0, width: int = 64, height: int = 64) -> bytes:
    """Return a smooth random picture as a PNG file."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    sink = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(sink, "PNG")
    return sink.getvalue()


def requests_table(count: int = 4, **columns: Any) -> pa.Table:
    """Return a manifest of `count` good requests for the embedded model; `columns` are added or replaced."""
    table: dict[str, Any] = {
        "request_id": [f"r{k:03d}" for k in range(count)],
        "image": [f"images/{k % 4}.png" for k in range(count)],
        "prompt": [f"a red circle moving left, number {k}" for k in range(count)],
    }
    return pa.table(table | columns)
