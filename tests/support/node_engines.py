"""Fake engines on the nodes of a cluster: each one's device is its node, and a folder says where engines are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import FakeEngine, FakeShelf


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
        return super().animate(shots)


@dataclass(frozen=True)
class NodeEngineLoader:
    """Loader that notes in `folder` on which nodes engines were loaded."""

    engine_id: str
    folder: Path
    crowd: int
    seconds: float = 0.1

    def __call__(self) -> FakeShelf:
        import ray  # noqa: PLC0415 - slow, and on a worker only

        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"{node}.engine").touch()
        return FakeShelf(NodeEngine(self.engine_id, node, self.seconds, folder=self.folder, crowd=self.crowd))
