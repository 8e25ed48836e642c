"""What lies below an output and nobody names: found at any time, removed only on demand, and never during a run.

Six sorts: animations that no result names (a worker died between the file and its commit, or a request was drawn by a
zombie), what killed writers have left on a local disk, old generations of the lease, results that never became
complete, and what was replaced in the journal's index and in the scans of manifests. What the journal or the newest
published results name is never garbage, nor is anything that this package did not name itself, and nothing younger than
the age that the operator gives: it may belong to something that goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pia_batch.journal import layout, pack_index
from pia_batch.journal.log import Journal
from pia_batch.journal.results import latest
from pia_batch.schema.keys import KEY_BYTES, Keys, KeySet, keys_from_hex
from pia_batch.storage.object_store import ObjectInfo, Store

Sort = Literal["animations", "staged", "leases", "results", "index", "scans"]

SORTS: dict[Sort, str] = {
    "animations": "animations that no result names",
    "staged": "unfinished files of killed writers",
    "leases": "old generations of the lease",
    "results": "results that were never completed",
    "index": "parts of the journal's index that newer ones replace",
    "scans": "scans of manifests that changed since",
}

KEPT_LEASES = 3
"""The newest generations stay: the holder's name, and what a run that was late by one would collide with."""

DELETE_THREADS = 16

_WINDOW = 10_000
"""Objects that are compared with the journal at a time: what a listing needs of memory."""


@dataclass(frozen=True)
class Garbage:
    """An object that nobody names."""

    sort: Sort
    found: ObjectInfo


def find(journal: Journal, before_s: float) -> Iterator[Garbage]:
    """Everything below the output that nobody names and that was last written before a moment.

    Memory grows with the journal, by about 230 bytes for each finished request, and not with what the listings hold.

    Args:
        journal: of the output.
        before_s: seconds since 1970, by the store's clock.

    Raises:
        StorageError: the store refused or did not answer, or a fragment is damaged: then nobody knows what is named.
    """
    store = journal.store
    named = _Named(journal)

    def old(item: ObjectInfo) -> bool:
        return item.modified_s is not None and item.modified_s < before_s

    orphans = _animations(filter(old, store.list(layout.ANIMATIONS)), named)
    yield from (Garbage("animations", item) for item in orphans)
    for prefix in layout.PREFIXES:
        yield from (Garbage("staged", item) for item in filter(old, store.staged(prefix)))
    yield from (Garbage("leases", item) for item in filter(old, _old_leases(store)))
    yield from (Garbage("results", item) for item in _incomplete_results(store, old))
    yield from (Garbage("index", item) for item in filter(old, pack_index.superseded(store, layout.FRAGMENT_INDEX)))
    yield from (Garbage("scans", item) for item in filter(old, _unused_scans(store)))


def delete(store: Store, garbage: Iterable[Garbage], check: Callable[[], None]) -> Iterator[Garbage]:
    """Remove what `find` found, several objects at a time, and yield each once it is gone.

    Args:
        store: the output.
        garbage: of that output.
        check: called before every few objects; raises if a run has come.
    """
    found = iter(garbage)
    while batch := list(itertools.islice(found, 8 * DELETE_THREADS)):
        check()
        for _ in store.each(lambda item: store.delete(item.found.name), batch, DELETE_THREADS):
            pass
        yield from batch


class _Named:
    """The keys whose animation somebody names, looked up again where somebody may have named more meanwhile."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        published = _published_keys(journal)
        outcomes = journal.outcomes()
        self._fragments = set(outcomes.fragments)
        self._keys = KeySet.of(np.concatenate([outcomes.keys[outcomes.succeeded], published]))

    def misses(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of `keys` nobody names now; bool, shape (n,)."""
        missed = ~self._keys.contains(keys)
        if not missed.any():
            return missed
        # A worker that outlived its run may have committed some since.
        new = sorted(set(self._journal.fragments()) - self._fragments)
        for table in self._journal.read(new, ["key"]):
            missed &= ~KeySet.of(keys_from_hex(table["key"])).contains(keys)
        return missed


def _published_keys(journal: Journal) -> Keys:
    """The keys of the newest complete results, be they withdrawn since: their readers look there."""
    newest = latest(journal.store)
    keys = [np.empty(0, dtype=f"V{KEY_BYTES}")]
    if newest is not None:
        listed = journal.store.list(f"{layout.results_folder(newest['run_id'])}/")
        names = sorted(item.name for item in listed if item.name.endswith(".parquet"))
        keys += [keys_from_hex(table["key"]) for table in journal.read(names, ["key"])]
    return np.concatenate(keys)


def _animations(listed: Iterable[ObjectInfo], named: _Named) -> Iterator[ObjectInfo]:
    matched = ((key, item) for item in listed if (key := layout.animation_key(item.name)))
    while window := list(itertools.islice(matched, _WINDOW)):
        missed = named.misses(keys_from_hex(pa.array([key for key, _ in window], pa.string())))
        yield from (item for (_, item), nobody in zip(window, missed, strict=True) if nobody)


def _old_leases(store: Store) -> Iterator[ObjectInfo]:
    """All generations but the newest few, found in one listing that is not kept."""
    newest: list[ObjectInfo] = []
    for item in store.list(layout.LEASES):
        if layout.lease_generation(item.name) is not None:
            newest = sorted([*newest, item], key=lambda one: one.name, reverse=True)
            yield from newest[KEPT_LEASES:]
            del newest[KEPT_LEASES:]


def _incomplete_results(store: Store, old: Callable[[ObjectInfo], bool]) -> Iterator[ObjectInfo]:
    """The objects of every results folder that has no `_SUCCESS.json`, where all of them are old."""
    newest = latest(store)
    folders: dict[str, list[ObjectInfo]] = {}
    for item in store.list(layout.RESULTS):
        if run_id := layout.results_run_id(item.name):
            folders.setdefault(run_id, []).append(item)
    for run_id, items in sorted(folders.items()):
        complete = any(item.name == layout.success_marker(run_id) for item in items)
        if not complete and all(map(old, items)) and (newest is None or newest["run_id"] != run_id):
            yield from items


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
