"""Every night one run on a Ray cluster, by Airflow 3: submitted, followed, and its exit code told as a task state.

Copy this file into the DAGs folder, edit the three names below, and install pia_batch where the tasks run. Their
environment tells `pia-batch submit` where the cluster is, and its token: RAY_ADDRESS, such as http://head:8265,
RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH. Then:

    airflow dags test pia_batch_nightly 2026-11-22                          # one date, here and now
    airflow backfill create --dag-id pia_batch_nightly --from-date 2026-11-01 --to-date 2026-11-22

A date that was missed is made up for (catchup); one that is finished is a success at once, as nothing is left to draw.
Clear the task of a date whose manifest got late rows: only these are drawn.
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
"""What exit code 3 makes of the task: `skip` shows it apart from a success, and lets the next date go on."""

LOOK_AGAIN = timedelta(minutes=15)
"""After how long a task looks again whether the output is free."""

State = Literal["success", "fail", "skip", "retry", "reschedule"]


def state_of(exit_code: int, on_failed_requests: Literal["fail", "skip"] = ON_FAILED_REQUESTS) -> State:
    """The task state that an exit code of `pia-batch submit` stands for; docs/commands.md has the codes.

    Returns:
        `fail` where a retry would end the same way: a mistake in the config or manifest, a bug, failed requests.
    """
    states: dict[int, State] = {
        0: "success",
        1: "fail",  # a bug
        2: "fail",  # usage, config, manifest or store
        3: on_failed_requests,  # finished, with more failed requests than tolerated
        4: "retry",  # interrupted, all committed: the next try goes on from there
        75: "reschedule",  # another run works on this output
    }
    return states.get(exit_code, "retry")  # killed by a signal, or the machine went away


@dag(
    dag_id="pia_batch_nightly",
    schedule=CronDataIntervalTimetable("30 1 * * *", timezone="UTC"),  # `ds` is the day before, which is over
    start_date=datetime(2026, 11, 1, tzinfo=UTC),
    catchup=True,
    max_active_runs=1,
    tags=["pia_batch"],
)
def pia_batch_nightly() -> None:
    """One task: the run of a date."""

    @task(retries=4, retry_delay=timedelta(minutes=5), execution_timeout=timedelta(hours=12))
    def animate(run_date: str) -> None:
        command = ["pia-batch", "submit", CONFIG, "--manifest", MANIFEST, "--output", OUTPUT]
        command += ["--run-date", run_date, "--stop-on-interrupt"]
        code = subprocess.run(command, check=False).returncode  # noqa: S603 - the operator's own settings
        state = state_of(code)
        said = f"pia-batch ended with exit code {code} for {run_date}"
        if state == "fail":
            raise AirflowFailException(said)
        if state == "skip":
            raise AirflowSkipException(said)
        if state == "retry":
            raise AirflowException(said)
        if state == "reschedule":
            raise AirflowRescheduleException(datetime.now(UTC) + LOOK_AGAIN)

    animate("{{ ds }}")


pia_batch_nightly()
