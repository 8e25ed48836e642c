"""The small pipeline with an image-prompt adapter, in memory and in folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ip_adapters
from diffusers import PIAPipeline
from pipelines import (
    build,
    save,
)

from pia_batch.config import IpAdapterConfig, ModelConfig, SchedulerConfig
from pia_batch.engine import PiaEngine


@dataclasses.dataclass(frozen=True)
class Adapted:
    """One model twice: as a pipeline that loaded an adapter, and as folders."""

    pipe: PIAPipeline
    model: ModelConfig

    def engine(self) -> PiaEngine:
        return PiaEngine.load(self.model, device="cpu")


def adapted(folder: Path, layout: ip_adapters.Layout = "plain") -> Adapted:
    pipe = build()
    save(pipe, folder / "base")
    path = ip_adapters.write(folder, layout)
    ip_adapters.load(pipe, path)
    pipe.unet.eval()  # the adapter's layers arrive as if they were to be trained
    model = ModelConfig(
        base=str(folder / "base"),
        scheduler=SchedulerConfig(name="checkpoint"),
        ip_adapter=IpAdapterConfig(source=str(path)),
    )
    return Adapted(pipe, model)
