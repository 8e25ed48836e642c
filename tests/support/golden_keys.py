"""Recorded content keys and engine ids: rows of `tests/schema/keys.json`, and the same rows as the code has them now.

As a program, it writes the keys of the rows on standard input: a test asks another tree of the package for them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.manifest.validation import check
from pia_batch.schema.columns import REQUEST
from pia_batch.weights.components import Component
from pia_batch.weights.identity import engine_id
from pia_batch.weights.resolve import Weights

RECORDED = Path(__file__).parents[1] / "schema" / "keys.json"

ROW: dict[str, Any] = {"request_id": "a", "image": "s3://photos/a.png", "prompt": "a red circle", "seed": 7}
PATHS = {"manifest": "m.parquet", "output": "out", "model.base": "some/model"}


def recorded() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return rows


def computed(row: dict[str, Any]) -> str:
    """The key of a recorded row: a content key, or for a `kind` of engine an engine id."""
    config = RunConfig.load(None, PATHS | row.get("config", {}))
    if row["kind"] == "engine":
        return _engine_id(config)
    columns = ROW | row.get("columns", {})
    if columns.get("prompts"):  # a row has one or the other
        del columns["prompt"]
    table = pa.table({name: pa.array([value], REQUEST.field(name).type) for name, value in columns.items()})
    found = check(table, config, {"default": "e" * 32})
    assert not len(found.rejected), found.rejected["error"].to_pylist()
    return str(found.requests["key"][0].as_py())


def _engine_id(config: RunConfig) -> str:
    """The id of an engine whose weights are pinned by commits, so that no file is read."""
    model = config.model

    def part(name: str) -> Component:
        return Component(Path(name), None, ("model.safetensors",), (name[0] * 40))

    adapter = None if model.ip_adapter is None else part("ip_adapter")
    return engine_id(
        model,
        Weights(
            base=Path("base"),
            components={name: part(name) for name in ("unet", "vae", "text_encoder", "motion_adapter", "scheduler")},
            loras=tuple(part("lora") for _ in model.loras),
            textual_inversions=tuple(part("words") for _ in model.textual_inversions),
            ip_adapter=adapter,
            image_encoder=adapter and part("encoder"),
        ),
        "float16",
    )


if __name__ == "__main__":
    json.dump([computed(row) for row in json.load(sys.stdin)], sys.stdout)
