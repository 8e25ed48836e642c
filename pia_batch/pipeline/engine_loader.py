"""Interface of the engines that a worker holds, and the loader that makes them. The driver imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pia_batch.config import ModelConfig, RunConfig
from pia_batch.pipeline.heavy_imports import garbage_collection_paused


class Engine(Protocol):
    """The part of `pia_batch.engine.PiaEngine` that the last stage uses."""

    @property
    def engine_id(self) -> str:
        """Identity of weights, scheduler, dtype and engine version."""

    @property
    def device(self) -> str:
        """Name of its device, such as `cuda:0`."""

    @property
    def shot(self) -> Callable[..., Any]:
        """Constructor of a request for `animate`, from image, prompt and every setting, by keyword."""

    def check(self) -> None:
        """Generate the self-test's clip, or raise BrokenDeviceError."""

    def animate(self, shots: Sequence[Any]) -> Sequence[Any]:
        """Return one clip for each shot, in order; a clip that could not be generated holds its error."""


class Engines(Protocol):
    """The part of `pia_batch.engine.model_cache.ModelCache` that the last stage uses."""

    def engine(self, name: str) -> Engine:
        """Return the engine of a model, loaded if necessary. It may evict another one for that."""


LoadEngines = Callable[[], Engines]
"""Function that gives a worker its engines."""


@dataclass(frozen=True)
class EngineLoader:
    """Loader of the config's models, called on the worker, so that the driver never imports torch.

    Attributes:
        models: Models by name.
        device: Device of the engines: `cuda` or `cpu`.
        max_models: Maximum number of models held at once, or None.
    """

    models: Mapping[str, ModelConfig]
    device: str
    max_models: int | None

    @classmethod
    def of(cls, config: RunConfig) -> EngineLoader:
        """Return the loader of the config's models."""
        device = "cuda" if config.placement.num_gpus else "cpu"
        return cls(config.all_models, device, config.placement.max_models)

    def __call__(self) -> Engines:
        """Return an empty model cache: an engine is loaded when it is first used."""
        with garbage_collection_paused():
            from pia_batch.engine.model_cache import ModelCache

        return ModelCache(self.models, self.device, max_models=self.max_models)
