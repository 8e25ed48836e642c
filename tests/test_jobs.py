"""`jobs/animate.py` as it is used: submitted to a Ray cluster, with token authentication, real logs, real exit code."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import requests_table

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of its own ports, session folder and token; what is yielded is the environment of its users."""
    folder = f"/tmp/pb{os.getpid()}"  # noqa: S108 - Ray's sockets need a short path
    dashboard = free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # `python` of the entrypoint
    }
    command = [RAY, "start", "--head", "--block", f"--port={free_port()}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=3"]
    command += [f"--metrics-export-port={free_port()}", "--object-store-memory=200000000", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"]
    log = tmp_path_factory.mktemp("cluster") / "log"
    with log.open("wb") as sink:
        head = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, start_new_session=True)
    try:
        for _ in range(60):
            asked = subprocess.run([RAY, "job", "list"], env=environment, capture_output=True, check=False, timeout=60)
            if asked.returncode == 0:
                break
            assert head.poll() is None, log.read_text()
        yield environment
    finally:
        head.terminate()  # with --block, ray start ends what it started
        head.wait(timeout=60)


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "jobs/animate.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)


def test_a_submitted_job_animates_and_its_log_says_so(
    cluster: dict[str, str], write_manifest: Callable[..., str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    manifest = write_manifest(requests_table(4))

    done = submit(cluster, "jobs/configs/smoke.yaml", "--manifest", manifest, "--output", str(output))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 requests: 4 succeeded, 0 failed" in done.stdout
    assert "planned run_id=" in done.stdout
    newest = json.loads((output / "results" / "LATEST.json").read_text())
    assert json.loads((output / "results" / newest["run_id"] / "_SUCCESS.json").read_text())["succeeded"] == 4


def test_a_submitted_job_fails_with_the_drivers_own_exit_code(cluster: dict[str, str], tmp_path: Path) -> None:
    done = submit(cluster, "--manifest", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out"))

    assert done.returncode == 1  # what ray job submit makes of every failure
    assert "does not exist" in done.stdout
    assert "exit code 2" in done.stdout + done.stderr


def test_the_cluster_file_is_valid_for_ray() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config  # noqa: PLC0415

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))
