import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pia_batch.errors import InterruptedRunError, LeaseHeldError, ObjectExistsError, StorageError
from pia_batch.journal import layout, lease
from pia_batch.journal.lease import Lease, read_newest_lease
from pia_batch.storage.object_store import Store

LONG_S = 60.0
"""A lease that no test waits for."""


def held_elsewhere(store: Store, ttl_s: float, **changes: Any) -> None:
    """What a run on another machine leaves when its machine goes away."""
    state = {"run_id": "theirs", "released": False, "ttl_s": ttl_s, "host": "elsewhere", "pid": os.getpid()}
    state |= {"process_started": 0.0, "boot": 0.0}
    store.create("_lease/000000000001.json", json.dumps(state | changes).encode())


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lease_is_held_inside_and_released_after(store: Store) -> None:
    with Lease(store, "mine", LONG_S) as held:
        generation, holder = read_newest_lease(store)
        assert generation == 1
        assert holder is not None
        assert (holder["run_id"], holder["released"]) == ("mine", False)
        assert not held.lost.is_set()

    generation, holder = read_newest_lease(store)
    assert generation == 2
    assert holder is not None
    assert holder["released"]


def test_nothing_is_held_before_the_first_run(store: Store, tmp_path: Path) -> None:
    assert read_newest_lease(store) == (0, None)
    assert not (tmp_path / "out").exists()


def test_a_second_run_is_refused_while_the_first_renews(store: Store) -> None:
    started = time.monotonic()
    with (
        Lease(store, "mine", 3.0),
        pytest.raises(LeaseHeldError, match=r"run mine on .* works on file://"),
        Lease(store, "other", 3.0),
    ):
        pass
    assert time.monotonic() - started < 20


def test_a_released_lease_is_taken_at_once(store: Store) -> None:
    started = time.monotonic()
    for run_id in ("first", "second", "third"):
        with Lease(store, run_id, LONG_S):
            pass
    assert time.monotonic() - started < LONG_S / 2


def test_an_error_inside_releases_too(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), Lease(store, "mine", LONG_S):
        raise ZeroDivisionError

    with Lease(store, "other", LONG_S):
        pass


def test_a_run_that_died_elsewhere_is_waited_for_as_long_as_its_lease_lasts(store: Store) -> None:
    held_elsewhere(store, ttl_s=0.6)
    started = time.monotonic()

    with Lease(store, "mine", 0.6):
        waited = time.monotonic() - started

    assert 0.6 <= waited < 20


def test_a_lease_released_while_waited_for_is_taken_at_once(store: Store) -> None:
    held_elsewhere(store, ttl_s=LONG_S)
    timer = threading.Timer(
        0.3, lambda: store.create("_lease/000000000002.json", json.dumps({"released": True}).encode())
    )
    timer.start()
    started = time.monotonic()

    with Lease(store, "mine", 0.6):
        assert read_newest_lease(store)[0] == 3
    timer.join()
    assert time.monotonic() - started < LONG_S / 2


