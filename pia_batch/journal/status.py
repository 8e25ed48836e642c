"""What an output tells of itself to anyone who can read it: from any machine, also while a run goes on."""

from __future__ import annotations

import time
from typing import Any

from pia_batch.journal import layout, lease
from pia_batch.journal.log import Journal
from pia_batch.journal.results import latest
from pia_batch.schema.run_record import RunRecord
from pia_batch.storage.object_store import Store


def status(store: Store) -> dict[str, Any]:
    """What is finished, which run was the last to begin, and who holds the lease. Writes nothing.

    Returns:
        A JSON object. `succeeded`, `failed` and `failures` (by error kind) count the requests that the journal knows,
        of all manifests; `due_again` those that `verify --repair` took back. `published` is the URI of the newest
        complete results or None. `run` is the last run to begin, None before the first: `run_id`, `started_at`,
        `state`, `pending`, `rejected` and `progress` of its `RunRecord`, and `finished`, true if it published. `lease`
        has a `state`: `free`; `held`; or `silent`, not renewed for longer than it lasts by the store's clock against
        this machine's, and then its run has died or cannot reach the store. Of the last two also `run_id`, `host`,
        `since` and `silent_s`, the seconds since its renewal.

    Raises:
        StorageError: the store refused or did not answer, or a fragment is damaged.
    """
    outcomes = Journal(store).outcomes()
    newest = latest(store)
    return {
        "output": store.uri,
        "succeeded": int(outcomes.succeeded.sum()),
        "failed": outcomes.failures.total(),
        "failures": dict(outcomes.failures.most_common()),
        "due_again": outcomes.due_again,
        "published": store.uri_of(layout.results_folder(newest["run_id"])) if newest else None,
        "run": last_run(store),
        "lease": lease_of(store),
    }


def last_run(store: Store) -> dict[str, Any] | None:
    """The `run` of `status`, by itself."""
    runs = [item for item in store.list(layout.RUNS) if layout.is_run_record(item.name)]
    if not runs:
        return None
    newest = max(runs, key=lambda item: (item.modified_s or 0.0, item.name))  # a run writes it at both its ends
    record = RunRecord.parse(store.read(newest.name), store.uri_of(newest.name))
    fields = {"run_id", "started_at", "state", "pending", "rejected", "progress"}
    return record.model_dump(mode="json", include=fields) | {"finished": record.state == "finished"}


def lease_of(store: Store) -> dict[str, Any]:
    """The `lease` of `status`, by itself."""
    generation, holder = lease.newest(store)
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
