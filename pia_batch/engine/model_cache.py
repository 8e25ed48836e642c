"""Model cache: loads several models in one process on demand, and evicts them when memory runs short."""

from __future__ import annotations

import gc
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch

from pia_batch.config import ModelConfig
from pia_batch.engine.engine import PiaEngine
from pia_batch.engine.offloading import total_memory
from pia_batch.engine.shared_weights import SharedParts
from pia_batch.errors import ConfigError, is_out_of_memory

log = logging.getLogger(__name__)

WEIGHTS_SHARE = 0.6
"""Share of a device's memory that the weights of all models may take; the rest is for activations."""


def budget(device: torch.device) -> int:
    """Return the number of bytes of this device's memory that weights may take."""
    return int(WEIGHTS_SHARE * total_memory(device))


class ModelCache:
    """Engines of several models on one device; as many at a time as the memory budget allows.

    Parts that models have in common are in memory once: equal text encoders, VAEs, tokenizers and UNets, and the
    motion modules of UNets with the same motion adapter. Sharing does not change any clip. The cache is not
    thread-safe.

    Args:
        models: Model configs by name.
        device: Torch device such as `cpu` or `cuda:0`. None: a GPU if there is one, else the CPU.
        max_models: Largest number of engines in memory at a time. None: as many as the budget allows.
        budget: Function that returns the number of bytes that weights may take of a device. The model in use may
            exceed it.
        load: Function that creates the engine of a model, on a device, with shared parts.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        device: str | None = None,
        *,
        max_models: int | None = None,
        budget: Callable[[torch.device], int] = budget,
        load: Callable[[ModelConfig, str | None, SharedParts], PiaEngine] = PiaEngine.load,
    ) -> None:
        self._models, self._device, self._max_models = dict(models), device, max_models
        self._budget, self._load_engine = budget, load
        self._shared = SharedParts()
        self._engines: OrderedDict[str, PiaEngine] = OrderedDict()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory, the most recently used one last."""
        return tuple(self._engines)

    def engine(self, name: str) -> PiaEngine:
        """Return the engine of a model; load it if it is not in memory.

        Call this method for every use: a reference that the caller keeps prevents the model from being evicted.

        Raises:
            ConfigError: There is no such model, it cannot be loaded, or the device's memory is too small for it alone.
        """
        if name not in self._models:
            raise ConfigError(f"there is no model {name!r}; the config has {', '.join(sorted(self._models))}")
        if name not in self._engines:
            self._evict(down_to=len(self._models) if self._max_models is None else self._max_models - 1)
            self._engines[name] = self._load(name)
            while len(self._engines) > 1 and self._is_over_budget():
                self._evict(down_to=len(self._engines) - 1)
        self._engines.move_to_end(name)
        return self._engines[name]

    def _load(self, name: str) -> PiaEngine:
        began = time.monotonic()
        engine = self._try_to_load(name)
        if engine is None and self._engines:
            self._evict(down_to=0)
            engine = self._try_to_load(name)
        if engine is None:
            raise ConfigError(
                f"model {name!r} alone is too large for the device's memory; set its `memory` to `low`, or use a "
                "larger device"
            )
        log.info("model_loaded name=%s seconds=%.1f", name, time.monotonic() - began)
        return engine

    def _try_to_load(self, name: str) -> PiaEngine | None:
        """Return the engine, or None if memory ran out; then no traceback keeps the partly loaded model alive."""
        try:
            return self._load_engine(self._models[name], self._device, self._shared)
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            log.warning("model_load_failed name=%s loaded=%d reason=%s", name, len(self._engines), err)
            return None

    def _is_over_budget(self) -> bool:
        return any(size > self._budget(device) for device, size in self._shared.num_bytes().items())

    def _evict(self, down_to: int) -> None:
        """Evict the least recently used models until at most `down_to` are left."""
        while len(self._engines) > down_to:
            name = next(iter(self._engines))
            del self._engines[name]
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.info("model_evicted name=%s", name)
