"""Status of an output: what is finished and which run is active, readable from any machine, also during a run."""

from __future__ import annotations

import time
from typing import Any

from pia_batch.journal import layout
from pia_batch.journal.lease import read_newest_lease
from pia_batch.journal.log import Journal
from pia_batch.journal.results import read_latest
from pia_batch.schema.run_record import RunRecord
from pia_batch.storage.object_store import Store


def read_status(store: Store) -> dict[str, Any]:
    """Return what is finished, the run that began last, and the state of the lease. Writes nothing.

    Returns:
        A JSON object. `succeeded`, `failed` and `failures` (by error kind) count the requests of all manifests that the
        journal knows; `needs_regeneration` counts those whose results `verify --repair` removed. `published` is the URI
        of the newest complete results or None. `run` is the run that began last, None before the first: `run_id`,
        `started_at`, `state`, `pending`, `rejected` and `progress` of its `RunRecord`, and `finished`, true if it
        published. `lease` has a `state`: `free`; `held`; or `silent`: not renewed for longer than it lasts, by the
        store's clock compared with this machine's, so that its run has died or cannot reach the store. `held` and
        `silent` leases also have `run_id`, `host`, `since` and `silent_s`, the seconds since the last renewal.

    Raises:
        StorageError: the store refused the request or did not answer, or a fragment is damaged.
    """
    outcomes = Journal(store).outcomes()
    newest = read_latest(store)
    return {
        "output": store.uri,
        "succeeded": int(outcomes.succeeded.sum()),
        "failed": outcomes.failures.total(),
        "failures": dict(outcomes.failures.most_common()),
        "needs_regeneration": outcomes.needs_regeneration,
        "published": store.uri_of(layout.results_folder(newest["run_id"])) if newest else None,
        "run": read_last_run(store),
        "lease": read_lease_state(store),
    }


def read_last_run(store: Store) -> dict[str, Any] | None:
    """Return the `run` of `read_status` by itself."""
    runs = [item for item in store.list(layout.RUNS) if layout.is_run_record(item.name)]
    if not runs:
        return None
    newest = max(runs, key=lambda item: (item.modified_s or 0.0, item.name))  # a run writes it first and last
    record = RunRecord.parse(store.read(newest.name), store.uri_of(newest.name))
    fields = {"run_id", "started_at", "state", "pending", "rejected", "progress"}
    return record.model_dump(mode="json", include=fields) | {"finished": record.state == "finished"}


def read_lease_state(store: Store) -> dict[str, Any]:
    """Return the `lease` of `read_status` by itself."""
    generation, holder = read_newest_lease(store)
    if holder is None or holder["released"]:
        return {"state": "free"}
    written_s = store.stat(layout.lease_name(generation)).modified_s
    silent_s = max(0.0, time.time() - written_s) if written_s is not None else 0.0
    return {
        "state": "silent" if silent_s > holder["ttl_s"] else "held",
        "run_id": holder["run_id"],
        "host": holder["host"],
        "since": holder.get("since"),
        "silent_s": round(silent_s, 1),
    }
