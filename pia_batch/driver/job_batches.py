"""Batches of a job: consumes a Dataset for `prepare`, `export` and `evaluate`; notices a stop and the end of Ray."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pyarrow as pa
import ray.data

from pia_batch.driver import monitor, ray_cluster
from pia_batch.driver.own_ray_node import check_processes
from pia_batch.errors import InterruptedRunError

_CHECK_S = 0.5
"""Seconds between two checks for a stop and for the programs of Ray."""


def batches_of(
    dataset: ray.data.Dataset, stop: threading.Event | None = None, stopped: str = "stopped"
) -> Iterator[pa.Table]:
    """Yield the batches of a Dataset as its tasks finish them; end its execution at the end, whatever that is.

    Another thread waits for Ray, which answers nothing once one of its programs has ended.

    Args:
        dataset: Dataset of a few small rows, such as the records of what its tasks have stored.
        stop: Event that ends the iteration.
        stopped: Message of the error that it then ends with.

    Raises:
        PiaBatchError: A task failed; its own error, without Ray's wrappers.
        InterruptedRunError: `stop` was set, Ray has ended or lost a worker for good, or a store failed.
    """
    found: queue.Queue[pa.Table | BaseException | None] = queue.Queue()

    def consume() -> None:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                found.put(batch)
        except BaseException as err:  # noqa: BLE001 - handed to the thread that waits
            found.put(err)
        found.put(None)

    threading.Thread(target=consume, name="batches", daemon=True).start()
    try:
        while (batch := _next(found, stop, stopped)) is not None:
            yield batch
    finally:
        ray_cluster.end_execution(dataset)


def _next(
    found: queue.Queue[pa.Table | BaseException | None], stop: threading.Event | None, stopped: str
) -> pa.Table | None:
    """Return the next batch, which may take minutes, or None after the last."""
    while stop is None or not stop.is_set():
        try:
            item = found.get(timeout=_CHECK_S)
        except queue.Empty:
            check_processes()
            continue
        if isinstance(item, BaseException):
            raise monitor.unwrapped(item) from None
        return item
    raise InterruptedRunError(stopped)
