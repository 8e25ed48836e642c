"""Simulated engine of known speed, and requests for it; benchmarks of the surrounding code use it."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGES = 16
"""Number of images that the requests share, as requests of a data set often do."""


def write_manifest(folder: Path, rows: int, side_px: int) -> str:
    """Write requests that share a few smooth images; return the folder's path."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        sink = io.BytesIO()
        small.resize((side_px, side_px), Image.Resampling.BICUBIC).save(sink, "PNG")
        (folder / "images" / f"{number}.png").write_bytes(sink.getvalue())
    table = {
        "request_id": [f"request-{number}" for number in range(rows)],
        "image": [f"images/{number % IMAGES}.png" for number in range(rows)],
        "prompt": [f"a red circle moving left, number {number}" for number in range(rows)],
    }
    pq.write_table(pa.table(table), folder / "requests.parquet", row_group_size=100_000)
    return str(folder)


@dataclass
class SimulatedClip:
    """Clip with the attributes of `Clip` that the pipeline uses."""

    frames: npt.NDArray[np.uint8]
    device_seconds: float
    prompt_tokens: int = 7
    prompt_truncated: bool = False


@dataclass
class SimulatedEngine:
    """Engine that waits as long as a device would compute, shifts the image, and records when batches begin and end."""

    engine_id: str
    seconds: float
    notes: Path
    device: str = "simulated"

    @staticmethod
    def shot(**settings: Any) -> SimpleNamespace:
        """Return the settings as attributes."""
        return SimpleNamespace(**settings)

    def check(self) -> None:
        """Pass: there is no device to test."""

    def animate(self, shots: Sequence[Any]) -> list[SimulatedClip]:
        """Return a clip for each shot, uint8, (num_frames, height, width, 3)."""
        began = time.monotonic()
        clips = [
            SimulatedClip(drifting(np.asarray(shot.image), shot.num_frames), self.seconds / len(shots))
            for shot in shots
        ]
        time.sleep(max(0.0, began + self.seconds - time.monotonic()))
        with (self.notes / str(os.getpid())).open("ab") as sink:
            sink.write(np.array([began, time.monotonic(), len(shots)]).tobytes())
        return clips


def drifting(picture: npt.NDArray[np.uint8], num_frames: int) -> npt.NDArray[np.uint8]:
    """Return the image, shifted one more pixel to the right in each frame."""
    return np.stack([np.roll(picture, number, axis=1) for number in range(num_frames)])


@dataclass
class _SingleEngine:
    """Cache with a single engine, in the place of `ModelCache`."""

    only: SimulatedEngine

    def engine(self, name: str) -> SimulatedEngine:
        del name
        return self.only


@dataclass(frozen=True)
class SimulatedLoader:
    """Loader of simulated engines, in the place of `EngineLoader`.

    Attributes:
        engine_id: Engine id that the run expects.
        seconds: Duration of a batch, in seconds.
        notes: Folder for the engines' records.
        crew: Number of engines that wait for each other before the first one is ready, so that no engine works while
            others use the CPU for their start.
    """

    engine_id: str
    seconds: float
    notes: Path
    crew: int = 1

    def __call__(self) -> _SingleEngine:
        """Return the engine of one worker, once all engines of the crew have started."""
        wait_for_crew(self.notes, self.crew)
        return _SingleEngine(SimulatedEngine(self.engine_id, self.seconds, self.notes))


def wait_for_crew(notes: Path, crew: int) -> None:
    """Wait until a number of engines have started, each of which calls this function.

    The last one makes a file that the others look for. If each counted the others, hundreds of them would busy the CPU
    that the last ones need to start.

    Args:
        notes: Folder of the engines' records, with a file for each engine.
        crew: Number of engines.
    """
    (notes / str(os.getpid())).touch()
    complete = notes.with_name(f"{notes.name}-complete")
    if len(list(notes.iterdir())) >= crew:
        complete.touch()
    while not complete.exists():
        time.sleep(0.1)


def batch_records(notes: Path) -> list[npt.NDArray[np.float64]]:
    """Return for each engine with batches: begin and end of each batch, in monotonic seconds, and its rows; (n, 3)."""
    records = (path.read_bytes() for path in sorted(notes.iterdir()))
    return [np.frombuffer(note).reshape(-1, 3) for note in records if note]
