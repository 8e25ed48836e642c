"""Fake engines on the nodes of a cluster: each one's device is its node, and a folder says where engines are."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fakes import FakeEngine, FakeShelf

from pia_batch.pipeline.engine_loader import EngineLoader


@dataclass
class NodeEngine(FakeEngine):
    """Its device is its node. Generates once `crowd` engines exist; on a node with a hold file, never again."""

    folder: Path = Path()
    crowd: int = 1

    def animate(self, shots: Any) -> Any:
        while len(list(self.folder.glob("*.engine"))) < self.crowd:
            time.sleep(0.05)
        if (self.folder / f"{self.device}.hold").exists():
            (self.folder / f"{self.device}.held").touch()
            time.sleep(3600)
        began = time.time()
        clips = super().animate(shots)
        with (self.folder / f"{self.device}.calls").open("a") as calls:
            calls.write(f"{began} {time.time()}\n")
        return clips


def calls_of(folder: Path, node: str) -> list[tuple[float, float]]:
    """Return the beginning and the end of each call of the engine on a node, in seconds."""
    lines = (folder / f"{node}.calls").read_text().splitlines()
    return [(float(began), float(ended)) for began, ended in map(str.split, lines)]


@dataclass(frozen=True)
class NodeEngineLoader:
    """Loader that notes in `folder` on which nodes engines were loaded.

    A call takes `seconds`, or what `seconds_on` says of the node.
    """

    engine_id: str
    folder: Path
    crowd: int
    seconds: float = 0.1
    seconds_on: Mapping[str, float] = field(default_factory=dict)

    def __call__(self) -> FakeShelf:
        import ray  # noqa: PLC0415 - slow, and on a worker only

        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"{node}.engine").touch()
        seconds = self.seconds_on.get(node, self.seconds)
        return FakeShelf(NodeEngine(self.engine_id, node, seconds, folder=self.folder, crowd=self.crowd))


def loaded_engine(load: EngineLoader, folder: Path, crowd: int) -> tuple[str, list[str]]:
    """Load an engine as a worker does, once `crowd` workers want one; return its id and what was logged meanwhile."""
    messages: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("pia_batch")
    logger.setLevel(logging.INFO)
    logger.addHandler(Notes())
    engines = load()
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < crowd:
        time.sleep(0.05)
    return engines.engine("default").engine_id, messages
