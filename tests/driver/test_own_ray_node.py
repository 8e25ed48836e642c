"""Processes of a Ray of a run's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from ray._private import node

from pia_batch.driver.own_ray_node import OwnNode, started_by_init

pytestmark = pytest.mark.slow

SCRIPT = """
import json, psutil, ray
from pia_batch.config import PlacementConfig
from pia_batch.driver import ray_cluster

with ray_cluster.connect(PlacementConfig(num_gpus=0, ray_address="local")):
    answer = ray.get(ray.remote(lambda: 7).remote())
    processes = psutil.Process().children(recursive=True)
    print(json.dumps({"answer": answer, "commands": [each.cmdline() for each in processes]}))
"""


@pytest.mark.long
def test_a_ray_of_our_own_has_no_process_that_a_run_does_not_use() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"RAY_ADDRESS": "local"},
    )

    found = json.loads(done.stdout.splitlines()[-1])
    assert found["answer"] == 7
    commands = [" ".join(words) for words in found["commands"]]
    for program in ("dashboard/dashboard.py", "monitor.py", "log_monitor.py"):
        assert not [command for command in commands if program in command], program
    (raylet,) = (command for command in commands if "/raylet/raylet " in command)
    assert "--listen-port=0" in raylet  # another Ray of this machine may have the default port


KILL = """
import sys, psutil
from pia_batch.config import PlacementConfig
from pia_batch.driver import ray_cluster
from pia_batch.driver.own_ray_node import check_processes
from pia_batch.errors import InterruptedRunError
from pia_batch.pipeline.attempts_actor import start_attempt_tracker

try:
    with ray_cluster.connect(PlacementConfig(num_gpus=0, ray_address="local")):
        tracker = start_attempt_tracker(3, check_ray=check_processes)
        assert tracker.activity().in_flight == 0
        (program,) = [each for each in psutil.Process().children() if sys.argv[1] in " ".join(each.cmdline())]
        program.kill()
        while True:
            tracker.activity()
except InterruptedRunError as err:
    print(err)
"""


@pytest.mark.long
@pytest.mark.parametrize("program", ["raylet", "gcs_server"])
def test_a_program_of_ray_that_was_killed_interrupts_the_run_before_ray_ends_it(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILL, f"/{program} "],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"RAY_ADDRESS": "local"},
    )

    line = done.stdout.splitlines()[-1]  # Ray may print the last lines of the program's log before
    assert line.startswith(f"Ray has ended on this machine: {program} (exit code -9); everything finished is committed")
    assert line.endswith("start again to resume")


def test_only_the_ray_of_a_run_is_changed() -> None:
    before = node.Node
    with started_by_init():
        assert node.Node is OwnNode
    assert node.Node is before
