from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.pipeline.attempts import AttemptTracker, SoloAttempt


def done(*keys: str) -> list[dict[str, str | None]]:
    return [{"key": key, "status": "succeeded", "error_kind": None, "animation_uri": f"{key}.mp4"} for key in keys]


def failed(key: str, kind: str) -> dict[str, str | None]:
    return {"key": key, "status": "failed", "error_kind": kind, "error": f"{kind} of {key}", "animation_uri": None}


def test_a_batch_of_a_task_that_comes_again_is_handed_back_and_not_generated_again() -> None:
    tracker = AttemptTracker(3)

    assert tracker.begin(["a", "b"]) == [1, 1]
    assert tracker.in_flight() == 2
    tracker.end(done("a", "b"))
    assert tracker.in_flight() == 0
    assert tracker.begin(["c", "d"]) == [1, 1]  # the next batch of the task, and its worker dies

    assert tracker.begin(["a", "b"]) == [2, 2]
    assert [tracker.begin_alone(key).outcome for key in "ab"] == done("a", "b")
    assert tracker.begin(["c", "d"]) == [2, 2]
    assert tracker.begin(["e", "f"]) == [1, 1]
    assert tracker.in_flight() == 4


def test_where_results_die_with_their_worker_a_request_that_ended_is_processed_again_and_never_blamed() -> None:
    tracker = AttemptTracker(3, returns_outcomes=False)
    tracker.begin(["a", "b"])
    for _ in range(4):  # its neighbour kills every worker
        assert tracker.begin_alone("a") == SoloAttempt(2)
        tracker.end(done("a"))
        tracker.begin(["a", "b"])


def test_the_oldest_outcomes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pia_batch.pipeline.attempts.MAX_REMEMBERED", 2)
    tracker = AttemptTracker(3)
    for key in "abc":
        tracker.begin([key])
        tracker.end(done(key))

    assert [tracker.begin([key]) for key in "abc"] == [[1], [2], [2]]


def test_each_request_that_ended_is_counted_once() -> None:
    tracker = AttemptTracker(3)
    tracker.begin(["a", "b", "c"])
    tracker.end([*done("a", "b"), failed("c", "non_finite")])
    tracker.end(done("a"))  # by a worker that was taken for dead

    reported = tracker.activity()
    assert (reported.in_flight, reported.outcomes.succeeded, reported.outcomes.failures) == (0, 2, {"non_finite": 1})
    assert reported.outcomes.newest == "b.mp4"
    tracker.end([failed("d", "timeout")])
    assert reported.outcomes.failures.total() == 1  # what was reported does not change


def test_requests_in_a_row_that_fail_because_of_their_worker_are_counted() -> None:
    tracker = AttemptTracker(3)
    crashes = []
    ended = [
        failed("a", "timeout"),
        failed("b", "worker_crash"),
        *done("c"),
        failed("d", "engine_error"),
        failed("e", "non_finite"),
    ]
    for outcome in ended:
        tracker.end([outcome])
        outcomes = tracker.activity().outcomes
        crashes.append((outcomes.worker_failures, outcomes.last_worker_failure))

    assert crashes == [(1, "timeout of a"), (2, "worker_crash of b"), (0, None), (1, "engine_error of d"), (0, None)]


def test_a_request_that_was_alone_when_its_worker_died_often_enough_is_blamed() -> None:
    tracker = AttemptTracker(3)
    tracker.begin(["a"])

    assert tracker.begin(["a"]) == [2]
    assert tracker.begin_alone("a") == SoloAttempt(2)
    assert tracker.begin_alone("a") == SoloAttempt(3)
    assert tracker.begin_alone("a") == SoloAttempt(4, died_of="worker_crash")


def test_a_request_that_was_given_up_in_its_last_attempt_is_blamed_for_that() -> None:
    tracker = AttemptTracker(3)
    tracker.begin(["a", "b", "c"])
    tracker.give_up(["a", "b"], "timeout")  # in a batch: which one it was is not known
    for key in "abc":
        tracker.begin_alone(key)
        tracker.begin_alone(key)
    tracker.give_up(["a"], "timeout")
    tracker.give_up(["b"], "out_of_memory")

    assert tracker.begin_alone("a") == SoloAttempt(4, died_of="timeout")
    assert tracker.begin_alone("b") == SoloAttempt(4, died_of="out_of_memory")
    assert tracker.begin_alone("c") == SoloAttempt(4, died_of="worker_crash")


