"""Jobs of a cluster behind a fake dashboard: requests that are sent, refusals, and the ends of waiting."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import AuthenticationError
from servers import serving

from pia_batch import cli
from pia_batch.cli import job_commands
from pia_batch.cli.flags import RunFlags
from pia_batch.config import RunConfig, yaml_text
from pia_batch.driver import authentication, submission
from pia_batch.driver.submission import Job, Jobs, JobSpec
from pia_batch.errors import ConfigError, InterruptedRunError, LeaseHeldError, PiaBatchError

TOKEN = "t" * 64

NO_AGENT = "No available agent to submit job, please try again later."
"""Answer of Ray 2.60 while the head node's agent starts."""


@dataclass
class Dashboard:
    """Fake of a head node's job API. Keeps the jobs that were submitted; none of them ever runs."""

    token: str | None = None
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: str = ""
    faster: bool = False
    """True if another submitter is faster with the same job."""
    busy: int = 0
    """Number of submissions that are answered as Ray does while it has no agent for jobs."""
    starts_anyway: bool = False
    """True if a job starts although the answer is that there is no agent."""
    address: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Return the status and the JSON, or the text, of an answer."""
        if self.token is not None and token != f"Bearer {self.token}" and path != "/api/authentication_mode":
            return (403, "Forbidden: Invalid token") if token else (401, "Unauthorized: Missing token")
        if path.startswith("/api/jobs/") and path != "/api/jobs/":
            return self._about_one(path)
        if method == "POST":
            return self._submit(json.loads(body))
        version = {"ray_version": ray.__version__, "version": "4", "ray_commit": "", "session_name": ""}
        return 200, {
            "/api/authentication_mode": {"authentication_mode": "token" if self.token else "disabled"},
            "/api/version": version,
            "/api/jobs/": list(self.jobs.values()),
        }.get(path, {})

    def _about_one(self, path: str) -> tuple[int, Any]:
        job_id, _, action = path.removeprefix("/api/jobs/").partition("/")
        job = self.jobs.get(job_id)
        if job is None:
            return 404, f"Job {job_id} does not exist"
        if action == "stop":
            job["status"] = "STOPPED"
            return 200, {"stopped": True}
        return 200, {"logs": self.logs} if action == "logs" else job

    def _submit(self, asked: dict[str, Any]) -> tuple[int, Any]:
        job_id = asked["submission_id"]
        if self.faster or job_id in self.jobs:
            return 500, f"ValueError: Job with submission_id {job_id} already exists."
        if self.busy:
            self.busy -= 1
            return 500, NO_AGENT
        now = 1_700_000_000_000 + len(self.jobs)
        self.jobs[job_id] = {"type": "SUBMISSION", "status": "RUNNING", "start_time": now} | asked
        if self.starts_anyway:
            return 500, NO_AGENT
        return 200, {"submission_id": job_id, "job_id": job_id}

    def end(self, job_id: str, status: str, exit_code: int | None = None, **more: str) -> None:
        self.jobs[job_id] |= {"status": status, "driver_exit_code": exit_code, "end_time": 1_700_000_060_000} | more


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Dashboard]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fake = Dashboard()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = fake.answer(self.command, self.path, body, self.headers.get("Authorization", ""))
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 - its name is the method's

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with serving(Handler) as fake.address:
        yield fake


def spec(output: str = "s3://bucket/out", date: str | None = None, **settings: Any) -> JobSpec:
    manifest = settings.pop("manifest", "s3://bucket/manifest")
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    config = RunConfig.load(None, {"manifest": manifest, "output": output, **dotted})
    return JobSpec(config, output, manifest, date)


def job(**fields: Any) -> Job:
    texts = dict.fromkeys(("error_type", "message", "output", "manifest", "user", "version", "key"), "")
    rest = dict.fromkeys(("exit_code", "started_at", "ended_at", "run_date"))
    return Job(**({"id": "pia-batch-0-1"} | texts | rest | fields))


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_what_is_submitted_shows_no_secret(dashboard: Dashboard) -> None:
    marker = "MARKER5f0e"
    manifest = f"https://user:{marker}@example.com/m.parquet?X-Amz-Signature={marker}"

    sent = Jobs(dashboard.address).submit(spec(manifest=manifest))

    shown = json.dumps(dashboard.jobs[sent.id])
    assert marker not in shown
    assert sent.manifest == "https://example.com/m.parquet"
    assert (sent.output, sent.status, sent.attempt, sent.version) == ("s3://bucket/out", "RUNNING", 1, "0.1.0")
    assert dashboard.jobs[sent.id]["entrypoint"] == "exec python3 -m pia_batch.cli run config.yaml"


def test_a_driver_that_is_stopped_has_the_time_of_the_config(dashboard: Dashboard) -> None:
    sent = Jobs(dashboard.address).submit(spec(limits__stop_grace_s=100.5))

    assert dashboard.jobs[sent.id]["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "116"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__base": "runwayml/base", "models__cartoon": {"vae": "some/vae"}, "defaults__num_frames": 24},
        {"limits__lease_wait_s": float("inf"), "placement__num_gpus": 0.5, "images__allow": ["s3://photos/"]},
        {"params__shop": "north", "budget__deadline": "06:00", "run_date": "2026-11-22", "manifest": "m/{date}/{shop}"},
    ],
)
def test_the_config_arrives_as_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    sent = spec(**settings)

    name = submission.pack(sent, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [name] == ["config.yaml"]
    assert RunConfig.load(tmp_path / name) == sent.config


def test_a_package_travels_whole_and_without_what_python_keeps(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    sent = JobSpec(**(vars(spec()) | {"package": root}))

    submission.pack(sent, tmp_path)

    here = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {Path("config.yaml"), Path("pia_batch/cli/__main__.py"), Path("pia_batch/config/embedded.yaml")} <= here
    assert not any("__pycache__" in path.parts for path in here)
    with pytest.raises(ConfigError, match="does not contain pia_batch"):
        submission.pack(JobSpec(**(vars(spec()) | {"package": tmp_path / "pia_batch"})), tmp_path)


@given(st.sampled_from(["s3://a/o", "s3://a/p"]), st.sampled_from([None, "2026-11-22"]), st.integers(1, 3))
def test_equal_work_has_an_equal_key_and_other_work_another(output: str, date: str | None, batch_size: int) -> None:
    here = spec(output, date, placement__batch_size=batch_size)

    assert here.key == spec(output, date, placement__batch_size=batch_size).key
    others = [spec("s3://b/o", date, placement__batch_size=batch_size), spec(output, "2026-11-23")]
    others += [spec(output, date, placement__batch_size=batch_size + 1)]
    assert here.key not in {other.key for other in others}


# --- duplicates ----------------------------------------------------------------------------------------------------


def test_one_job_at_a_time_for_an_output_and_a_date(dashboard: Dashboard) -> None:
    jobs = Jobs(dashboard.address)
    first = jobs.submit(spec(date="2026-11-22"))

    for duplicate in (spec(date="2026-11-22"), spec(date="2026-11-22", placement__batch_size=8)):
        with pytest.raises(LeaseHeldError, match=f"job {first.id} for s3://bucket/out is already RUNNING"):
            jobs.submit(duplicate)
    assert jobs.submit(spec(date="2026-11-23")).id != first.id
    assert jobs.submit(spec("s3://bucket/other", date="2026-11-22")).id != first.id
    queued = jobs.submit(spec(date="2026-11-22", limits__lease_wait_s=60))  # it waits there, for its turn
    assert queued.attempt == 1


def test_a_job_that_has_ended_is_followed_by_another_attempt(dashboard: Dashboard) -> None:
    jobs = Jobs(dashboard.address)
    ids = []
    for status in ("FAILED", "STOPPED", "SUCCEEDED"):
        ids.append(jobs.submit(spec()).id)
        dashboard.end(ids[-1], status)

    assert [job_id.removeprefix(ids[0][:-1]) for job_id in ids] == ["1", "2", "3"]
    assert [found.id for found in jobs.ours()] == ids[::-1]


def test_who_submits_at_the_same_moment_is_refused_by_the_cluster(dashboard: Dashboard) -> None:
    dashboard.faster = True

    with pytest.raises(LeaseHeldError, match="for s3://bucket/out is already there"):
        Jobs(dashboard.address).submit(spec())


@pytest.mark.parametrize(("busy", "starts_anyway"), [(1, False), (3, False), (0, True)])
def test_a_cluster_that_has_just_started_is_asked_again(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, busy: int, starts_anyway: bool
) -> None:
    monkeypatch.setattr(submission, "_POLL_S", 0.01)
    dashboard.busy, dashboard.starts_anyway = busy, starts_anyway

    sent = Jobs(dashboard.address).submit(spec())

    assert list(dashboard.jobs) == [sent.id]


def test_a_cluster_whose_agent_does_not_start_is_reported(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_POLL_S", 0.01)
    monkeypatch.setattr(submission, "AGENT_WAIT_S", 0.05)
    dashboard.busy = 10**6

    with pytest.raises(ConfigError, match=r"has had no agent to start a job for 0 s; see dashboard_agent\.log"):
        Jobs(dashboard.address).submit(spec())

    assert dashboard.jobs == {}


def test_jobs_of_others_are_neither_listed_nor_stopped(dashboard: Dashboard) -> None:
    dashboard.jobs["theirs"] = {"type": "SUBMISSION", "submission_id": "theirs", "status": "RUNNING", "entrypoint": "x"}
    jobs = Jobs(dashboard.address)

    assert jobs.ours() == []
    with pytest.raises(ConfigError, match="not submitted by pia-batch"):
        jobs.stop("theirs")
    with pytest.raises(ConfigError, match="`pia-batch jobs` lists"):
        jobs.stop("unknown")
    assert dashboard.jobs["theirs"]["status"] == "RUNNING"


# --- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exit_code", "result"), [(0, 0), (3, 3), (75, 75), (-9, 137)])
def test_the_exit_code_is_the_drivers_own(exit_code: int, result: int) -> None:
    assert job(status="SUCCEEDED" if exit_code == 0 else "FAILED", exit_code=exit_code).result() == result


@pytest.mark.parametrize(
    ("ended", "error", "words"),
    [
        ({"status": "STOPPED"}, InterruptedRunError, "was stopped"),
        ({"error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "its node died"}, InterruptedRunError, "its node died"),
        ({"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "no such URI"}, ConfigError, "no such URI"),
    ],
)
def test_a_job_without_an_exit_code_says_why(ended: dict[str, str], error: type[PiaBatchError], words: str) -> None:
    with pytest.raises(error, match=words):
        job(**({"status": "FAILED"} | ended)).result()


@pytest.mark.parametrize(
    ("exit_code", "log", "words"),
    [
        (127, "sh: 1: exec: python3: not found\n", "the head node has no `python3` on the PATH of its Ray; install"),
        (
            1,
            "/usr/bin/python3: No module named pia_batch\n",
            "`python3` on the head node has no module pia_batch; inst",
        ),
        (1, "  import ray\nModuleNotFoundError: No module named 'ray'\n", "has no module ray; install pia-batch"),
    ],
)
def test_a_head_whose_python_cannot_start_the_driver_is_reported(exit_code: int, log: str, words: str) -> None:
    message = f"Job entrypoint command failed with exit code {exit_code}, last available logs (truncated):\n{log}"

    with pytest.raises(ConfigError, match=words):
        job(status="FAILED", exit_code=exit_code, message=message).result()


def test_a_bug_of_the_driver_keeps_its_exit_code() -> None:
    log = "No module named pia_batch\nZeroDivisionError: division by zero\n"

    assert (
        job(status="FAILED", exit_code=1, message=f"failed with exit code 1, last available logs:\n{log}").result() == 1
    )


def test_a_job_is_waited_for_and_its_log_shown_once(dashboard: Dashboard) -> None:
    jobs = Jobs(dashboard.address)
    sent = jobs.submit(spec())
    dashboard.logs = "first line\nlast line\n"
    dashboard.end(sent.id, "FAILED", 3)
    shown: list[str] = []

    ended = jobs.wait(sent.id, show=shown.append)

    assert "".join(shown) == "first line\nlast line\n"
    assert (ended.result(), ended.seconds) == (3, 60.0)


def test_waiting_ends_on_demand_and_the_job_goes_on(dashboard: Dashboard) -> None:
    jobs = Jobs(dashboard.address)
    sent = jobs.submit(spec())
    leave = threading.Event()
    leave.set()

    assert not jobs.wait(sent.id, leave=leave).is_over


def test_a_cluster_that_forgot_the_job_or_went_silent_interrupts(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(dashboard.address)
    sent = jobs.submit(spec())
    monkeypatch.setattr(submission, "_POLL_S", 0.01)
    asked, kept = [], dashboard.answer

    def forgetful(method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        asked.append(path)
        return kept(method, path, body, token) if len(asked) < 3 else (404, "Job does not exist")

    dashboard.answer = forgetful  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError, match="no longer knows job"):
        jobs.wait(sent.id)


# --- who is let in --------------------------------------------------------------------------------------------------


def put_into(place: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.write_text(f"{TOKEN}\n" if place == "home" else "another")
    if place == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    if place == "path":
        (home / "token").write_text(TOKEN)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))


@pytest.mark.parametrize("place", ["variable", "path", "home"])
def test_the_token_is_found_where_ray_finds_it(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    dashboard.token = TOKEN
    put_into(place, monkeypatch, tmp_path / "home")

    assert Jobs(dashboard.address).ours() == []


def test_no_token_and_a_wrong_one_have_two_messages(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard.token = TOKEN

    with pytest.raises(ConfigError, match="none is set: set RAY_AUTH_TOKEN"):
        Jobs(dashboard.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    with pytest.raises(ConfigError, match="another cluster's; set RAY_AUTH_TOKEN"):
        Jobs(dashboard.address)


def test_a_mode_that_needs_a_token_without_one_is_not_called_the_clusters(dashboard: Dashboard) -> None:
    jobs = Jobs(dashboard.address)

    # Ray reads the mode once in a process, and raises this before it asks the cluster.
    error = AuthenticationError("Token authentication is enabled but Ray couldn't find an authentication token.")
    with pytest.raises(ConfigError, match=r"no token is set: set .*unset RAY_AUTH_MODE"), jobs._operator_errors():
        raise error


def test_an_open_cluster_is_refused_where_authentication_is_required(dashboard: Dashboard) -> None:
    assert authentication.authentication(dashboard.address) == "none"

    with pytest.raises(ConfigError, match="without token authentication"):
        Jobs(dashboard.address).submit(spec(placement__require_auth=True))
    assert not dashboard.jobs


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:1", "no Ray dashboard answers at http://127.0.0.1:1; correct --address"),
        ("head:6379", "got head:6379, expected an http or https URL such as http://head:8265"),
        ("ray://head:10001", "not the address of a dashboard"),
    ],
)
def test_an_address_without_a_dashboard_is_reported(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Jobs(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_who_does_not_answer_says_nothing_of_authentication(address: str) -> None:
    assert authentication.authentication(address) == "unknown"


@pytest.mark.parametrize(("mode", "found"), [(None, "token"), ("token", "token"), ("disabled", "none")])
def test_a_ray_of_our_own_has_a_token_unless_configured_otherwise(
    monkeypatch: pytest.MonkeyPatch, mode: str | None, found: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)

    assert authentication.authentication("local") == found


@pytest.mark.parametrize(
    ("address", "warned"), [("127.0.0.1:6379", False), ("http://localhost:8265", False), ("10.0.0.7:6379", True)]
)
def test_an_open_cluster_is_reported_where_others_can_reach_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str, *, warned: bool
) -> None:
    monkeypatch.setattr(authentication, "authentication", lambda _: "none")

    authentication.check_authentication(address, required=False)

    assert ("open_cluster_found" in caplog.text) is warned


# --- the command ----------------------------------------------------------------------------------------------------


def test_flags_of_run_become_work_with_the_run_date_of_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    flags = RunFlags(manifest="in/{date}", output="out/{date}", run_date="2026-11-22", limit=5)

    made = job_commands._job_spec(flags, None, retry_failed=True)

    assert (made.manifest, made.output) == (f"{tmp_path}/in/2026-11-22", f"{tmp_path}/out/2026-11-22")
    assert (made.run_date, made.config.run_date, made.config.budget.limit) == ("2026-11-22", "2026-11-22", 5)
    assert made.arguments == ("--retry-failed",)
    assert made.config.filled().output == made.output  # as the driver fills it in


def test_names_of_columns_go_with_the_job() -> None:
    flags = RunFlags(manifest="s3://b/m", output="s3://b/out", column=["prompt=caption", "image=a.b=c"])

    made = job_commands._job_spec(flags, None, retry_failed=False)

    assert made.config.columns == {"prompt": "caption", "image": "a.b=c"}
    sent = yaml_text.parse(yaml_text.dump(made.config.model_dump(mode="json", exclude_unset=True)))
    assert sent["columns"] == made.config.columns


@pytest.mark.parametrize("column", [["prompt"], ["=x"], ["prompt="], ["a.b=c"], ["prompt=a", "prompt=b"]])
def test_a_flag_that_names_no_column_or_one_twice_is_refused(column: list[str]) -> None:
    with pytest.raises(ConfigError, match="--column"):
        RunFlags(manifest="m", output="o", column=column).load({})


def test_a_backfill_is_one_job_of_many_dates() -> None:
    flags = RunFlags(manifest="s3://b/{date}", output="s3://b/out/{date}", backfill="2026-11-20..2026-11-22")

    made = job_commands._job_spec(flags, None, retry_failed=False)

    assert made.arguments == ("--backfill=2026-11-20..2026-11-22",)
    assert (made.output, made.run_date) == ("s3://b/out/{date}", "2026-11-20..2026-11-22")
    assert yaml_text.parse(yaml_text.dump(made.config.output)) == made.output


def pia_batch(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


def test_submitting_listing_stopping(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    submit = ["submit", "--manifest", "s3://b/in", "--output", "s3://b/out", "--address", dashboard.address]

    assert pia_batch(*submit, "--no-wait") == 0
    job_id = capsys.readouterr().out.strip()
    assert job_id in dashboard.jobs

    assert pia_batch(*submit) == 75
    assert f"job {job_id} for s3://b/out is already RUNNING" in capsys.readouterr().err

    assert pia_batch("jobs", "--address", dashboard.address) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["job", "status", "exit", "started", "(UTC)", "seconds", "output"]
    assert row.split()[:2] + row.split()[-1:] == [job_id, "RUNNING", "s3://b/out"]

    assert pia_batch("jobs", "--address", dashboard.address, "--stop", job_id) == 0
    assert capsys.readouterr().out == f"{job_id} STOPPED\n"
    assert pia_batch("jobs", "--address", dashboard.address, "--stop", job_id) == 0
    assert capsys.readouterr().out == f"{job_id} is already over\n"

    assert pia_batch("jobs", "--address", dashboard.address, "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)["jobs"]
    assert (listed["id"], listed["status"], listed["exit_code"]) == (job_id, "STOPPED", None)


def test_following_ends_with_the_exit_code_of_the_driver(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = Jobs(dashboard.address).submit(spec())
    dashboard.logs = "[bold]3 requests: 1 failed[/bold]\n"
    dashboard.end(sent.id, "FAILED", 3)

    assert pia_batch("jobs", "--address", dashboard.address, "--follow", sent.id) == 3
    shown = capsys.readouterr()
    assert shown.out == dashboard.logs  # and not as markup
    assert f"{sent.id} FAILED" in shown.err


def test_a_cluster_has_to_be_named(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.address
    assert pia_batch("jobs") == 2
    assert "give --address, or set RAY_ADDRESS" in capsys.readouterr().err
