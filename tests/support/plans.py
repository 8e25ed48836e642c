"""Manifests, what is committed of them, and the plans that follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.journal.log import Journal
from pia_batch.manifest.validation import check
from pia_batch.planning.plan import Plan
from pia_batch.schema.columns import results_table
from pia_batch.schema.keys import KeySet
from pia_batch.storage.object_store import Store


def keys_of(plan: Plan) -> list[str]:
    """Return the keys of all valid rows, duplicates included."""
    return [
        key
        for batch in plan.manifest.batches()
        for key in check(batch.table, plan.config, plan.engine_ids).requests["key"].to_pylist()
    ]


def commit(config: RunConfig, keys: list[str], status: str, error_kind: str | None = None) -> None:
    """Commit one outcome for all of these keys."""
    columns = {
        "request_id": pa.array([f"of {key}" for key in keys], pa.string()),
        "key": pa.array(keys, pa.string()),
        "status": pa.scalar(status),
        "error_kind": pa.scalar(error_kind, pa.string()),
    }
    Journal(Store(config.output)).append(results_table(columns, pa.table({}), len(keys)))


def members(keys: KeySet) -> set[str]:
    """Return the keys of a set as hexadecimal text."""
    pairs = np.stack([keys.high, keys.low], axis=1).astype(">u8")
    return {row.tobytes().hex() for row in pairs}


def content_of(plan: Plan) -> dict[str, Any]:
    """Everything in a plan, except its time."""
    rejected = plan.rejected.drop_columns(["finished_at"])
    return {
        "wanted": members(plan.wanted),
        "skipped": members(plan.skipped),
        "rejected": rejected.to_pylist(),
        "schema": rejected.schema,
        "repeats": plan.repeats.to_pylist(),
        "groups": sorted(map(str, plan.groups.to_pylist())),
        "counts": (plan.num_pending, plan.num_duplicates, plan.num_failed, plan.manifest.num_rows),
        "outcomes": plan.outcomes.failures,
        "carried": plan.carried,
    }
