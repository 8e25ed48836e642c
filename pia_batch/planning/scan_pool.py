"""Worker processes that validate the pieces of a large manifest. A scan is mostly hashing in Python, under one GIL.

    python -m pia_batch.planning.scan_pool FD

A worker receives its task and then pieces, and answers each piece with its result, all over one socket. It is a program
of its own and not a fork, because the driver has threads. Nor does it load the driver's main module, as
`multiprocessing` would: a script or notebook that plans needs no `if __name__ == "__main__"` guard.
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

from pia_batch.errors import ManifestError
from pia_batch.manifest.pieces import Piece
from pia_batch.planning.child_python import child_environment, module_command
from pia_batch.planning.scan_validate import PieceValidator, ScanTask, ValidatedPiece

MIN_ROWS = 250_000
"""Rows from which on processes are faster: starting them takes about 0.6 s each (measured)."""

PROCESSES = min(4, os.cpu_count() or 1)
"""Number of worker processes. Each takes 260 MB for rows without images (measured)."""

_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Arrow's own pool keeps 100 MB more of freed memory (measured)."""

PIECES_AHEAD = 2
"""Pieces that a process has at a time: one is read while the other is validated."""


def validate_in_processes(task: ScanTask, pieces: Sequence[Piece]) -> Iterator[ValidatedPiece]:
    """Validate these pieces of Parquet files, and yield the results in order.

    Raises:
        ManifestError: a file is corrupt, went away, or ended the process that read it.
        InterruptedRunError: a file was replaced.
    """
    with ExitStack() as held:
        processes = {}
        for _ in range(min(PROCESSES, len(pieces))):
            process = _Process(task)
            held.callback(process.end)
            processes[process.connection] = process
        todo = iter(enumerate(pieces))
        for process in [*processes.values()] * PIECES_AHEAD:
            process.send_piece(next(todo, None))
        waiting: dict[int, ValidatedPiece] = {}
        for number in range(len(pieces)):
            while number not in waiting:
                for ready in wait([one.connection for one in processes.values() if one.pieces]):
                    process = processes[ready]  # type: ignore[index]  # `wait` was given nothing else
                    done, validated = process.receive()
                    waiting[done] = validated
                    process.send_piece(next(todo, None))
            yield waiting.pop(number)


@dataclass
class _Process:
    """Driver's end of one worker process."""

    task: ScanTask
    connection: Connection = field(init=False)
    pieces: deque[tuple[int, Piece]] = field(default_factory=deque, init=False)
    """Pieces that it has not answered yet, with their numbers."""

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this package, in a process of its own
                module_command(__name__, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C goes to the driver only
                env=child_environment(**_ENVIRONMENT),
            )
        self.connection = Connection(ours.detach())
        self._send(self.task)

    def send_piece(self, numbered: tuple[int, Piece] | None) -> None:
        """Have it validate one more piece, unless that is None."""
        if numbered is not None:
            self.pieces.append(numbered)
            self._send(numbered[1])

    def receive(self) -> tuple[int, ValidatedPiece]:
        """Return its next answer, after the number of the piece.

        Raises:
            ManifestError: it died before it answered.
        """
        number, piece = self.pieces.popleft()
        try:
            answer: ValidatedPiece | Exception = self.connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            msg = (
                f"the process that read manifest file {piece.file.path} ended with {ended}: it ran out of memory, or "
                "the file is corrupt in a way that crashes the reader; write the file again, in smaller row groups"
            )
            raise ManifestError(msg) from None
        if isinstance(answer, Exception):
            raise answer
        return number, answer

    def end(self) -> None:
        """Kill it at any time: it only reads."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _send(self, what: object) -> None:
        try:
            self.connection.send(what)
        except ConnectionError:  # it died: `receive` reports how
            return


def _serve(connection: Connection) -> None:
    """Answer each piece with its result, or with the exception that it raised, until the driver is gone."""
    task = connection.recv()
    validator = PieceValidator(task)

    def validated(piece: Piece) -> ValidatedPiece | Exception:
        try:
            return validator.validate(piece, piece.tables(task.schema))
        except Exception as err:  # noqa: BLE001 - the driver raises it, whatever it is
            return err

    with ThreadPoolExecutor(1) as answering, ThreadPoolExecutor(PIECES_AHEAD) as validating:
        while True:
            answer = validating.submit(validated, connection.recv())
            answering.submit(lambda pending: connection.send(pending.result()), answer)


if __name__ == "__main__":
    try:
        _serve(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        sys.exit(0)
