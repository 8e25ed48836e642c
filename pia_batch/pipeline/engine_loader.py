"""What the last stage needs of engines, and what gives them to a worker. No torch before a worker asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pia_batch.config import ModelConfig


class Engine(Protocol):
    """What `Animate` needs of `pia_batch.engine.PiaEngine`."""

    @property
    def engine_id(self) -> str:
        """Identity of weights, scheduler, dtype and engine version."""

    @property
    def device(self) -> str:
        """Where it draws, such as `cuda:0`."""

    @property
    def shot(self) -> Callable[..., Any]:
        """Makes one request for `animate` of image, prompt and every setting, by keyword."""

    def check(self) -> None:
        """Draw a known request, or raise BrokenDeviceError."""

    def animate(self, shots: Sequence[Any]) -> Sequence[Any]:
        """One clip for each shot, in order; a clip that could not be drawn bears its error."""


class Engines(Protocol):
    """What `Animate` needs of `pia_batch.engine.model_cache.ModelCache`."""

    def engine(self, name: str) -> Engine:
        """The engine of a model, loaded if it is not at hand. It may put away another one for that."""


@dataclass(frozen=True)
class EngineLoader:
    """Makes the shelf of models, on the worker that calls it: the driver never imports torch."""

    models: Mapping[str, ModelConfig]
    device: str
    max_models: int | None

    def __call__(self) -> Engines:
        """The shelf, empty: an engine is loaded when it is asked for."""
        from pia_batch.engine.model_cache import ModelCache

        return ModelCache(self.models, self.device, max_models=self.max_models)
