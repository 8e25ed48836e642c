"""What cron, systemd, GitHub and Airflow read of jobs/, by their own readers; and what an exit code means to them."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from cronsim import CronSim
from deployments import ROOT, options

from pia_batch.errors import PiaBatchError

JOBS = ROOT / "jobs"
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_cron_starts_a_run_every_night_as_a_user() -> None:
    lines = (JOBS / "cron/pia-batch.cron").read_text(encoding="utf-8").splitlines()
    jobs = [line for line in lines if line and not line.startswith("#") and not re.match(r"[A-Z_]+=", line)]
    (job,) = jobs
    *when, user, command = job.split(None, 6)
    times = CronSim(" ".join(when), NOW)
    assert [next(times), next(times)] == [datetime(2026, 11, day, 1, 30, tzinfo=UTC) for day in (24, 25)]
    assert user == "pia"
    program, name, *arguments = shlex.split(command.split(">>")[0])
    assert Path(program).name == "pia-batch"
    assert name in options()
    assert "%" not in command, "cron makes it a line break"
    assert len(arguments) == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is part of systemd")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for unit in (JOBS / "systemd").iterdir():
        text = unit.read_text(encoding="utf-8")
        (tmp_path / unit.name).write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", text))
    for unit in sorted(tmp_path.iterdir()):
        command = ["systemd-analyze", "verify", "--man=no", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), unit.name


def exit_codes(kind: type[PiaBatchError] = PiaBatchError) -> set[int]:
    """Everything that a run may leave with."""
    return {0, 3, kind.exit_code}.union(*map(exit_codes, kind.__subclasses__()))


def directives(name: str) -> dict[str, list[str]]:
    """The settings of a unit, whatever their section."""
    found: dict[str, list[str]] = {}
    for line in (JOBS / "systemd" / name).read_text(encoding="utf-8").splitlines():
        if re.match(r"[A-Z]\w+=", line):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def test_systemd_restarts_what_was_interrupted_and_nothing_that_would_fail_again() -> None:
    unit = directives("pia-batch.service")
    (codes,) = unit["RestartPreventExitStatus"]
    assert {int(code) for code in codes.split()} == {1, 2, 3}
    assert unit["SuccessExitStatus"] == ["75"]
    assert exit_codes() == {0, 1, 2, 3, 4, 75}, "what does systemd make of the new one?"
    assert unit["KillMode"] == ["mixed"], "the workers must live until the run has committed"


def test_the_workflow_is_what_github_reads() -> None:
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, JOBS / "github-actions/nightly.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "ok" in done.stdout


STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
exit "$(sed -n "$(wc -l < "$CALLS")p" "$CODES")"
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A `pia-batch` on PATH that ends with one code after the other; returns the file of what it was called with."""
    program = tmp_path / "bin" / "pia-batch"
    program.parent.mkdir()
    program.write_text(STUB)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    def ends_with(*codes: int) -> Path:
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        monkeypatch.setenv("CALLS", str(calls))
        monkeypatch.setenv("CODES", str(tmp_path / "codes"))
        return calls

    return ends_with


@pytest.mark.parametrize(("codes", "ended"), [((0,), 0), ((4, 0), 0), ((4, 4, 4), 4), ((75,), 0), ((3,), 3), ((2,), 2)])
def test_the_step_of_the_workflow_ends_as_the_run_did(
    stub: Callable[..., Path], codes: tuple[int, ...], ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = yaml.safe_load((JOBS / "github-actions/nightly.yaml").read_text(encoding="utf-8"))
    (step,) = workflow["jobs"]["animate"]["steps"]
    calls = stub(*codes)
    monkeypatch.setenv("RUN_DATE", "2026-11-22")

    done = subprocess.run(["bash", "-e", "-c", step["run"]], capture_output=True, check=False)  # as GitHub starts it

    assert done.returncode == ended
    called = calls.read_text().splitlines()
    assert len(called) == len(codes)
    assert "--run-date 2026-11-22" in called[0]


class FakeAirflow:
    """The few names of `airflow.sdk` that the DAG uses: settings are kept, and so are the calls of tasks."""

    def __init__(self) -> None:
        self.dag: dict[str, Any] = {}
        self.task: dict[str, Any] = {}
        self.calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        kinds = ("AirflowException", "AirflowFailException", "AirflowRescheduleException", "AirflowSkipException")
        self.errors = {kind: type(kind, (Exception,), {}) for kind in kinds}

    def modules(self) -> dict[str, types.ModuleType]:
        sdk, errors = types.ModuleType("airflow.sdk"), types.ModuleType("airflow.sdk.exceptions")
        vars(sdk).update(dag=self._dag, task=self._task, CronDataIntervalTimetable=lambda *a, **k: (a, k))
        vars(errors).update(self.errors)
        return {"airflow": types.ModuleType("airflow"), "airflow.sdk": sdk, "airflow.sdk.exceptions": errors}

    def _dag(self, **settings: Any) -> Callable[..., Any]:
        self.dag = settings
        return lambda function: function

    def _task(self, **settings: Any) -> Callable[..., Any]:
        self.task = settings
        return lambda function: lambda *arguments: self.calls.append((function, arguments))


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> FakeAirflow:
    fake = FakeAirflow()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def dag_file() -> dict[str, Any]:
    return runpy.run_path(str(JOBS / "airflow/pia_batch_dag.py"))


def test_airflow_runs_the_day_before_one_date_at_a_time_and_makes_up_for_missed_ones(airflow: FakeAirflow) -> None:
    dag_file()
    expression, settings = airflow.dag["schedule"]
    next(CronSim(*expression, NOW))
    assert settings == {"timezone": "UTC"}
    assert airflow.dag["max_active_runs"] == 1
    assert airflow.dag["catchup"] is True
    assert airflow.task["retries"] >= 1
    ((_, arguments),) = airflow.calls
    assert arguments == ("{{ ds }}",)


@pytest.mark.parametrize(
    ("code", "state", "error"),
    [
        (0, "success", None),
        (1, "fail", "AirflowFailException"),
        (2, "fail", "AirflowFailException"),
        (3, "fail", "AirflowFailException"),
        (4, "retry", "AirflowException"),
        (75, "reschedule", "AirflowRescheduleException"),
        (137, "retry", "AirflowException"),
    ],
)
def test_airflow_tells_an_exit_code_as_a_task_state(
    airflow: FakeAirflow, stub: Callable[..., Path], code: int, state: str, error: str | None
) -> None:
    names = dag_file()
    calls = stub(code)
    ((animate, _),) = airflow.calls

    assert names["state_of"](code) == state
    if error is None:
        animate("2026-11-22")
    else:
        with pytest.raises(airflow.errors[error]):
            animate("2026-11-22")

    command, *arguments = shlex.split(calls.read_text())
    given = {each for each in arguments if each.startswith("--")}
    assert given <= options()[command]
    assert arguments[arguments.index("--run-date") + 1] == "2026-11-22"


def test_airflow_can_be_told_to_go_on_after_failed_requests(airflow: FakeAirflow) -> None:
    assert airflow.errors
    assert dag_file()["state_of"](3, "skip") == "skip"
