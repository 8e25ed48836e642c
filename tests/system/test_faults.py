"""Whole runs under real faults: a real S3 server behind a proxy that fails, real Ray, processes that are killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import FINISHED, Case, Stack, Trial, stack
from proxy import Aimed, Fault

pytestmark = [pytest.mark.long, pytest.mark.s3]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("faults")) as started:
        yield started


@pytest.fixture(scope="module")
def case(everything: Stack) -> Case:
    return Case.make(0, everything)


@pytest.fixture
def trial(everything: Stack, case: Case, request: pytest.FixtureRequest) -> Iterator[Trial]:
    yield (trial := Trial(everything, case, f"s3://{everything.server.bucket}/{request.node.name}-{time.time_ns()}"))
    everything.proxy.set()
    trial.kill()


def test_answers_that_fail_come_late_or_not_at_all_change_nothing(trial: Trial) -> None:
    faults = [Fault("500"), Fault("503"), Fault("reset"), Fault("lost"), Fault("slow", 1.0), Fault("frozen", 2.0)]
    aims = [Aimed(fault, "PUT", "/animations/", nth=k + 1) for k, fault in enumerate(faults)]
    aims += [Aimed(Fault("lost"), "PUT", "/_journal/[0-9a-f]{32}"), Aimed(Fault("cut"), "GET", "/_journal/.*parquet")]
    aims += [Aimed(Fault("lost"), "PUT", "/_SUCCESS"), Aimed(Fault("reset"), "PUT", "/LATEST")]
    trial.stack.proxy.set(*aims)

    assert trial.run() in FINISHED
    assert not any(aim.times for aim in aims)  # every one of them has struck
    assert trial.problems_now() == []
    assert trial.problems_of_a_rerun() == []


def test_a_store_that_ignores_if_none_match_is_refused_before_anything_is_generated(trial: Trial) -> None:
    trial.stack.proxy.set(Aimed(Fault("careless"), "PUT", "", times=1000))

    assert trial.run() == 2
    written = {seen.path for seen in trial.stack.proxy.below(trial.prefix) if seen.verb == "PUT"}
    assert written == {f"{trial.prefix}/_journal/create-only"}
    assert trial.num_engines == 0


def test_a_store_that_overwrites_behind_our_back_is_found_out(trial: Trial) -> None:
    careless = Aimed(Fault("careless"), "PUT", "/animations/", times=1000)
    trial.stack.proxy.set(Aimed(Fault("lost"), "PUT", "/animations/"), careless)

    assert trial.run() in FINISHED
    assert [problem.partition(" ")[2] for problem in trial.problems_now()] == ["was written 2 times"]


@pytest.mark.parametrize(
    ("answer", "verb", "where"),
    [((400, "ExpiredToken"), "PUT", "/animations/"), ((404, "NoSuchBucket"), "GET", "/_journal/.*parquet")],
    ids=["expired", "vanished"],  # the name of the output has the test's own
)
def test_a_store_that_refuses_in_the_middle_ends_the_run_and_the_next_one_finishes(
    trial: Trial, answer: tuple[int, str], verb: str, where: str
) -> None:
    trial.stack.proxy.set(Aimed(Fault("error", answer=answer), verb, where, nth=2, times=1000))

    assert trial.run() == 4
    assert trial.finish() == 1
    assert trial.problems_now() == []


def test_a_driver_that_is_killed_at_one_step_after_the_other_is_finished_by_the_next(trial: Trial) -> None:
    points = [
        ("lost", "/_journal/[0-9a-f]{32}", 2),  # a batch is committed, and the driver dies before it hears of that
        ("reset", "/_SUCCESS", 1),
        ("lost", "/LATEST", 1),
    ]
    for kind, where, nth in points:
        trial.stack.proxy.set(Aimed(Fault(kind, act=trial.kill_drivers), "PUT", where, nth))
        assert trial.wait(trial.start(seconds=0.3)) == -signal.SIGKILL

    assert trial.finish() == 1
    assert trial.problems_now() == []
    assert trial.problems_of_a_rerun() == []


def test_workers_that_are_killed_while_they_store_are_replaced(trial: Trial) -> None:
    kill = [Aimed(Fault(kind, act=trial.kill_sender), "PUT", "/animations/", nth=3) for kind in ("reset", "lost")]
    trial.stack.proxy.set(*kill)

    assert trial.run() in FINISHED
    assert trial.num_engines == 3
    assert trial.problems_now() == []


def test_a_store_that_stands_still_or_is_killed_and_comes_back_has_lost_nothing_and_fails_nothing(trial: Trial) -> None:
    still = Aimed(Fault("pass", act=trial.stack.standstill(2.0)), "PUT", "/animations/", nth=2)
    killed = Aimed(Fault("lost", act=trial.stack.outage(1.0)), "PUT", "/animations/", nth=4)
    trial.stack.proxy.set(still, killed)

    assert trial.run() in FINISHED
    assert (still.times, killed.times) == (0, 0)
    assert trial.problems_now() == []


def test_of_two_drivers_at_once_one_leaves_or_both_finish(trial: Trial) -> None:
    drivers = [trial.start(seconds=0.3) for _ in range(2)]
    codes = sorted([trial.wait(driver) for driver in drivers])

    assert codes[0] in FINISHED
    assert codes[1] in (*FINISHED, 75)
    assert trial.problems_now() == []


def test_a_worker_that_stood_still_while_others_finished_adds_nothing_when_it_goes_on(trial: Trial) -> None:
    standstill = trial.freeze_at("held", ("PUT", "/animations/", 2))
    assert standstill is not None
    assert trial.finish() == 1
    assert trial.problems_now() == []

    standstill.end()

    assert trial.wait(standstill.driver) in (*FINISHED, 75)
    assert trial.problems_now() == []
    assert trial.problems_of_a_rerun() == []


def test_a_driver_that_is_asked_to_leave_commits_what_is_generated_before_it_is_killed(trial: Trial) -> None:
    committed_two = threading.Event()
    driver = trial.start(seconds=2.0)
    trial.stack.proxy.set(Aimed(Fault("pass", act=lambda _: committed_two.set()), "PUT", "/_journal/[0-9a-f]{32}", 2))
    assert committed_two.wait(120), trial.log()
    driver.send_signal(signal.SIGTERM)
    killer = threading.Timer(30, trial.kill)
    killer.start()

    assert trial.wait(driver) == 4, trial.log()
    killer.cancel()
    asked = [seen.path for seen in trial.stack.proxy.below(trial.prefix) if seen.verb == "PUT" and seen.status == 200]
    animations = {Path(path).stem for path in asked if "/animations/" in path}
    committed = trial.committed_keys()
    assert animations <= committed
    assert 2 <= len(animations) < 8
    assert trial.finish() == 1
    assert trial.problems_now() == []


# --- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own. Skips the test where none may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("nothing may be mounted here; a limit on the size of files is tested besides")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_waited_for_and_leaves_no_half_files(everything: Stack, case: Case, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        trial = Trial(everything, case, str(disk / "out"))
        ballast = disk / "ballast"

        def fill() -> None:
            while len(list(disk.rglob("animations/*/*"))) < 2:
                time.sleep(0.02)
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    full.set()
            time.sleep(2.0)
            trial.problems += trial.look()
            ballast.unlink()

        full = threading.Event()
        filler = threading.Thread(target=fill)
        filler.start()
        code = trial.run(seconds=0.3)
        filler.join()

        assert full.is_set()
        assert code in FINISHED
        assert trial.problems_now() == []
        assert trial.problems_of_a_rerun() == []


def test_an_output_that_goes_away_under_a_run_is_not_made_again_and_the_next_run_finishes(
    everything: Stack, case: Case, tmp_path: Path
) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    trial = Trial(everything, case, str(output))

    def take_away() -> None:
        while len(list(output.glob("_journal/*.parquet"))) < 2:
            time.sleep(0.02)
        output.rename(elsewhere)

    thief = threading.Thread(target=take_away)
    thief.start()
    code = trial.run(seconds=0.5)
    thief.join()

    assert code == 4
    assert not list(output.rglob("*.parquet"))
    shutil.rmtree(output, ignore_errors=True)  # of a write that had begun
    elsewhere.rename(output)
    assert trial.run() in FINISHED
    assert trial.problems_now() == []


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys\n"
        "from pia_batch.storage import object_store as storage\n"
        "storage.ATTEMPTS = 1\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "store = storage.Store(sys.argv[1])\n"
        "store.create('small', bytes(900))\n"
        "for write in (store.create, store.replace):\n"
        "    try:\n"
        "        write('large', bytes(5000))\n"
        "    except storage.StorageError as err:\n"
        "        print(err)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True, timeout=100
    )

    assert done.stdout.count("cannot create") == done.stdout.count("cannot write") == 1
    assert {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} == {"small": 900}
