"""Processes of a run inside one thread: a chooser decides which continues, which dies, and what the store answers.

Every call to the store, to the attempt tracker, and every look of a driver at its run is a place where its process may
wait, be frozen or be killed. A dead process does nothing more, least of all write. One seed is one history.
"""

from __future__ import annotations

import hashlib
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from greenlet import greenlet

from pia_batch.errors import ObjectExistsError, PiaBatchError, StorageError
from pia_batch.storage.object_store import ObjectInfo, Store

T = TypeVar("T")


class Died(BaseException):
    """The end of a process. Nothing of it may catch this."""


class Chooser(Protocol):
    """Decides everything that a real cluster leaves open."""

    def next(self, world: World, ready: list[Task]) -> Task | None:
        """Return the task that continues, or None: something happened to one of them instead."""

    def answer(self, verb: str) -> str:
        """Return the fate of a call to the store: `ok`, or one of the faults of FaultyStore."""

    def coin(self) -> bool:
        """Return either value."""


@dataclass(eq=False)
class Process:
    """One operating system process. It notices its own death at the next step that others could see."""

    world: World
    name: str
    alive: bool = True
    wakes_at: float = 0.0
    mishaps: list[Callable[[], None]] = field(default_factory=list)
    """Events that may strike it, besides its death."""
    when_dead: Callable[[], None] = lambda: None
    story: tuple[Hashable, ...] = ()
    """Everything it has seen of the outside: two processes of one program with one story are in one state."""

    def pause(self, *saw: Hashable) -> None:
        """Let others continue. This may be the end."""
        self.story += (saw,)
        self.go_on()
        self.world.hub.switch()
        self.go_on()

    def go_on(self) -> None:
        if not self.alive:
            raise Died

    def die(self) -> None:
        """End this process from inside."""
        self.world.tallies["deaths"] += 1
        self.world.kill(self)
        raise Died

    def freeze(self, seconds: float = 100.0) -> None:
        """Stop it for a while, as SIGSTOP, a full disk or a lost network do."""
        self.wakes_at = self.world.now + seconds

    def sleep(self, seconds: float) -> None:
        until = self.world.now + seconds
        while self.world.now < until:
            self.pause()


class Task:
    """A thread of a process."""

    def __init__(self, process: Process, work: Callable[[], Any]) -> None:
        self.process, self.result, self.error = process, None, None
        self._work = work
        self.thread = greenlet(self._run, process.world.hub)

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Died:
            pass
        except Exception as err:  # noqa: BLE001 - kept for the one that waits for this task
            self.error = err
            if not isinstance(err, PiaBatchError | ConnectionError):
                self.process.world.bugs.append("".join(traceback.format_exception(err)))

    @property
    def done(self) -> bool:
        return bool(self.thread.dead)


class Mutex:
    """threading.Lock for tasks, which all live in one thread."""

    def __init__(self, process: Process) -> None:
        self._process, self._held = process, False

    def __enter__(self) -> None:
        while self._held:
            self._process.pause("waits")
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


