"""Jobs as they are used: on a Ray cluster with token authentication, with real logs, real stops, real exit codes."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from inputs import requests_table
from servers import free_port

from pia_batch import cli
from pia_batch.config import RunConfig
from pia_batch.driver import submission
from pia_batch.driver.authentication import authentication
from pia_batch.journal.log import Journal
from pia_batch.storage.object_store import Store

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Head:
    """A head node, as its users know it.

    Attributes:
        gcs: Ray's own address.
        environment: of a user: the dashboard's address, and the token.
    """

    gcs: str
    environment: dict[str, str]

    @property
    def dashboard(self) -> str:
        return self.environment["RAY_ADDRESS"]

    def pia_batch(self, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        command, environment = [str(BIN / "pia-batch"), *arguments], self.environment | variables
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=280
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head node of its own ports, session folder and token."""
    folder = f"/tmp/pb{os.getpid()}"  # noqa: S108 - Ray's sockets need a short path
    dashboard, gcs = free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "PATH": f"{BIN}:{os.environ['PATH']}",  # `python3` of the entrypoint
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # or the end of it takes half a minute
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=3"]
    command += [f"--metrics-export-port={free_port()}", "--object-store-memory=200000000", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"]
    log = tmp_path_factory.mktemp("cluster") / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, start_new_session=True)
    started = Head(f"127.0.0.1:{gcs}", environment)
    try:
        for _ in range(60):
            if started.pia_batch("jobs").returncode == 0:
                break
            assert process.poll() is None, log.read_text()
        yield started
    finally:
        process.terminate()  # with --block, ray start ends what it started
        process.wait(timeout=60)


def here(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


def test_a_job_of_rays_own_command_animates_and_its_log_says_so(
    head: Head, write_manifest: Callable[..., str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "python", "jobs/animate.py"]
    command += ["jobs/configs/smoke.yaml", "--manifest", write_manifest(requests_table(4)), "--output", str(output)]

    done = subprocess.run(
        command, cwd=ROOT, env=head.environment, capture_output=True, text=True, check=False, timeout=280
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 requests: 4 succeeded, 0 failed" in done.stdout
    assert "planned run_id=" in done.stdout
    newest = json.loads((output / "results" / "LATEST.json").read_text())
    assert json.loads((output / "results" / newest["run_id"] / "_SUCCESS.json").read_text())["succeeded"] == 4


def test_a_submitted_run_is_followed_and_ends_with_the_drivers_exit_code(
    head: Head, write_manifest: Callable[..., str], tmp_path: Path
) -> None:
    write_manifest(requests_table(3, image=["images/0.png", "images/gone.png", "images/1.png"]))
    options = ["--manifest", "manifest", "--output", "out", "--set", "placement.require_auth=true"]

    done = head.pia_batch("submit", *options, "--set", "limits.max_failed=null", "--package", str(ROOT), cwd=tmp_path)

    assert done.returncode == 3, done.stdout + done.stderr
    assert "3 requests: 2 succeeded, 1 failed" in done.stdout
    assert done.stdout.count("planned run_id=") == 1
    job = json.loads(head.pia_batch("jobs", "--json").stdout)["jobs"][0]
    assert (job["status"], job["exit_code"]) == ("FAILED", 3)
    assert (job["output"], job["manifest"]) == (str(tmp_path / "out"), str(tmp_path / "manifest"))
    assert f"submitted {job['id']}" in done.stderr
    asked = urllib.request.Request(f"{head.dashboard}/api/jobs/{job['id']}")  # noqa: S310 - our own, on loopback
    asked.add_header("Authorization", f"Bearer {head.environment['RAY_AUTH_TOKEN']}")
    with urllib.request.urlopen(asked) as answer:  # noqa: S310
        shown = answer.read().decode()
    assert head.environment["RAY_AUTH_TOKEN"] not in shown
    assert json.loads(shown)["entrypoint"] == "exec python3 -m pia_batch.cli run config.yaml"


def test_a_job_is_left_alone_guarded_against_doubles_stopped_and_resumed(
    head: Head,
    write_manifest: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, count = tmp_path / "out", 14
    submit = ["submit", "--manifest", write_manifest(requests_table(count)), "--output", str(output)]
    submit += ["--set", "placement.batch_size=1", "--set", "defaults.num_inference_steps=12"]

    with subprocess.Popen(
        [BIN / "pia-batch", *submit], env=head.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as submitter:
        while not list(output.glob("_journal/*.parquet")):
            assert submitter.poll() is None, submitter.stderr and submitter.stderr.read()
            time.sleep(0.1)
        submitter.send_signal(signal.SIGINT)
        shown_to_user = submitter.communicate(timeout=60)[1]
    assert submitter.returncode == 4, shown_to_user
    job_id = shown_to_user.partition("submitted ")[2].split()[0]
    assert f"job {job_id} continues" in shown_to_user

    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):  # the same commands in this process: the job must not end meanwhile
        monkeypatch.setenv(name, head.environment[name])
    assert here(*submit) == 75
    refused = capsys.readouterr().err
    assert f"job {job_id} for " in refused
    assert "is already RUNNING" in refused
    assert here("jobs", "--stop", job_id) == 0
    assert capsys.readouterr().out == f"{job_id} STOPPED\n"

    committed = len(Journal(Store(str(output))).outcomes().keys)
    assert 1 <= committed < count
    assert len(list(output.glob("animations/*/*"))) == committed  # nothing half done
    followed = head.pia_batch("jobs", "--follow", job_id)
    assert followed.returncode == 4
    assert "Start again to resume" in followed.stdout  # it ended by itself, with all in flight committed

    rest = head.pia_batch(*submit)
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert f"{count} requests: {count} succeeded, 0 failed; {count - committed} computed" in rest.stdout
    assert rest.stderr.startswith(f"submitted {job_id.removesuffix('1')}2 ")


def test_a_stopped_driver_has_the_time_that_the_config_leaves_it(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.environment["RAY_AUTH_TOKEN"])
    config = RunConfig.load(None, {"manifest": "m", "output": "o"})
    client = submission.Jobs(head.dashboard)._client
    # What commits for longer than the 3 s after which Ray kills by itself.
    program = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(4), print('all done'), sys.exit()))"
    job_id = client.submit_job(
        entrypoint=f'exec python3 -c "{program}; print(1, flush=True); time.sleep(100)"',
        runtime_env={"env_vars": submission.environment(config)},
    )
    while "1\n" not in client.get_job_logs(job_id):
        time.sleep(0.2)

    client.stop_job(job_id)

    while not client.get_job_status(job_id).is_terminal():
        time.sleep(0.2)
    assert "all done" in client.get_job_logs(job_id)


@pytest.mark.parametrize(
    ("token", "words"), [("", "asks for a token, and none is set"), ("0" * 64, "another cluster's")]
)
def test_without_the_token_a_command_shows_nothing_but_the_remedy(
    head: Head, tmp_path: Path, token: str, words: str
) -> None:
    refused = head.pia_batch("jobs", RAY_AUTH_TOKEN=token, HOME=str(tmp_path))

    assert refused.returncode == 2
    assert words in refused.stderr
    assert "set RAY_AUTH_TOKEN" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_cluster_says_to_strangers_that_it_wants_a_token(head: Head) -> None:
    assert authentication(head.dashboard) == authentication(head.gcs) == "token"