def test_a_run_that_was_killed_on_this_machine_is_not_waited_for(store: Store) -> None:
    program = (
        "import sys, time; from pia_batch.journal.lease import Lease\n"
        "from pia_batch.storage.object_store import Store\n"
        f"with Lease(Store({store.uri!r}), 'killed', {LONG_S}): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
    generation, holder = read_newest_lease(store)
    assert holder is not None
    assert (generation, holder["run_id"], holder["released"]) == (1, "killed", False)
    started = time.monotonic()

    with Lease(store, "mine", LONG_S):
        assert time.monotonic() - started < LONG_S / 2


def test_a_living_process_on_this_machine_is_not_taken_for_dead(store: Store) -> None:
    with Lease(store, "mine", LONG_S):
        _, holder = read_newest_lease(store)
    assert holder is not None

    assert not lease._died_here(holder)
    assert lease._died_here(holder | {"process_started": holder["process_started"] - 100})  # its pid was given again
    assert lease._died_here(holder | {"pid": 2**22 + 1})
    assert not lease._died_here(holder | {"pid": 2**22 + 1, "host": "elsewhere"})
    assert not lease._died_here(holder | {"pid": 2**22 + 1, "boot": holder["boot"] - 100})


def test_renewals_write_one_generation_after_the_other(store: Store) -> None:
    with Lease(store, "mine", 0.15):
        until(lambda: read_newest_lease(store)[0] >= 4)

    generation, _ = read_newest_lease(store)
    names = sorted(item.name for item in store.list(layout.LEASES))
    assert names == [f"_lease/{k:012d}.json" for k in range(1, generation + 1)]


def test_a_run_whose_lease_was_taken_learns_of_it_and_writes_no_more(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with Lease(store, "mine", 0.6) as held:
        store.create("_lease/000000000002.json", json.dumps({"run_id": "theirs", "released": False}).encode())

        assert held.lost.wait(10)

    assert read_newest_lease(store)[0] == 2
    assert "lease_lost run_id=mine" in caplog.text


def test_exactly_one_of_racing_runs_gets_a_free_lease(store: Store) -> None:
    barrier, done = threading.Barrier(2), threading.Event()

    def race(run_id: str) -> bool:
        barrier.wait()
        try:
            with Lease(store, run_id, 3.0):
                done.wait(10)
        except LeaseHeldError:
            done.set()
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(race, ["one", "two"])) == [False, True]


def test_exactly_one_of_racing_runs_takes_over_from_a_dead_one(store: Store) -> None:
    held_elsewhere(store, ttl_s=0.3)
    test_exactly_one_of_racing_runs_gets_a_free_lease(store)


class ForgetfulStore(Store):
    """Loses the reply to some creates: they are tried again, and then their own bytes are in the way."""

    def __init__(self, uri: str, lose: int) -> None:
        super().__init__(uri)
        self.lose = lose

    def create(self, name: str, data: bytes) -> None:
        super().create(name, data)
        if self.lose:
            self.lose -= 1
            msg = f"{name} exists"
            raise ObjectExistsError(msg)


def test_a_run_does_not_mistake_its_own_unanswered_write_for_another_run(store: Store) -> None:
    with Lease(ForgetfulStore(store.uri, lose=2), "mine", 0.15) as held:
        until(lambda: read_newest_lease(store)[0] >= 4)
        assert not held.lost.is_set()


class AilingStore(Store):
    """Refuses every create while `ill`."""

    ill = False

    def create(self, name: str, data: bytes) -> None:
        if self.ill:
            msg = "no answer"
            raise StorageError(msg)
        super().create(name, data)


def test_a_renewal_that_fails_is_tried_again_and_does_not_lose_the_lease(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ailing = AilingStore(store.uri)
    with Lease(ailing, "mine", 0.15) as held:
        ailing.ill = True
        until(lambda: "lease_renewal_failed error=no answer" in caplog.text)
        ailing.ill = False
        generation, _ = read_newest_lease(store)
        until(lambda: read_newest_lease(store)[0] > generation)
        assert not held.lost.is_set()


def test_a_lease_that_cannot_be_released_does_not_spoil_the_run(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    ailing = AilingStore(store.uri)
    with caplog.at_level(logging.WARNING), Lease(ailing, "mine", LONG_S):
        ailing.ill = True

    assert "lease_release_failed error=no answer" in caplog.text


def test_a_lease_that_another_run_took_is_reported_by_check(store: Store) -> None:
    with Lease(store, "mine", LONG_S) as held:
        held.check()
        held.lost.set()

        with pytest.raises(LeaseHeldError, match="has taken over"):
            held.check()


def test_a_run_that_queues_gets_the_lease_when_the_other_one_ends(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    waited = []

    def queue() -> None:
        with Lease(store, "second", 3.0, wait_s=60) as held:
            waited.append(held.has_waited)

    with Lease(store, "first", 3.0):
        thread = threading.Thread(target=queue)
        thread.start()
        until(lambda: "lease_waiting holder=first" in caplog.text)
        assert not waited
    thread.join(20)

    assert waited == [True]
    with Lease(store, "third", 3.0) as held:
        assert not held.has_waited


def test_patience_ends_with_the_other_run_named(store: Store) -> None:
    clock, slept = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal clock, slept
        clock, slept = clock + seconds, slept + 1
        _, holder = read_newest_lease(store)
        assert holder is not None
        store.create(f"_lease/{slept + 1:012d}.json", json.dumps(holder).encode())  # the other one renews, always

    held_elsewhere(store, ttl_s=LONG_S)
    with (
        pytest.raises(LeaseHeldError, match=r"run theirs on elsewhere works .* within 50 s \(limits\.lease_wait_s"),
        Lease(store, "mine", LONG_S, lambda: clock, sleep, wait_s=50),
    ):
        pass

    assert 50 <= clock <= 52
    assert read_newest_lease(store)[1] == json.loads(store.read("_lease/000000000001.json"))  # nothing of ours


def test_a_run_that_queues_can_be_stopped(store: Store) -> None:
    stop = threading.Event()
    held_elsewhere(store, ttl_s=LONG_S)
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    started = time.monotonic()

    with (
        pytest.raises(InterruptedRunError, match="the run had not begun"),
        Lease(store, "mine", LONG_S, wait_s=float("inf"), stop=stop),
    ):
        pass

    timer.join()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("renewed_s", "is_taken"), [(None, True), (61.9, True), (59.9, False), (30.0, False)])
def test_a_silent_lease_is_free_once_its_time_is_over_and_not_before(
    store: Store, renewed_s: float | None, is_taken: bool
) -> None:
    """limits.lease_ttl_s, by a clock of the test's own."""
    clock = 0.0

    def sleep(seconds: float) -> None:
        nonlocal clock
        before, clock = clock, clock + seconds
        if renewed_s is not None and before < renewed_s <= clock < 60:
            _, holder = read_newest_lease(store)
            store.create(f"_lease/{2:012d}.json", json.dumps(holder).encode())

    held_elsewhere(store, ttl_s=60)
    with (
        nullcontext() if is_taken else pytest.raises(LeaseHeldError),
        Lease(store, "mine", 0.6, lambda: clock, sleep),
    ):
        assert 60 <= clock < 60.2


@pytest.mark.parametrize(("released_s", "is_taken"), [(49.9, True), (50.0, True), (50.3, False), (90.0, False)])
def test_a_run_queues_as_long_as_it_may_and_no_longer(store: Store, released_s: float, is_taken: bool) -> None:
    """limits.lease_wait_s, by a clock of the test's own."""
    clock, slept = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal clock, slept
        clock, slept = clock + seconds, slept + 1
        _, holder = read_newest_lease(store)
        assert holder is not None
        holder |= {"released": clock >= released_s - 1e-6}
        store.create(f"_lease/{slept + 1:012d}.json", json.dumps(holder).encode())

    held_elsewhere(store, ttl_s=LONG_S)
    with (
        nullcontext() if is_taken else pytest.raises(LeaseHeldError, match=r"within 50 s \(limits\.lease_wait_s"),
        Lease(store, "mine", 0.06, lambda: clock, sleep, wait_s=50),
    ):
        assert clock <= 50.2