class World:
    """All processes, a clock that they share, and every object that was ever written."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser, self.hub = chooser, greenlet.getcurrent()
        self.now = 0.0
        self.tasks: list[Task] = []
        self.first_sha256: dict[str, str] = {}
        """SHA-256 of each object when it was created."""
        self.tallies: Counter[str] = Counter()
        self.bugs: list[str] = []
        """Tracebacks of exceptions that no run should raise."""
        self.shared_state: Callable[[], Hashable] = lambda: ()
        """State that processes share besides the store."""
        self._stored: dict[str, Hashable] = {}
        self._processes: dict[Process, None] = {}
        self._dying: list[Process] = []

    def state(self) -> Hashable:
        """Return everything that decides what can happen from here on."""
        processes = tuple((process.name, process.alive, process.story) for process in self._processes)
        return processes, frozenset(self._stored.items()), self.shared_state()

    def wrote(self, process: Process, name: str, sha256: str) -> None:
        """Note the content of an animation, and the writer of any other object, whose bytes hold times."""
        self.first_sha256.setdefault(name, sha256)
        self._stored[name] = sha256 if name.startswith("animations/") else process.name

    def abandon(self) -> None:
        """End all processes."""
        for task in self.tasks:
            self.kill(task.process)
        while self._bury():
            pass

    def start(self, process: Process, work: Callable[[], Any]) -> Task:
        task = Task(process, work)
        self.tasks.append(task)
        self._processes[process] = None
        return task

    def kill(self, process: Process) -> None:
        """Stop a process: it writes nothing from now on, and its tasks unwind at the next step."""
        if process.alive:
            process.alive = False
            self._dying.append(process)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Continue until the condition holds, or no process has anything to do."""
        while True:
            while self._bury():
                pass
            if not self.tasks or until():
                return
            ready = [task for task in self.tasks if task.process.wakes_at <= self.now]
            self.now += 1
            if not ready:
                self.now = min(task.process.wakes_at for task in self.tasks)
                continue
            task = self.chooser.next(self, ready)
            if task is not None:
                task.thread.switch()
            self.tasks = [task for task in self.tasks if not task.done]

    def _bury(self) -> bool:
        """Unwind the dead processes; return true if there were any."""
        dying, self._dying = self._dying, []
        for process in dying:
            for task in [task for task in self.tasks if task.process is process]:
                with suppress(Died):  # of one that had not even begun
                    task.thread.throw(Died)
            self.tasks = [task for task in self.tasks if task.process is not process]
            process.when_dead()
        return bool(dying)


class FaultyStore(Store):
    """A store of files that answers as badly as a real one may.

    Objects are whole or not there, and creating is atomic. An answer is one of these: `ok`; `refused`: not done,
    and StorageError says so; `lost`: it was done, and StorageError says that it may not have been; `retried`: it was
    done, the answer was lost, and the client's second attempt found the object; `stale`: a listing lacks the newest.
    """

    def __init__(self, uri: str, process: Process) -> None:
        super().__init__(uri)
        self._process, self._root = process, Path(unquote(urlsplit(self.uri).path))

    def create(self, name: str, data: bytes) -> None:
        self._write(name, data, "create")

    def replace(self, name: str, data: bytes) -> None:
        self._write(name, data, "replace")

    def replace_file(self, name: str, path: Path) -> ObjectInfo:
        data = path.read_bytes()
        self._write(name, data, "replace")
        return ObjectInfo(name, len(data), hashlib.sha256(data).hexdigest())

    def read(self, name: str) -> bytes:
        self._ask("read", name)
        try:
            data = (self._root / name).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(self.uri_of(name)) from None
        if name.startswith("animations/"):
            self._process.story += (hashlib.sha256(data).digest(),)
        return data

    def each(  # in one thread, so that the order is the chooser's
        self, function: Callable[[Any], T], items: Iterable[Any], threads: int = 16
    ) -> Iterator[T]:
        del threads
        yield from map(function, items)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        answer = self._ask("list", prefix)
        folder = self._root / prefix
        files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
        if answer == "stale":
            files = files[:-1]
        found = [ObjectInfo(str(path.relative_to(self._root)), path.stat().st_size) for path in files]
        self._process.story += (tuple(sorted(info.name for info in found)),)
        return iter(found)

    def stat(self, name: str) -> ObjectInfo:
        data = self.read(name)
        return ObjectInfo(name, len(data), hashlib.sha256(data).hexdigest())

    def _ask(self, verb: str, name: str) -> str:
        self._process.pause(verb, name)
        answer = self._process.world.chooser.answer(verb)
        self._process.story += (answer,)
        if answer != "ok":
            self._process.world.tallies["store faults"] += 1
        if answer == "refused":
            msg = f"{verb} {name}: no answer"
            raise StorageError(msg)
        return answer

    def _write(self, name: str, data: bytes, verb: str) -> None:
        answer = self._ask(verb, name)
        written = self._put(self._root / name, data, overwrite=verb == "replace")
        self._process.world.tallies["attempts to write"] += 1
        if written:
            self._process.world.wrote(self._process, name, hashlib.sha256(data).hexdigest())
        self._process.story += (written,)
        if answer == "lost":
            msg = f"{verb} {name}: the answer did not arrive"
            raise StorageError(msg)
        if verb == "create" and (not written or answer == "retried"):
            msg = f"{self.uri_of(name)} exists"
            raise ObjectExistsError(msg)

    def _put(self, path: Path, data: bytes, *, overwrite: bool) -> bool:
        """Write the file; return true if this call wrote it."""
        if path.exists() and not overwrite:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return True


