"""Requests by number, and journals that hold their outcomes."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pia_batch.errors import StorageError
from pia_batch.journal.layout import animation_name
from pia_batch.journal.log import Journal, Outcomes
from pia_batch.journal.results import PublishedResults, publish
from pia_batch.schema.columns import results_table
from pia_batch.schema.keys import Keys, KeySet, keys_from_hex, keys_to_hex
from pia_batch.storage.object_store import ObjectInfo, Store

T = TypeVar("T")

SHOP = pa.schema([("shop", pa.string())])


def key(number: int) -> str:
    """Return the key of a numbered request."""
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


def content(number: int) -> bytes:
    """Return the animation of a numbered request."""
    return f"the animation of request {number}".encode()


def results(store: Store, statuses: dict[int, str], note: str | None = None, shops: pa.Array | None = None) -> pa.Table:
    """Return result rows of requests, by number; `note` is their run id, which decides nothing."""
    numbers, count = list(statuses), len(statuses)
    done = [statuses[number] == "succeeded" for number in numbers]

    def where_done(values: Iterable[Any]) -> pa.Array:
        return pa.array([value if good else None for value, good in zip(values, done, strict=True)])

    columns = {
        "request_id": pa.array([f"r{number:03d}" for number in numbers], pa.string()),
        "key": pa.array([key(number) for number in numbers], pa.string()),
        "status": pa.array([statuses[number] for number in numbers], pa.string()),
        "error_kind": pa.array([None if good else "non_finite" for good in done], pa.string()),
        "animation_uri": where_done(store.uri_of(animation_name(key(number), "gif")) for number in numbers),
        "num_bytes": where_done(len(content(number)) for number in numbers),
        "sha256": where_done(hashlib.sha256(content(number)).hexdigest() for number in numbers),
        "run_id": pa.array([note] * count, pa.string()),
    }
    carried = pa.table({"shop": [f"shop {number}" for number in numbers] if shops is None else shops})
    return results_table(columns, carried, count)


def commit(record: Journal, statuses: dict[int, str], **options: Any) -> str:
    """Store the animations of the succeeded ones, then one fragment for all."""
    for number, status in statuses.items():
        if status == "succeeded":
            record.store.replace(animation_name(key(number), "gif"), content(number))
    return record.append(results(record.store, statuses, **options))


def keyset(*numbers: int) -> KeySet:
    """Return the keys of numbered requests as a set."""
    return KeySet.of(keys_from_hex(pa.array([key(number) for number in numbers], pa.string())))


def successes(outcomes: Outcomes) -> dict[str, bool]:
    """Return by key whether an outcome is a success."""
    return dict(zip(keys_to_hex(outcomes.keys).to_pylist(), outcomes.succeeded.tolist(), strict=True))


class RecordingStore(Store):
    """Store that records the names of written objects, in order."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.written: list[str] = []

    def replace(self, name: str, data: bytes) -> None:
        super().replace(name, data)
        self.written.append(name)

    def replace_file(self, name: str, path: Path) -> ObjectInfo:
        stored = super().replace_file(name, path)
        self.written.append(name)
        return stored


class FailingStore(Store):
    """Store that answers a number of requests, and is down from then on."""

    def __init__(self, uri: str, answered: int) -> None:
        super().__init__(uri)
        self._left = answered

    def _attempt(self, call: Callable[[], T], verb: str, name: str) -> T:
        if self._left <= 0:
            raise StorageError(f"cannot {verb} {name}: the store is down")
        self._left -= 1
        return super()._attempt(call, verb, name)


def outages(store: Store, folder: Path, work: Callable[[FailingStore], object]) -> Iterator[Store]:
    """Yield a copy of a local store after each outage of `work`: from its first request on, from its second, and so on.

    The last copy is one whose work came to its end.
    """
    for answered in itertools.count():
        copy = Path(shutil.copytree(store.uri.removeprefix("file://"), folder / str(answered)))
        try:
            work(FailingStore(str(copy), answered))
        except StorageError:
            yield Store(str(copy))
        else:
            assert answered > 0
            yield Store(str(copy))
            return


def published_by(record: Journal) -> list[str]:
    assert isinstance(record.store, RecordingStore)
    return [name for name in record.store.written if name.startswith("results/")]


def publish_all(record: Journal, *numbers: int, run_id: str = "run-1", **about: Any) -> PublishedResults:
    return publish(record, record.outcomes(), keyset(*numbers), SHOP, run_id, about)


def rows_of(record: Journal, run_id: str = "run-1") -> list[dict[str, Any]]:
    folder = Path(record.store.uri.removeprefix("file://"), "results", run_id)
    return pq.read_table(folder).sort_by("request_id").to_pylist()


def keys(*numbers: int) -> Keys:
    return keys_from_hex(pa.array([key(number) for number in numbers], pa.string()))
