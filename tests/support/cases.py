"""Random manifests of a few small rows, some of them bad, and the result that each row must have."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from inputs import png

from pia_batch.config import RunConfig
from pia_batch.errors import NonFiniteError

POISON = {
    "raises": "engine_error",
    "hungers": "out_of_memory",
    "kills": "worker_crash",
    "hangs": "timeout",
    "not finite": NonFiniteError.kind,
}
"""Effect of a prompt on its engine, and the `error_kind` that follows."""


@dataclass(frozen=True)
class Case:
    """A manifest and the results that it must have, known without the code under test."""

    config: RunConfig
    expected: Counter[tuple[str, str, str | None]]
    """Number of results that there must be of each request id, status and error kind."""
    batches: int = 1
    """Number of batches of a task."""

    @classmethod
    @functools.cache
    def make(cls, number: int, folder: Path) -> Case:
        """Make the case of this number, always the same: 2 to 7 rows, 16 x 16 pixels, 2 or 3 frames, some bad."""
        random = Random(number)
        rows, expected = [], Counter[tuple[str, str, str | None]]()
        mixed = random.random() < 0.3
        for index in range(random.randint(2, 7)):
            fate = random.choices(("good", "poison", "no image", "bad seed"), (12, 3, 1, 1))[0]
            poison = random.choice(list(POISON)) if fate == "poison" else None
            row = {
                "request_id": f"r{index}",
                "image": "absent.png" if fate == "no image" else f"{index % 2}.png",
                "prompt": poison or "a red circle",
                "seed": -1 if fate == "bad seed" else index,
                "num_frames": random.choice((2, 3)) if mixed else 2,
                "format": random.choice(("png_zip", "png_zip", "png_zip", "gif")),
            }
            kind = {"no image": "image_unavailable", "bad seed": "out_of_range"}.get(fate, POISON.get(poison or ""))
            rows.append(row)
            match random.choices(("once", "twice", "contradicted"), (12, 2, 1))[0] if fate != "bad seed" else "once":
                case "twice":
                    rows.append(row)
                case "contradicted":
                    rows.append(row | {"prompt": "a blue square"})
                    expected[row["request_id"], "failed", "duplicate_id"] = 2
                    continue
            expected[row["request_id"], "failed" if kind else "succeeded", kind] = 1
        manifest = folder / f"case-{number}"
        manifest.mkdir(exist_ok=True)
        for index in range(2):
            (manifest / f"{index}.png").write_bytes(png(index, 16, 16))
        pq.write_table(pa.Table.from_pylist(rows), manifest / "requests.parquet")
        settings = {
            "manifest": str(manifest),
            "output": str(folder / "nowhere"),
            "defaults.width": 16,
            "defaults.height": 16,
            "images.threads": 1,
            "placement.batch_size": random.randint(1, 4),
            "placement.max_engines": random.randint(1, 3),
            "limits.max_attempts": random.randint(2, 3),
        }
        return cls(RunConfig.load(None, settings), expected, batches=random.choice((1, 1, 2, 3)))
