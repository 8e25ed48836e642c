import json
import os
import time
from pathlib import Path

import pytest
from journals import SHOP, commit, keys, keyset

from pia_batch.journal.lease import Lease
from pia_batch.journal.log import Journal
from pia_batch.journal.results import publish
from pia_batch.journal.status import read_status
from pia_batch.storage.object_store import Store

BEGAN = "2026-11-22T20:00:00Z"


def begin(store: Store, run_id: str, **more: object) -> None:
    """Write the record of a run that begins, or that ends."""
    about = {"run_id": run_id, "started_at": BEGAN, "pending": 3, "rejected": 1, "rows": 4}
    about |= {"manifest": "m", "output": store.uri, "version": "0.1.0"}
    store.replace(f"_runs/{run_id}/run.json", json.dumps(about | more).encode())


def check_story(store: Store) -> None:
    """From the first lease to the second run, as another machine sees it."""
    record = Journal(Store(store.uri))
    assert read_status(store)["run"] is None
    assert read_status(store)["lease"] == {"state": "free"}

    with Lease(record.store, "night", ttl_s=60):
        begin(record.store, "night")
        commit(record, {1: "succeeded", 2: "failed", 3: "succeeded"})
        found = read_status(store)
        assert (found["succeeded"], found["failed"], found["failures"]) == (2, 1, {"non_finite": 1})
        assert found["run"] == {
            "run_id": "night",
            "started_at": BEGAN,
            "pending": 3,
            "rejected": 1,
            "state": "running",
            "finished": False,
            "progress": None,
        }
        assert (found["lease"]["state"], found["lease"]["run_id"], found["published"]) == ("held", "night", None)
        assert found["lease"]["since"]
        publish(record, record.outcomes(), keyset(1, 2, 3), SHOP, "night", {})
        begin(record.store, "night", state="finished")

    record.add_tombstones(keys(1), record.outcomes())
    found = read_status(store)
    assert (found["succeeded"], found["needs_regeneration"]) == (1, 1)
    assert found["run"]["finished"]
    assert found["published"] == store.uri_of("results/night")
    assert found["lease"] == {"state": "free"}
    assert json.loads(json.dumps(found)) == found


def test_status_follows_a_run_from_its_first_lease_to_a_repair(store: Store) -> None:
    check_story(store)


@pytest.mark.s3
def test_status_follows_a_run_on_s3(s3: str) -> None:
    check_story(Store(s3))


def test_the_last_run_is_the_one_that_wrote_last_whatever_it_is_called(store: Store, tmp_path: Path) -> None:
    begin(store, "zebra", state="finished")
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "out/_runs/zebra/run.json", (hour_ago, hour_ago))
    begin(store, "aardvark")

    assert read_status(store)["run"]["run_id"] == "aardvark"
