"""The run record from the first moment of a run to every kind of end."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.driver import run_record
from pia_batch.driver.budget import LimitReached
from pia_batch.driver.progress import Progress
from pia_batch.driver.run_record import PROGRESS_EVERY_S, RunRecordWriter
from pia_batch.errors import AccountingError, ConfigError, InterruptedRunError, LeaseHeldError, StorageError
from pia_batch.pipeline.attempts import EngineActivity, OutcomeCounts
from pia_batch.planning.plan import Plan, make_plan
from pia_batch.schema.run_record import ProgressSnapshot
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]

FIELDS = {
    *("run_id", "state", "reason", "message", "exit_code", "run_date", "params", "started_at", "finished_at"),
    *("manifest", "folder", "output", "rows", "duplicates", "rejected", "pending", "selected", "progress", "computed"),
    *("requests_per_second", "timings", "engines", "engine_hours", "gpu_hours", "cost", "summary"),
    *("version", "versions", "engine_ids", "config"),
}


def begun(
    config: RunConfig, run_id: str = "night", store: type[Store] = Store
) -> tuple[RunRecordWriter, Plan, Progress]:
    plan = make_plan(config)
    writer = RunRecordWriter(config)
    writer.set_plan(plan, run_id)
    progress = Progress(config, run_id, total=plan.num_selected, done_before=0)
    writer.begin(store(config.output), progress)
    return writer, plan, progress


def run_json(config: RunConfig, run_id: str = "night") -> dict[str, Any]:
    return dict(json.loads(Store(config.output).read(f"_runs/{run_id}/run.json")))


def test_a_run_that_begins_says_what_it_is_about_to_do(make_config: MakeConfig) -> None:
    table = requests_table(5, motion_scale=pa.array([0, 9, 1, 0, 0]))
    config = make_config(table, budget__limit=3, params__shop="north", on_finish__webhook="https://h/secret")
    begun(config)

    record = run_json(config)

    assert set(record) == FIELDS
    assert (record["timings"], record["engines"], record["summary"]) == (None, None, None)
    assert (record["state"], record["exit_code"], record["finished_at"]) == ("running", None, None)
    assert (record["rows"], record["pending"], record["selected"], record["rejected"]) == (5, 4, 3, 1)
    assert record["params"] == {"shop": "north"}
    assert {"python", "ray", "torch", "diffusers"} <= set(record["versions"])
    assert "secret" not in json.dumps(record)


class SlowStore(Store):
    """Takes its time for what is written from another thread than this one."""

    def replace(self, name: str, data: bytes) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        super().replace(name, data)


def test_a_run_that_goes_on_says_how_far_it_is_and_nothing_of_that_comes_after_its_end(make_config: MakeConfig) -> None:
    config = make_config(requests_table(4))
    writer, plan, progress = begun(config, store=SlowStore)
    assert ProgressSnapshot.model_validate(run_json(config)["progress"]).done == 0
    progress.update(
        EngineActivity(outcomes=OutcomeCounts(1, Counter({"non_finite": 1}), "s3://user:hunter2@bucket/clip.mp4"))
    )
    writer.write_progress(progress)  # it was written a moment ago
    assert run_json(config)["progress"]["done"] == 0

    writer._written_s -= PROGRESS_EVERY_S
    writer.write_progress(progress)
    progress.update(EngineActivity(outcomes=OutcomeCounts(3, Counter({"non_finite": 1}))))
    progress.enter("finished")
    writer.finish(plan.outcomes, "night")

    snapshot = ProgressSnapshot.model_validate(run_json(config)["progress"])
    assert (snapshot.phase, snapshot.succeeded, snapshot.failures) == ("finished", 3, {"non_finite": 1})
    assert run_json(config)["state"] == "finished"
    assert "hunter2" not in json.dumps(run_json(config))


def test_run_json_is_written_again_while_a_run_goes_on(make_config: MakeConfig) -> None:
    config = make_config(requests_table(4))
    writer, _, progress = begun(config)
    progress.update(EngineActivity(outcomes=OutcomeCounts(3, newest="file:///out/clip.mp4")))
    writer._written_s -= PROGRESS_EVERY_S

    writer.write_progress(progress)
    writer._join()

    assert (run_json(config)["state"], run_json(config)["progress"]["succeeded"]) == ("running", 3)


def test_a_run_that_finished_says_what_it_came_to_and_what_it_cost(make_config: MakeConfig) -> None:
    config = make_config(requests_table(2), budget__price_per_hour=3.0, placement__num_gpus=0.5)
    writer, plan, progress = begun(config)
    with writer.phase("generating"):
        progress.update(EngineActivity(outcomes=OutcomeCounts(2)))
    writer.set_engines({"count": 1, "startup_seconds": None}, 1800.0)

    summary = writer.finish(plan.outcomes, "night")

    whole = run_json(config)
    assert set(whole) == FIELDS
    assert (whole["state"], whole["exit_code"], whole["engine_hours"], whole["gpu_hours"]) == ("finished", 0, 0.5, 0.25)
    assert (summary.cost, whole["cost"], whole["summary"]["cost"]) == (0.75, 0.75, 0.75)
    assert whole["requests_per_second"] > 0
    assert set(whole["timings"]) == {"planning_s", "waiting_s", "generating_s", "publishing_s", "total_s"}
    assert whole["finished_at"] >= whole["started_at"]


def test_a_run_that_a_limit_stopped_says_which_and_what_is_left(make_config: MakeConfig) -> None:
    config = make_config(requests_table(4))
    writer, plan, progress = begun(config)
    progress.update(EngineActivity(outcomes=OutcomeCounts(1)))

    summary = writer.finish(plan.outcomes, "night", LimitReached("deadline", "it is time", 4), left=3)

    assert (summary.reason, summary.left, summary.exit_code, summary.results_uri) == ("deadline", 3, 4, None)
    assert summary.message == "it is time. 3 of 4 requests are left"
    assert (run_json(config)["state"], run_json(config)["reason"]) == ("stopped", "deadline")


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (InterruptedRunError("asked to stop"), "interrupted", 4),
        (LeaseHeldError("taken over"), "lease_held", 75),
        (AccountingError("one is missing"), "error", 1),
        (ConfigError("s3://user:hunter2@host/x"), "error", 2),
        (OSError(errno.EFBIG, "File too large"), "error", 2),
        (ZeroDivisionError("division by zero"), "bug", 1),
    ],
)
def test_a_run_that_ends_by_an_error_says_so(make_config: MakeConfig, error: Exception, reason: str, code: int) -> None:
    config = make_config(requests_table(4))
    writer, _, progress = begun(config)
    progress.update(EngineActivity(outcomes=OutcomeCounts(1)))

    writer.fail(error)

    record = run_json(config)
    assert (record["state"], record["reason"], record["exit_code"], record["computed"]) == ("stopped", reason, code, 1)
    assert str(error).split(" ")[-1][-5:] in record["message"]
    assert "hunter2" not in json.dumps(record)


def test_an_error_before_the_run_began_writes_nothing(make_config: MakeConfig) -> None:
    config = make_config(requests_table(4))
    writer = RunRecordWriter(config)

    writer.fail(ConfigError("nothing there"))

    assert (writer.record.state, writer.record.exit_code, writer.record.message) == ("stopped", 2, "nothing there")
    assert not list(Store(config.output).list("_runs/"))


def test_a_store_that_is_gone_does_not_hide_why_the_run_ended(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    class GoneStore(Store):
        gone = False

        def replace(self, name: str, data: bytes) -> None:
            if self.gone:
                msg = "no answer"
                raise StorageError(msg)
            super().replace(name, data)

    config = make_config(requests_table(1))
    writer = RunRecordWriter(config)
    writer.set_plan(make_plan(config), "night")
    store = GoneStore(config.output)
    writer.begin(store, Progress(config, "night", total=1, done_before=0))
    store.gone = True

    writer.fail(InterruptedRunError("the store went away"))

    assert "run_record_write_failed run_id=night: no answer" in caplog.text
    assert writer.record.message == "the store went away"


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_record, "_PACKAGES", ("pyarrow", "a-vendors-torch"))

    assert set(run_record._versions()) == {"pyarrow"}