_ANSWERS = {
    "create": ("refused", "lost", "retried"),
    "replace": ("refused", "lost"),
    "read": ("refused",),
    "list": ("refused", "stale"),
}


class Luck:
    """Choices by a seed. At most `mishaps` things go wrong, so that every history ends."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._mishaps = self._random.choice((0, 1, 2, 3, 5, 8, 12, 20))
        self._rate = self._random.choice((0.02, 0.05, 0.15))

    def next(self, world: World, ready: list[Task]) -> Task | None:
        task = self._random.choice(ready)
        if not self._is_bad_luck():
            return task
        mishap = self._random.choice([None, *task.process.mishaps])
        if mishap is not None:
            mishap()
        else:
            world.tallies["deaths"] += 1
            world.kill(task.process)
        return None

    def answer(self, verb: str) -> str:
        return self._random.choice(_ANSWERS[verb]) if self._is_bad_luck() else "ok"

    def coin(self) -> bool:
        return self._random.random() < 0.5

    def worsen(self) -> None:
        """Allow a few more mishaps."""
        self._mishaps = self._random.choice((0, 1, 3))

    def calm_down(self) -> None:
        """Allow no more mishaps."""
        self._mishaps = 0

    def _is_bad_luck(self) -> bool:
        bad = self._mishaps > 0 and self._random.random() < self._rate
        self._mishaps -= bad
        return bad


class Pruned(Exception):  # noqa: N818 - no error
    """This history has come to a state from which everything was followed already."""


class Search:
    """All histories within bounds. Two that come to one state have one future, which is followed once.

    Args:
        deaths: Number of processes that may die in a history.
        faults: Number of calls to the store that may fail in a history.
        switches: Number of times that a process that could continue may be left; None: no limit.
        answers: Faults that the store may have.
    """

    def __init__(
        self,
        deaths: int = 0,
        faults: int = 0,
        switches: int | None = None,
        answers: Sequence[str] = ("refused", "lost", "retried", "stale"),
    ) -> None:
        self.bounds, self.answers = (deaths, faults, switches), answers
        self.states: set[Hashable] = set()
        self._todo: list[tuple[int, ...]] = [()]

    def histories(self) -> Iterator[History]:
        while self._todo:
            yield History(self, self._todo.pop())

    def branch(self, choices: tuple[int, ...]) -> None:
        self._todo.append(choices)


class History:
    """Makes the choices that it was given, then the first one everywhere; the others become histories of their own."""

    def __init__(self, search: Search, given: tuple[int, ...]) -> None:
        self._search, self._given, self._made = search, given, ()
        self._deaths, self._faults, self._switches = search.bounds
        self._current: Task | None = None

    def next(self, world: World, ready: list[Task]) -> Task | None:
        if len(self._made) >= len(self._given):
            current = self._current.process.name if self._current in ready else None
            state = (world.state(), self._deaths, self._faults, self._switches, current)
            if state in self._search.states:
                raise Pruned
            self._search.states.add(state)
        others = [task for task in ready if task is not self._current]
        stay = [task for task in ready if task is self._current]
        moves: list[Task | Process] = stay + (others if not stay or self._switches != 0 else [])
        if self._deaths:
            moves += {task.process: None for task in ready}
        move = self._choose(moves)
        if isinstance(move, Process):
            self._deaths -= 1
            world.kill(move)
            return None
        if stay and move is not self._current and self._switches is not None:
            self._switches -= 1
        self._current = move
        return move

    def answer(self, verb: str) -> str:
        faults = [fault for fault in _ANSWERS[verb] if fault in self._search.answers]
        answer = self._choose(["ok", *faults]) if self._faults else "ok"
        self._faults -= answer != "ok"
        return answer

    def coin(self) -> bool:
        return self._choose([False, True])

    def _choose(self, options: Sequence[T]) -> T:
        depth = len(self._made)
        if depth < len(self._given):
            chosen = self._given[depth]
        else:
            chosen = 0
            for other in range(1, len(options)):
                self._search.branch((*self._made, other))
        self._made += (chosen,)
        return options[chosen]
