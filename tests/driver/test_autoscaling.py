"""Runs on a cluster that Ray's own autoscaler resizes: its fake provider starts each node on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from inputs import requests_table
from node_engines import NodeEngineLoader
from places import PYTHONPATH
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from pia_batch.config import RunConfig
from pia_batch.driver import run as driver_run
from pia_batch.errors import InterruptedRunError
from pia_batch.planning.plan import make_plan

pytestmark = [pytest.mark.slow, pytest.mark.long]

MakeConfig = Callable[..., RunConfig]

STORE_BYTES = 80 * 2**20
IDLE_MINUTES = 0.1


@contextmanager
def cluster(max_workers: int) -> Iterator[psutil.Process]:
    """A head without GPUs, and workers with one GPU each, in name only, that come by demand; yields the head's process.

    Ray keeps no address of it (it has a folder of its own), and its processes are ended by their ids.
    """
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        config = Path(folder, "cluster.json")
        config.write_text(json.dumps(_config(f"127.0.0.1:{port}", max_workers)))
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += [
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            f"--temp-dir={folder}",
            "--include-dashboard=false",
        ]
        command += ["--num-cpus=2", "--num-gpus=0", f"--object-store-memory={STORE_BYTES}"]
        head = subprocess.Popen(
            [*command, f"--autoscaling-config={config}"],
            env=os.environ
            | {
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_AUTH_MODE": "disabled",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_FAKE_CLUSTER": "1",
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                "RAY_enable_autoscaler_v2": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _connect(f"127.0.0.1:{port}")
            yield psutil.Process(head.pid)
        finally:
            ray.shutdown()
            _end(psutil.Process(head.pid))
            head.wait()


def _config(address: str, max_workers: int) -> dict[str, Any]:
    """Config of the autoscaler, as JSON, which is YAML: what `cluster.yaml` says for AWS, for this machine."""
    worker = {"CPU": 1, "GPU": 1, "object_store_memory": STORE_BYTES}
    return {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": max_workers},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{key: [] for key in _COMMANDS},
    }


_COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)
"""Commands by which Ray prepares a node over SSH; a fake node needs none, and Ray asks for the keys."""


def _connect(address: str) -> None:
    deadline = time.monotonic() + 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        while True:
            try:
                socket.create_connection(tuple(address.split(":")), timeout=1).close()  # type: ignore[arg-type]
                ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH}})
            except (OSError, ConnectionError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return


def _end(head: psutil.Process) -> None:
    """End a process and all that it has started, by their ids."""
    processes = [*head.children(recursive=True), head]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)


def gpu_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]


def kill_node(head: psutil.Process, node: str) -> None:
    """Kill the raylet of one node, and nothing else."""
    port = next(each["NodeManagerPort"] for each in ray.nodes() if each["NodeID"] == node)
    raylets = [each for each in head.children(recursive=True) if each.name() == "raylet"]
    (raylet,) = [each for each in raylets if node in " ".join(each.cmdline()) or _listens(each, port)]
    raylet.kill()


def _listens(process: psutil.Process, port: int) -> bool:
    return any(each.laddr.port == port for each in process.net_connections("tcp") if each.status == "LISTEN")


def test_nodes_come_for_a_run_one_that_is_killed_costs_its_batches_and_all_go_afterwards(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        requests_table(60, format=["gif"] * 60),
        placement__num_gpus=1,
        placement__min_engines=2,
        placement__max_engines=2,
        placement__batch_size=2,
    )
    engines = tmp_path / "engines"
    engines.mkdir()
    seen: set[str] = set()
    killed: list[str] = []

    with cluster(max_workers=2) as head:
        assert not gpu_nodes()

        def watch(_: object) -> None:
            seen.update(gpu_nodes())
            committed = len(list(Path(config.output, "_journal").glob("*.parquet")))
            if not killed and len(seen) == 2 and committed >= 6:
                killed.append(gpu_nodes()[0])
                kill_node(head, killed[0])

        loader = NodeEngineLoader(make_plan(config).engine_ids["default"], engines, crowd=2, seconds=0.2)
        summary = driver_run.run(config, load_engines=loader, on_progress=watch)
        gone = time.monotonic() + 90
        while gpu_nodes() and time.monotonic() < gone:
            time.sleep(1)
        left = gpu_nodes()

    rows = pq.read_table(f"{config.output}/results/{summary.run_id}").to_pylist()
    assert (summary.succeeded, summary.exit_code) == (60, 0)
    assert Counter(row["request_id"] for row in rows) == Counter({f"r{k:03d}": 1 for k in range(60)})
    assert len(seen) >= 2, "the autoscaler started a node for each engine"
    assert killed
    begun_again = [row for row in rows if row["attempts"] > 1]
    assert len(begun_again) <= 4 * config.placement.batch_size
    assert left == [], "the autoscaler gave every node back"


@pytest.mark.timeout(180)
def test_a_cluster_that_cannot_grow_ends_the_run_with_what_an_engine_needs(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(placement__num_gpus=1, placement__wait_s=5)

    with (
        cluster(max_workers=0),
        pytest.raises(InterruptedRunError, match="one engine needs 1 GPUs and 1 CPUs, and the"),
    ):
        driver_run.run(config)

    assert "engines_awaited" in caplog.text
