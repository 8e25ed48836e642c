"""Garbage collection: finds objects under an output that are no longer used. They are deleted on demand only.

There are seven kinds: animations and posters that no result names (a worker died between storing and committing one,
or outlived its run), unfinished files of killed writers on a local disk, old generations of the lease, results that
were never completed, evaluations that were never completed and the pieces of complete ones, and replaced parts of the
journal's index and of the scan caches. Three things are never garbage: objects that the journal or the newest published
results name, objects whose name is not one of this package's, and objects younger than the age that the operator gives,
because they may belong to active work. Nothing is deleted during a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pia_batch.errors import StorageError
from pia_batch.journal import layout, pack_index
from pia_batch.journal.log import Journal
from pia_batch.journal.results import read_latest
from pia_batch.schema.keys import KEY_BYTES, Keys, KeySet, keys_from_hex
from pia_batch.storage.object_store import ObjectInfo, Store

GarbageKind = Literal["animations", "staged", "leases", "results", "evaluations", "index", "scans"]

GARBAGE_KINDS: dict[GarbageKind, str] = {
    "animations": "animations and posters that no result names",
    "staged": "unfinished files of killed writers",
    "leases": "old generations of the lease",
    "results": "results that were never completed",
    "evaluations": "unfinished evaluations and leftover pieces",
    "index": "replaced parts of the journal's index",
    "scans": "scans of manifests that have changed",
}

KEPT_LEASES = 3
"""Newest generations that stay: the current one, and earlier ones with which a delayed run must collide."""

DELETE_THREADS = 16

_WINDOW = 10_000
"""Objects that are compared with the journal at a time, which bounds the memory of a listing."""


@dataclass(frozen=True)
class Garbage:
    """Object that is no longer used."""

    kind: GarbageKind
    info: ObjectInfo


def find_garbage(journal: Journal, before_s: float) -> Iterator[Garbage]:
    """Find the objects under the output that are no longer used and were last written before a moment.

    Memory grows with the journal, by about 230 bytes per finished request, and not with the number of listed objects.

    Args:
        journal: Journal of the output.
        before_s: This moment, in seconds since 1970 by the store's clock.

    Raises:
        StorageError: the store refused the request or did not answer, or a fragment is damaged, so that it is unknown
            which objects are used.
    """
    store = journal.store
    used = _UsedKeys(journal)

    def old(item: ObjectInfo) -> bool:
        return item.modified_s is not None and item.modified_s < before_s

    orphans = _unused_animations(filter(old, store.list(layout.ANIMATIONS)), used)
    yield from (Garbage("animations", item) for item in orphans)
    for prefix in layout.PREFIXES:
        yield from (Garbage("staged", item) for item in filter(old, store.staged(prefix)))
    yield from (Garbage("leases", item) for item in filter(old, _old_leases(store)))
    yield from (Garbage("results", item) for item in _incomplete_results(store, old))
    yield from (Garbage("evaluations", item) for item in _unused_of_evaluations(store, old))
    yield from (Garbage("index", item) for item in filter(old, pack_index.superseded(store, layout.FRAGMENT_INDEX)))
    yield from (Garbage("scans", item) for item in filter(old, _unused_scans(store)))


def delete_garbage(store: Store, garbage: Iterable[Garbage], check: Callable[[], None]) -> Iterator[Garbage]:
    """Delete garbage, several objects at a time, and yield each object after it is gone.

    Args:
        store: Output.
        garbage: Garbage of that output, as `find_garbage` found it.
        check: Function to call before every batch of objects; it raises if a run has started.
    """
    found = iter(garbage)
    while batch := list(itertools.islice(found, 8 * DELETE_THREADS)):
        check()
        for _ in store.each(store.delete, [item.info.name for item in batch], DELETE_THREADS):
            pass
        yield from batch


def make_room(store: Store, garbage: Iterator[Garbage]) -> Iterator[Garbage]:
    """Delete garbage where the disk is too full for a lease, until there is room; yield each object after it is gone.

    Raises:
        StorageError: There is still no room.
    """
    for item in garbage:
        store.delete(item.info.name)
        yield item
        if not store.is_full(layout.CREATE_ONLY_PROBE):
            return
    msg = (
        f"the disk of {store.uri} is full, and no more garbage is old enough; delete other files there, or lower "
        "--older-than"
    )
    raise StorageError(msg)


class _UsedKeys:
    """Keys whose animation the journal or the newest results name; follows commits that are made meanwhile."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        published = _published_keys(journal)
        outcomes = journal.outcomes()
        self._fragments = set(outcomes.fragments)
        self._keys = KeySet.of(np.concatenate([outcomes.keys[outcomes.succeeded], published]))

    def unused(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return a mask of the keys that are not in use now; bool, shape (n,)."""
        unused = ~self._keys.contains(keys)
        if not unused.any():
            return unused
        # A worker that outlived its run may have committed some since.
        new = sorted(set(self._journal.fragments()) - self._fragments)
        for table in self._journal.read(new, ["key"]):
            unused &= ~KeySet.of(keys_from_hex(table["key"])).contains(keys)
        return unused


def _published_keys(journal: Journal) -> Keys:
    """Read the keys of the newest complete results, tombstones or not: readers of those results use the animations."""
    newest = read_latest(journal.store)
    keys = [np.empty(0, dtype=f"V{KEY_BYTES}")]
    if newest is not None:
        listed = journal.store.list(f"{layout.results_folder(newest['run_id'])}/")
        names = sorted(item.name for item in listed if item.name.endswith(".parquet"))
        keys += [keys_from_hex(table["key"]) for table in journal.read(names, ["key"])]
    return np.concatenate(keys)


def _unused_animations(listed: Iterable[ObjectInfo], used: _UsedKeys) -> Iterator[ObjectInfo]:
    matched = ((key, item) for item in listed if (key := layout.animation_key(item.name)))
    while window := list(itertools.islice(matched, _WINDOW)):
        unused = used.unused(keys_from_hex(pa.array([key for key, _ in window], pa.string())))
        yield from (item for (_, item), is_unused in zip(window, unused, strict=True) if is_unused)


def _old_leases(store: Store) -> Iterator[ObjectInfo]:
    """Yield all generations of the lease but the newest KEPT_LEASES, from one listing that is not kept in memory."""
    newest: list[ObjectInfo] = []
    for item in store.list(layout.LEASES):
        if layout.lease_generation(item.name) is not None:
            newest = sorted([*newest, item], key=lambda one: one.name, reverse=True)
            yield from newest[KEPT_LEASES:]
            del newest[KEPT_LEASES:]


def _incomplete_results(store: Store, old: Callable[[ObjectInfo], bool]) -> Iterator[ObjectInfo]:
    """Yield the objects of every results folder without `_SUCCESS.json` in which all objects are old."""
    newest = read_latest(store)
    folders: dict[str, list[ObjectInfo]] = {}
    for item in store.list(layout.RESULTS):
        if run_id := layout.results_run_id(item.name):
            folders.setdefault(run_id, []).append(item)
    for run_id, items in sorted(folders.items()):
        complete = any(item.name == layout.success_marker(run_id) for item in items)
        if not complete and all(map(old, items)) and (newest is None or newest["run_id"] != run_id):
            yield from items


def _unused_of_evaluations(store: Store, old: Callable[[ObjectInfo], bool]) -> Iterator[ObjectInfo]:
    """Yield the old pieces of complete evaluations, and all objects of one without `_SUCCESS.json` if all are old."""
    complete: set[str] = set()
    active: set[str] = set()
    for item in store.list(layout.EVALUATIONS):  # twice, as there may be many pieces
        if evaluation := layout.evaluation_id(item.name):
            if item.name == layout.evaluation_success(evaluation):
                complete.add(evaluation)
            if not old(item):
                active.add(evaluation)
    for item in store.list(layout.EVALUATIONS):
        evaluation = layout.evaluation_id(item.name)
        is_piece = layout.evaluation_piece_number(item.name) is not None
        if evaluation and old(item) and (is_piece if evaluation in complete else evaluation not in active):
            yield item


def _unused_scans(store: Store) -> Iterator[ObjectInfo]:
    """Yield what the scan cache that was written last does not need, and every other scan cache.

    The others belong to another manifest or config; the next plan of that config scans again what is deleted of them.
    """
    caches: dict[str, list[ObjectInfo]] = {}
    for item in store.list(layout.SCAN_CACHES):
        if identity := layout.scan_cache_identity(item.name):
            caches.setdefault(identity, []).append(item)
    newest = max(caches, key=lambda name: (max(item.modified_s or 0.0 for item in caches[name]), name), default="")
    for name, items in sorted(caches.items()):
        yield from pack_index.superseded(store, layout.scan_cache_folder(name)) if name == newest else items
