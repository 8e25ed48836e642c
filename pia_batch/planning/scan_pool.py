"""Processes that judge the pieces of a large manifest: a scan is mostly Python's hashes, which share one lock.

    python -m pia_batch.planning.scan_pool FD

A process is told its task and then pieces, and answers each with a verdict, all over one socket. It is a program of its
own and not a fork, for the driver has threads; nor does it load the driver's main module, as `multiprocessing` would: a
script or notebook that plans needs no guard around it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from pia_batch.errors import ManifestError
from pia_batch.manifest.reader import Piece
from pia_batch.planning.scan_validate import Judge, Task, Verdict

WORTH_ROWS = 250_000
"""Rows that make up for the start of processes, about 0.6 s each (measured)."""

PROCESSES = min(4, os.cpu_count() or 1)
"""Each takes 260 MB for rows without images (measured)."""

_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Arrow's own pool keeps 100 MB more of what it once had (measured)."""

AHEAD = 2
"""Pieces that a process has at a time: one is read while the other is judged."""


def judge_all(task: Task, pieces: Sequence[Piece]) -> Iterator[Verdict]:
    """The verdict on each of these pieces of Parquet files, in their order.

    Raises:
        ManifestError: a file is corrupt, or went away, or ended the process that read it.
        InterruptedRunError: a file was replaced.
    """
    with ExitStack() as held:
        processes = {}
        for _ in range(min(PROCESSES, len(pieces))):
            process = _Process(task)
            held.callback(process.end)
            processes[process.connection] = process
        todo = iter(enumerate(pieces))
        for process in [*processes.values()] * AHEAD:
            process.give(next(todo, None))
        waiting: dict[int, Verdict] = {}
        for number in range(len(pieces)):
            while number not in waiting:
                for ready in wait([one.connection for one in processes.values() if one.pieces]):
                    process = processes[ready]  # type: ignore[index]  # nothing else was waited for
                    done, verdict = process.take()
                    waiting[done] = verdict
                    process.give(next(todo, None))
            yield waiting.pop(number)


@dataclass
class _Process:
    """One of them, seen from the driver."""

    task: Task
    connection: Connection = field(init=False)
    pieces: deque[tuple[int, Piece]] = field(default_factory=deque, init=False)
    """What it has, and has not answered yet."""

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        searched = [path or str(Path.cwd()) for path in sys.path]
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this package, in a process of its own
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],  # nothing out of the folder it starts in
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is the driver's
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(searched)},
            )
        self.connection = Connection(ours.detach())
        self._send(self.task)

    def give(self, numbered: tuple[int, Piece] | None) -> None:
        """Let it judge one piece more, if there is one."""
        if numbered is not None:
            self.pieces.append(numbered)
            self._send(numbered[1])

    def take(self) -> tuple[int, Verdict]:
        """Its next answer, and the number of the piece.

        Raises:
            ManifestError: it has none, because it died.
        """
        number, piece = self.pieces.popleft()
        try:
            answer: Verdict | Exception = self.connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            msg = (
                f"the process that read manifest file {piece.file.path} ended with {ended}: it ran out of memory, or "
                "the file is corrupt in a way that no reader survives; write the file anew, in smaller row groups"
            )
            raise ManifestError(msg) from None
        if isinstance(answer, Exception):
            raise answer
        return number, answer

    def end(self) -> None:
        """Stop it, whatever it does: it only reads."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _send(self, what: object) -> None:
        try:
            self.connection.send(what)
        except ConnectionError:  # it died: `take` tells how
            return


def _serve(connection: Connection) -> None:
    """Answer with verdicts, or with the error that a piece is, until the driver is gone."""
    task = connection.recv()
    judge = Judge(task)

    def judged(piece: Piece) -> Verdict | Exception:
        try:
            return judge.judge(piece, piece.tables(task.schema))
        except Exception as err:  # noqa: BLE001 - the driver raises it, whatever it is
            return err

    with ThreadPoolExecutor(1) as answering, ThreadPoolExecutor(AHEAD) as judging:
        while True:
            verdict = judging.submit(judged, connection.recv())
            answering.submit(lambda told: connection.send(told.result()), verdict)


if __name__ == "__main__":
    try:
        _serve(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        sys.exit(0)
