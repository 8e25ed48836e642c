"""Airflow 3 DAG with one run every night on a Ray cluster: submits it, follows it, and maps its exit code to a state.

Copy this file into the DAGs folder, edit the three names below, and install pia_batch where the tasks run. Their
environment must have the cluster's address and token for `pia-batch submit`: RAY_ADDRESS, such as http://head:8265,
RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH. Then:

    airflow dags test pia_batch_nightly 2026-11-22                          # one date, here and now
    airflow backfill create --dag-id pia_batch_nightly --from-date 2026-11-01 --to-date 2026-11-22

Airflow also runs missed dates (catchup). A finished date succeeds at once, as nothing is pending. Clear the task of a
date whose manifest received late rows: the run generates only these.
"""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from typing import Literal

from airflow.sdk import CronDataIntervalTimetable, dag, task
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowRescheduleException,
    AirflowSkipException,
)

CONFIG = "/opt/pia_batch/jobs/configs/nightly.yaml"
MANIFEST = "s3://bucket/requests/date={date}/"
OUTPUT = "s3://bucket/animations"

ON_FAILED_REQUESTS: Literal["fail", "skip"] = "fail"
"""Task state for exit code 3: `skip` differs from a success, but does not stop the next date."""

LOOK_AGAIN = timedelta(minutes=15)
"""Time after which a task checks again whether the output is free."""

State = Literal["success", "fail", "skip", "retry", "reschedule"]


def state_of(exit_code: int, on_failed_requests: Literal["fail", "skip"] = ON_FAILED_REQUESTS) -> State:
    """Return the task state for an exit code of `pia-batch submit`; docs/commands.md lists the codes.

    Returns:
        State of the task; `fail` if a retry would fail, too: an error in config or manifest, a bug, failed requests.
    """
    states: dict[int, State] = {
        0: "success",
        1: "fail",  # a bug
        2: "fail",  # usage, config, manifest or store
        3: on_failed_requests,  # finished, with more failed requests than tolerated
        4: "retry",  # interrupted, with all results committed: the next try continues
        75: "reschedule",  # another run works on this output
    }
    return states.get(exit_code, "retry")  # killed by a signal, or the machine was lost


@dag(
    dag_id="pia_batch_nightly",
    schedule=CronDataIntervalTimetable("30 1 * * *", timezone="UTC"),  # `ds` is the previous day, which is complete
    start_date=datetime(2026, 11, 1, tzinfo=UTC),
    catchup=True,
    max_active_runs=1,
    tags=["pia_batch"],
)
def pia_batch_nightly() -> None:
    """Define one task: the run of a date."""

    @task(retries=4, retry_delay=timedelta(minutes=5), execution_timeout=timedelta(hours=12))
    def animate(run_date: str) -> None:
        command = ["pia-batch", "submit", CONFIG, "--manifest", MANIFEST, "--output", OUTPUT]
        command += ["--run-date", run_date, "--stop-on-interrupt"]
        code = subprocess.run(command, check=False).returncode  # noqa: S603 - the operator's own settings
        state = state_of(code)
        message = f"pia-batch ended with exit code {code} for {run_date}"
        if state == "fail":
            raise AirflowFailException(message)
        if state == "skip":
            raise AirflowSkipException(message)
        if state == "retry":
            raise AirflowException(message)
        if state == "reschedule":
            raise AirflowRescheduleException(datetime.now(UTC) + LOOK_AGAIN)

    animate("{{ ds }}")


pia_batch_nightly()
