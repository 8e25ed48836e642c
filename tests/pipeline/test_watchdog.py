"""The end of a worker that takes too long or too much memory, in processes of their own."""

import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from pia_batch.pipeline import watchdog
from pia_batch.pipeline.watchdog import Watchdog, own_bytes

PROGRAM = """
import os, sys, time
import numpy as np
from pia_batch.pipeline.watchdog import Watchdog, own_bytes

def report(keys, cause):
    print(cause, *keys, flush=True)

dog = Watchdog(report, lambda: os._exit(7), own_bytes() + 64 * 2**20)
with dog.watch(["a", "b"], 60.0):
    {work}
print("survived")
"""


def run(work: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(work=work)], capture_output=True, text=True, check=False, timeout=100
    )
    return done.returncode, done.stdout.strip()


def test_a_process_that_grows_beyond_its_limit_says_so_and_ends() -> None:
    eats = "hoard = []\n    while sum(map(len, hoard)) < 512 * 2**20: hoard.append(b'x' * 2**22); time.sleep(0.02)"

    assert run(eats) == (7, "out_of_memory a b")


def test_a_process_that_grows_within_its_limit_goes_on() -> None:
    assert run("hoard = np.ones(2**20); time.sleep(0.8)") == (0, "survived")


def test_memory_that_is_shared_with_others_is_not_its_own() -> None:
    from multiprocessing import shared_memory  # noqa: PLC0415

    segment = shared_memory.SharedMemory(create=True, size=2**26)
    try:
        before = own_bytes()
        np.ndarray(2**26, np.uint8, segment.buf)[:] = 1
        shared = own_bytes() - before
        hoard = np.ones(2**26, np.uint8)
        private = own_bytes() - before - shared
    finally:
        segment.close()
        segment.unlink()

    assert abs(shared) < 2**24
    assert abs(private - len(hoard)) < 2**24


def test_work_past_its_deadline_ends_the_process_and_work_within_it_does_not() -> None:
    reported: list[tuple[list[str], str]] = []
    dead = threading.Event()
    dog = Watchdog(lambda keys, cause: reported.append((keys, cause)), dead.set)

    with dog.watch(["quick"], 30.0):
        pass
    with dog.watch(["slow"], 0.1):
        assert dead.wait(20)

    assert reported == [(["slow"], "timeout")]


def test_a_process_ends_even_where_the_report_fails() -> None:
    dead = threading.Event()

    def unreachable(keys: list[str], cause: str) -> None:
        raise ConnectionError(keys, cause)

    with pytest.raises(ConnectionError):
        Watchdog(unreachable, dead.set).give_up(["a"], "timeout")

    assert dead.is_set()


def test_no_thread_watches_work_that_has_ended() -> None:
    dead = threading.Event()
    for _ in range(20):
        with Watchdog(lambda *_: None, dead.set).watch(["a"], 60.0):
            pass
    deadline = time.monotonic() + 10
    while any(thread.name == "watchdog" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    assert not dead.is_set()


def test_the_time_of_requests_is_the_limit_up_to_the_work_that_it_is_meant_for_and_grows_beyond() -> None:
    def row(steps: int) -> dict[str, Any]:
        return {
            "num_inference_steps": steps, "free_init_iters": 0, "num_frames": 16, "width": 512, "height": 512,
            "context": None, "context_length": 16,
        }  # fmt: skip

    assert [watchdog.deadline_s([row(steps)], 100.0) for steps in (24, 25, 26)] == [100.0, 100.0, 104.0]
    assert watchdog.deadline_s([row(25), row(25)], 100.0) == 200.0
    assert watchdog.deadline_s([row(10), row(15)], 100.0) == 100.0
