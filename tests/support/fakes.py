"""Stand-ins for slow or remote parts, in a module that Ray's workers can import."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from pia_batch.config import RunConfig
from pia_batch.errors import NonFiniteError, RequestError
from pia_batch.journal.log import Journal
from pia_batch.pipeline.animate import THIS_PROCESS, Animate, WorkerProcess
from pia_batch.pipeline.attempts import AttemptTracker
from pia_batch.pipeline.committer import Commits
from pia_batch.schema.columns import Row
from pia_batch.storage.object_store import Store

ENGINE_ID = "f" * 32


@dataclass
class FakeClip:
    """The part of `pia_batch.engine.Clip` that is used by `pipeline.animate.Animate`."""

    generated: Any = None
    error: RequestError | None = None
    prompt_tokens: int = 7
    prompt_truncated: bool = False
    device_seconds: float = 0.01

    @property
    def frames(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.generated


@dataclass
class FakeEngine:
    """An engine that rolls the image by one pixel a frame, fails a shot whose prompt says so, and keeps its calls."""

    engine_id: str = ENGINE_ID
    device: str = "fake"
    seconds: float = 0.0
    calls: list[list[Any]] = field(default_factory=list)

    @staticmethod
    def shot(**settings: Any) -> SimpleNamespace:
        """Return a shot of these settings; curve and clip_skip default to None, as in `pia_batch.engine.Shot`."""
        return SimpleNamespace(**({"motion_curve": None, "clip_skip": None} | settings))

    def check(self) -> None:
        """A fake device is never broken."""

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        self.calls.append(list(shots))
        time.sleep(self.seconds)
        return [self._clip(shot) for shot in shots]

    @staticmethod
    def _clip(shot: Any) -> FakeClip:
        if "not finite" in (shot.prompt or ""):
            return FakeClip(error=NonFiniteError("the latents of this request are not finite"))
        picture = np.asarray(shot.image)
        return FakeClip(np.stack([np.roll(picture, k, axis=1) for k in range(shot.num_frames)]))


@dataclass
class PoisonedEngine(FakeEngine):
    """An engine that does to its process what the prompt says."""

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        for shot in shots:
            if "raises" in shot.prompt:
                raise RuntimeError("weights are cursed")
            if "exits" in shot.prompt:
                os._exit(3)
            if "crashes" in shot.prompt:
                ctypes.string_at(0)  # in this thread and at once; a signal that is sent may be served by another, later
            if "hangs" in shot.prompt:
                time.sleep(3600)
            if "hungers" in shot.prompt:
                raise MemoryError
            if "eats" in shot.prompt:
                _eat(3 * 2**30)
        return super().animate(shots)


@dataclass
class RestlessEngine(FakeEngine):
    """An engine that never generates the same pixels twice, as no two batches do on a GPU, so that a mix-up shows."""

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        clips = super().animate(shots)
        for clip in clips:
            if clip.error is None:
                clip.generated = clip.generated ^ np.uint8(os.urandom(1)[0])
        return clips


def _eat(num_bytes: int) -> None:
    """Take memory in steps, until something ends this process, and release it."""
    hoard = []
    while len(hoard) * 2**25 < num_bytes:
        hoard.append(np.ones(2**25, np.uint8))
        time.sleep(0.02)


@dataclass
class FakeShelf:
    """`engines.Engines` of one engine for every name, or of those given; remembers what it was asked for."""

    default: Any = None
    engines: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def engine(self, name: str) -> Any:
        self.asked.append(name)
        return self.engines.get(name, self.default)


class FakeControl(AttemptTracker):
    """The run's tracker, in this process. Remembers what ended."""

    def __init__(self, max_attempts: int = 3) -> None:
        super().__init__(max_attempts)
        self.ended: list[str] = []

    def end(self, outcomes: list[Row]) -> None:
        self.ended += [outcome["key"] for outcome in outcomes]
        super().end(outcomes)


@dataclass(frozen=True)
class FakeEngineLoader:
    """The loader that a run gives to its workers instead of `engines.EngineLoader`."""

    engine_id: str
    seconds: float = 0.0
    engine: type[FakeEngine] = FakeEngine

    def __call__(self) -> FakeShelf:
        return FakeShelf(self.engine(engine_id=self.engine_id, seconds=self.seconds))


def animate_stage(  # noqa: PLR0913 - what a test leaves out is the usual
    config: RunConfig,
    engine: Any = None,
    control: Any = None,
    run_id: str = "run-1",
    *,
    shelf: FakeShelf | None = None,
    engine_ids: dict[str, str] | None = None,
    store: Store | None = None,
    commits: Commits | None = None,
    process: WorkerProcess = THIS_PROCESS,
) -> Animate:
    """The last stage around a fake engine, the config's output and its journal, or what is given instead."""
    engines, store = shelf or FakeShelf(engine or FakeEngine()), store or Store(config.output)
    ids = engine_ids or {"default": ENGINE_ID}
    commits = commits or Journal(store)
    return Animate(lambda: engines, ids, config, run_id, control or FakeControl(), store, commits, process)
