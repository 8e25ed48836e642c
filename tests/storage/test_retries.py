"""Retries of one call: how many, with which pauses, and until when."""

from __future__ import annotations

import time

import pytest

from pia_batch.storage import retries
from pia_batch.storage.retries import retry


class Flaky:
    """A call that fails a number of times."""

    def __init__(self, failures: int, error: type[Exception] = ConnectionResetError) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(f"attempt {self.calls}")
        return "done"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; none of them takes time."""
    made: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", made.append)
    return made


def is_connection(err: Exception) -> bool:
    return isinstance(err, ConnectionError)


def test_a_call_that_fails_is_repeated_after_each_pause_give_or_take_a_quarter(pauses: list[float]) -> None:
    call, seen = Flaky(3), []

    def record(attempt: int, err: Exception) -> None:
        seen.append((attempt, str(err)))

    assert retry(call, is_transient=is_connection, pauses_s=[1, 2, 4], on_retry=record) == "done"
    assert seen == [(1, "attempt 1"), (2, "attempt 2"), (3, "attempt 3")]
    assert all(0.75 * wanted <= made <= 1.25 * wanted for wanted, made in zip([1, 2, 4], pauses, strict=True))


def test_workers_that_fail_together_do_not_return_together(pauses: list[float]) -> None:
    for _ in range(20):
        retry(Flaky(1), is_transient=is_connection, pauses_s=[10])

    assert max(pauses) - min(pauses) > 0.5


def test_the_last_attempt_raises_its_own_exception(pauses: list[float]) -> None:
    call = Flaky(100)

    with pytest.raises(ConnectionResetError, match="attempt 3"):
        retry(call, is_transient=is_connection, pauses_s=[1, 1])
    assert (call.calls, len(pauses)) == (3, 2)


def test_what_will_not_pass_is_not_repeated(pauses: list[float]) -> None:
    call = Flaky(1, ValueError)

    with pytest.raises(ValueError, match="attempt 1"):
        retry(call, is_transient=is_connection, pauses_s=[1, 1])
    assert (call.calls, pauses) == (1, [])


def test_no_attempt_begins_after_the_deadline(pauses: list[float]) -> None:
    call = Flaky(100)

    with pytest.raises(ConnectionResetError, match="attempt 2"):
        retry(call, is_transient=is_connection, pauses_s=[0.1, 60, 0.1], deadline=time.monotonic() + 5)
    assert len(pauses) == 1
