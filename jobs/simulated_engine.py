"""An engine of known speed and requests for it: what the benchmarks around the engine put in its place."""

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
"""Pictures that the requests share, as requests of a data set often do."""


def write_manifest(folder: Path, rows: int, side_px: int) -> str:
    """Requests that share a few smooth pictures; the folder's path."""
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
    """What an engine hands to `pipeline.animate.Animate`."""

    frames: npt.NDArray[np.uint8]
    device_seconds: float
    prompt_tokens: int = 7
    prompt_truncated: bool = False


@dataclass
class SimulatedEngine:
    """Waits for as long as a device would draw, and lets the picture drift. Notes when it began and when it ended."""

    engine_id: str
    seconds: float
    notes: Path
    device: str = "simulated"

    @staticmethod
    def shot(**settings: Any) -> SimpleNamespace:
        """The settings, by name."""
        return SimpleNamespace(**settings)

    def check(self) -> None:
        """There is no device that could be broken."""

    def animate(self, shots: Sequence[Any]) -> list[SimulatedClip]:
        """A clip for each shot, uint8, (num_frames, height, width, 3)."""
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
    """The picture, one pixel further to the right in each frame."""
    return np.stack([np.roll(picture, number, axis=1) for number in range(num_frames)])


@dataclass
class _Shelf:
    """`engines.Engines` of one engine."""

    only: SimulatedEngine

    def engine(self, name: str) -> SimulatedEngine:
        del name
        return self.only


@dataclass(frozen=True)
class SimulatedLoader:
    """What a run gives to its workers instead of `engines.EngineLoader`.

    Attributes:
        engine_id: what the run expects.
        seconds: that a batch takes.
        notes: a folder for the engines' notes.
        crew: how many engines wait for each other before the first of them is ready, so that none draws while others
            still take the CPU for their start.
    """

    engine_id: str
    seconds: float
    notes: Path
    crew: int = 1

    def __call__(self) -> _Shelf:
        """The engine of one worker, once all of the crew are there."""
        (self.notes / str(os.getpid())).touch()
        while len(list(self.notes.iterdir())) < self.crew:
            time.sleep(0.1)
        return _Shelf(SimulatedEngine(self.engine_id, self.seconds, self.notes))


def drawings(notes: Path) -> list[npt.NDArray[np.float64]]:
    """For each engine that drew: when each batch began and ended, monotonic seconds, and its rows; shape (n, 3)."""
    notes_taken = (path.read_bytes() for path in sorted(notes.iterdir()))
    return [np.frombuffer(note).reshape(-1, 3) for note in notes_taken if note]
