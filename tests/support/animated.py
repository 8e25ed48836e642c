"""Requests of a manifest after each stage, and what the last one committed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from fakes import ENGINE_ID, FakeClip, FakeEngine, animate_stage

from pia_batch.config import RunConfig
from pia_batch.errors import BrokenDeviceError
from pia_batch.journal.log import Journal
from pia_batch.manifest.reader import Manifest
from pia_batch.pipeline.stages import FetchImages, Validate
from pia_batch.schema.columns import Row
from pia_batch.storage.object_store import Store


def validated(config: RunConfig) -> pa.Table:
    found = Manifest.open(config.manifest)
    rows = pa.concat_tables([batch.table for batch in found.batches()])
    return Validate(config, {"default": ENGINE_ID})(rows)


def fetched(config: RunConfig) -> pa.Table:
    return FetchImages(config.images, Manifest.open(config.manifest).folder)(validated(config))


def animated(config: RunConfig, engine: Any = None, control: Any = None) -> dict[str, Row]:
    """The result rows of a whole manifest, by request, through all stages and back out of the journal."""
    animate_stage(config, engine, control)(fetched(config))
    return committed(config)


def committed(config: RunConfig) -> dict[str, Row]:
    record = Journal(Store(config.output))
    rows = [row for table in record.winning_rows(record.outcomes()) for row in table.to_pylist()]
    return {row["request_id"]: row for row in rows}


def stored(config: RunConfig) -> dict[str, bytes]:
    store = Store(config.output)
    return {store.uri_of(item.name): store.read(item.name) for item in store.list("animations/")}


class Died(BaseException):
    """The end of a worker's process, as far as this one is concerned. Nothing of the worker may catch it."""


@dataclass
class Poisoned(FakeEngine):
    """Does to its process what a prompt says; is broken for good where `sick`."""

    sick: bool = False

    def check(self) -> None:
        if self.sick:
            raise BrokenDeviceError("the device is gone")

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        for shot in shots:
            if "raises" in shot.prompt:
                raise RuntimeError("weights are " + "cursed")
            if "hungers" in shot.prompt:
                raise MemoryError
            if "kills" in shot.prompt:
                raise Died
            if "hangs" in shot.prompt:
                time.sleep(0.4)
        return super().animate(shots)
