"""Stand-ins for what is slow or far away. Importable by Ray's workers, so a module of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from pia_batch.errors import NonFiniteError, RequestError

ENGINE_ID = "f" * 32


@dataclass
class FakeClip:
    """What `pia_batch.engine.Clip` offers to `stages.Animate`."""

    drawn: Any = None
    error: RequestError | None = None
    prompt_tokens: int = 7
    prompt_truncated: bool = False
    device_seconds: float = 0.01

    @property
    def frames(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.drawn


@dataclass
class FakeEngine:
    """Rolls the condition image by one pixel a frame; fails a shot whose prompt says so. Counts its calls."""

    engine_id: str = ENGINE_ID
    device: str = "fake"
    seconds: float = 0.0
    calls: list[list[Any]] = field(default_factory=list)
    shot = SimpleNamespace

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        self.calls.append(list(shots))
        time.sleep(self.seconds)
        return [self._draw(shot) for shot in shots]

    @staticmethod
    def _draw(shot: Any) -> FakeClip:
        if "not finite" in shot.prompt:
            return FakeClip(error=NonFiniteError("the latents of this request are not finite"))
        picture = np.asarray(shot.image)
        return FakeClip(np.stack([np.roll(picture, k, axis=1) for k in range(shot.num_frames)]))


class FakeControl:
    """`stages.Control` in one process."""

    def __init__(self) -> None:
        self.stopping = False
        self.begun: dict[str, int] = {}
        self.ended: list[str] = []

    def begin(self, keys: list[str]) -> list[int] | None:
        if self.stopping:
            return None
        for key in keys:
            self.begun[key] = self.begun.get(key, 0) + 1
        return [self.begun[key] for key in keys]

    def end(self, keys: list[str]) -> None:
        self.ended += keys


@dataclass(frozen=True)
class FakeEngineLoader:
    """What a run gives to its workers instead of `stages.EngineLoader`."""

    engine_id: str
    seconds: float = 0.0

    def __call__(self) -> FakeEngine:
        return FakeEngine(engine_id=self.engine_id, seconds=self.seconds)