def test_only_the_last_attempt_says_why_a_request_is_blamed() -> None:
    tracker = AttemptTracker(3)
    tracker.begin(["a"])
    tracker.begin_alone("a")
    tracker.give_up(["a"], "out_of_memory")
    tracker.begin_alone("a")  # and this time its worker dies without a word

    assert tracker.begin_alone("a") == SoloAttempt(4, died_of="worker_crash")


def test_starts_of_a_worker_are_counted_until_it_is_ready() -> None:
    tracker = AttemptTracker(3)

    assert [tracker.start("one"), tracker.start("two"), tracker.start("one")] == [1, 1, 2]
    tracker.ready("one", 3.0)

    assert [tracker.start("one"), tracker.start("two")] == [1, 2]


def test_engines_are_summed_up_by_how_long_they_took_to_start() -> None:
    tracker = AttemptTracker(3)
    assert tracker.engine_summary() == {"count": 0, "startup_seconds": None}

    for worker, seconds in enumerate((2.0, 90.0, 4.0)):
        tracker.start(str(worker))
        tracker.ready(str(worker), seconds)
    tracker.start("never ready")

    assert tracker.engine_summary() == {"count": 3, "startup_seconds": {"median": 4.0, "max": 90.0}}


def test_what_is_committed_is_handed_back_and_not_generated_again() -> None:
    tracker = AttemptTracker(3)
    tracker.begin(["a", "b"])
    tracker.begin_alone("a")
    tracker.end(done("a"))
    tracker.begin_alone("b")  # and its worker dies

    assert tracker.begin(["a", "b"]) == [2, 3]  # neither is new: one by one again
    assert tracker.begin_alone("a") == SoloAttempt(2, outcome=done("a")[0])


def test_nothing_begins_once_the_run_is_stopping() -> None:
    tracker = AttemptTracker(3)
    tracker.begin(["a", "b", "c"])
    tracker.stop()

    assert tracker.in_flight() == 3
    assert tracker.begin_alone("a") is None  # its worker lets it be
    assert tracker.begin(["b", "d"]) is None  # the worker that had b is dead
    assert tracker.in_flight() == 1


@dataclass
class Worker:
    """Processes a batch as `Animate` does, and dies where a key is poison."""

    tracker: AttemptTracker
    poison: frozenset[str]
    generated: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, keys: list[str]) -> dict[str, str] | None:
        attempts = self.tracker.begin(keys)
        assert attempts is not None
        if max(attempts) == 1:
            return self._process(keys)
        outcomes: dict[str, str] = {}
        for key in keys:
            turn = self.tracker.begin_alone(key)
            assert turn is not None
            if turn.outcome is not None:
                outcomes[key] = turn.outcome["status"]
            elif turn.died_of is not None:
                outcomes[key] = "failed"
                self.tracker.end([failed(key, "worker_crash")])
            else:
                generated = self._process([key])
                if generated is None:
                    return None
                outcomes |= generated
        return outcomes

    def _process(self, keys: list[str]) -> dict[str, str] | None:
        self.generated.append(tuple(keys))
        if self.poison & set(keys):
            return None
        self.tracker.end(done(*keys))
        return dict.fromkeys(keys, "succeeded")


@given(st.integers(1, 8), st.sets(st.integers(0, 7)), st.integers(2, 5))
def test_exactly_the_poison_fails_within_a_bounded_number_of_deaths(
    size: int, poisoned: set[int], max_attempts: int
) -> None:
    keys = [f"k{k}" for k in range(size)]
    poison = frozenset(f"k{k}" for k in poisoned if k < size)
    worker = Worker(AttemptTracker(max_attempts), poison)

    deaths = 0
    while (outcomes := worker(keys)) is None:
        deaths += 1

    assert outcomes == {key: "failed" if key in poison else "succeeded" for key in keys}
    assert deaths == (1 + len(poison) * (max_attempts - 1) if poison else 0)
    assert worker.tracker.in_flight() == 0
    for key in keys:
        alone = worker.generated[1:].count((key,))
        assert alone == (max_attempts - 1 if key in poison else bool(poison))
