"""Random schedules of faults over whole runs, decided by a seed. `make torture STACK=50` runs these."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from faults import FINISHED, Case, Stack, Trial
from proxy import Aimed, Fault, Weather

NUM_CASES = 4

POINTS = ("/animations/", "/_journal/[0-9a-f]{32}", "/_runs/", "/part-", "/_SUCCESS", "/LATEST", "/_lease/")
"""Steps of a run that write."""

COMMITS = POINTS[:2]
"""Steps of a worker that write."""


@dataclass
class Scheduled:
    """Result of one schedule."""

    seed: int
    problems: list[str]
    tallies: Counter[str]


class Schedule:
    """A trial with one to three starts under a fault each, then starts without faults until all is finished."""

    def __init__(self, seed: int, stack: Stack, case: Case) -> None:
        self.random = Random(f"schedule {seed}")
        self.stack = stack
        self.trial = Trial(stack, case, f"s3://{stack.server.bucket}/schedule-{seed}-{self.random.getrandbits(40):x}")
        self.tallies = Counter[str]()
        self.late = list[threading.Event]()
        """Events that hold back writes until all is over."""

    def live(self) -> list[str]:
        """Run the schedule and return all problems."""
        for _ in range(self.random.randint(1, 3)):
            event: Callable[[], int] = self.random.choice(
                (
                    *(self.driver_killed, self.driver_killed, self.worker_killed, self.server_killed),
                    *(self.server_frozen, self.bad_weather, self.bad_weather, self.two_drivers, self.notice),
                    *(self.late_write, self.zombie, self.embedded_killed, self.no_answer),
                )
            )
            self.tallies[event.__name__] += 1
            code = event()
            self.stack.proxy.set()
            self.tallies["starts"] += 1
            if code in FINISHED:
                break
        self.tallies["starts"] += self.trial.finish()
        problems = self.trial.problems_now()
        if self.late:
            for release in self.late:
                release.set()
            problems += [f"after the late writes: {problem}" for problem in self.trial.problems_now()]
        return problems or self.trial.problems_of_a_rerun()

    def point(self, points: tuple[str, ...] = POINTS) -> tuple[str, str, int]:
        """Return the verb, path and number of a write, for Aimed."""
        return "PUT", self.random.choice(points), self.random.randint(1, 4)

    def driver_killed(self) -> int:
        """SIGKILL to the driver, before or after the store carries out a write of it or of its workers."""
        kind = self.random.choice(("reset", "lost"))
        self.stack.proxy.set(Aimed(Fault(kind, act=self.trial.kill_drivers), *self.point()))
        return self.trial.wait(self.trial.start(seconds=self.random.choice((0.0, 0.3))))

    def worker_killed(self) -> int:
        """SIGKILL to the process that is about to store or commit an animation, or has just done so."""
        kind = self.random.choice(("reset", "lost"))
        self.stack.proxy.set(Aimed(Fault(kind, act=self.trial.kill_sender), *self.point(COMMITS)))
        return self.trial.run()

    def server_killed(self) -> int:
        """SIGKILL to the store, which starts again later, or much later."""
        away = self.stack.outage(self.random.choice((0.5, 2.0, 6.0)))
        kind = self.random.choice(("reset", "lost"))
        self.stack.proxy.set(Aimed(Fault(kind, act=away), *self.point()))
        return self.trial.run()

    def server_frozen(self) -> int:
        """SIGSTOP to the store, which continues later and then carries out its requests."""
        still = self.stack.standstill(self.random.choice((0.5, 3.0, 7.0)))
        self.stack.proxy.set(Aimed(Fault("pass", act=still), *self.point()))
        return self.trial.run()

    def bad_weather(self) -> int:
        """Errors, lost answers, resets, slowness and cut bodies, all by chance."""
        faults = [Fault("500"), Fault("503"), Fault("reset"), Fault("lost"), Fault("cut"), Fault("frozen", 2.0)]
        faults += [Fault("slow", self.random.choice((0.5, 2.0, 5.0)))]
        self.stack.proxy.set(Weather(self.random, self.random.choice((0.05, 0.15, 0.4)), faults, most=30))
        return self.trial.run()

    def no_answer(self) -> int:
        """Accept a connection and leave it without an answer for longer than the client waits."""
        self.stack.proxy.set(Aimed(Fault("frozen", 60.0), *self.point()))
        return self.trial.run()

    def two_drivers(self) -> int:
        """Start two drivers at once, and perhaps kill one of them."""
        if self.random.random() < 0.5:
            kill = Fault("lost", act=lambda _: self.trial.kill(self.trial.drivers[-1]))
            self.stack.proxy.set(Aimed(kill, *self.point()))
        return self.trial.wait(*[self.trial.start(seconds=0.2) for _ in range(2)])

    def notice(self) -> int:
        """SIGTERM, and SIGKILL 30 s after it."""

        def give_notice(_: object) -> None:
            driver.send_signal(signal.SIGTERM)
            killer.start()

        driver = self.trial.start(seconds=0.3)
        killer = threading.Timer(30, self.trial.kill, [driver])
        self.stack.proxy.set(Aimed(Fault("pass", act=give_notice), *self.point()))
        code = self.trial.wait(driver)
        killer.cancel()
        return code

    def late_write(self) -> int:
        """Kill the driver; a write of its worker arrives when all is over."""
        fault = Fault("held", act=self.trial.kill_drivers)
        self.late.append(fault.release)
        self.stack.proxy.set(Aimed(fault, *self.point(COMMITS)))
        return self.trial.wait(self.trial.start(seconds=0.2))

    def zombie(self) -> int:
        """Freeze driver and workers in the middle of a write, finish by another run, and let them continue."""
        standstill = self.trial.freeze_at(self.random.choice(("pass", "held")), self.point(COMMITS))
        if standstill is None:
            return self.trial.drivers[-1].returncode
        self.tallies["starts"] += self.trial.finish()
        self.trial.problems += [f"while others stood still: {problem}" for problem in self.trial.problems_now()]
        standstill.end()
        return self.trial.wait(standstill.driver)

    def embedded_killed(self) -> int:
        """Kill a driver that has the embedded model and a Ray of its own, which ends with it."""
        kind = self.random.choice(("reset", "lost"))
        self.stack.proxy.set(Aimed(Fault(kind, act=self.trial.kill_drivers), *self.point()))
        return self.trial.wait(self.trial.start(embedded=True, own_ray=True))


def run(seed: int, stack: Stack, cases: dict[int, Case]) -> Scheduled:
    """Run one schedule; `cases` keeps the cases of earlier ones."""
    number = seed % NUM_CASES
    if number not in cases:
        cases[number] = Case.make(number, stack)
    schedule = Schedule(seed, stack, cases[number])
    problems = schedule.live()
    schedule.tallies["faults on the way"] += sum(
        seen.kind != "pass" for seen in stack.proxy.below(schedule.trial.prefix)
    )
    return Scheduled(seed, problems, schedule.tallies)
