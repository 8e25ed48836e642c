"""Whole runs under real faults: the real command line, Ray, and S3 server, and processes that are killed for good.

A *trial* is one output. Drivers are started on it, as often as needed, while faults strike them, their workers, the
store and the way to the store; then `witness` checks the output, and the proxy's record shows how it was written.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import fast_cli
import psutil
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import ray
import seaweedfs
import witness
from inputs import png
from places import PYTHONPATH, SUPPORT
from proxy import Aimed, Fault, Kind, Proxy, Request
from ray.cluster_utils import Cluster
from seaweedfs import SeaweedFS

FINISHED = (0, 3)
"""Exit codes of a run with nothing left to do."""

REFUSED = 2
"""Exit code of a run that ends before it uses Ray."""

STOPPED = (REFUSED, 4, 75, -signal.SIGKILL)
"""Exit codes of a run that faults may end: no store at the start, interrupted, another run holds the lease, killed."""

START_S = 240
"""Time after which a driver counts as stuck, in seconds."""

SETTINGS = {
    "defaults.width": 64,
    "defaults.height": 64,
    "defaults.num_inference_steps": 2,
    "defaults.num_frames": 2,
    "images.threads": 1,
    "placement.batch_size": 2,
    "limits.lease_ttl_s": 6,
}


# --- shared by many trials ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """A store, the way to it, and a Ray cluster whose workers go that way."""

    server: SeaweedFS
    proxy: Proxy
    ray_address: str
    folder: Path

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """File system of the store past the proxy, by a client that the package does not write with."""
        return pyarrow.fs.S3FileSystem(
            access_key=seaweedfs.KEY,
            secret_key=seaweedfs.SECRET,
            endpoint_override=self.server.url.removeprefix("http://"),
            scheme="http",
            region="us-east-1",
        )

    def outage(self, seconds: float) -> Callable[[Request], None]:
        """Kill the server when a request comes, and start it again over the same folder after a while."""

        def strike(_: Request) -> None:
            self.server.kill()
            time.sleep(seconds)
            self.server.start()

        return strike

    def standstill(self, seconds: float) -> Callable[[Request], None]:
        """Freeze the server when a request comes, for a while."""

        def strike(_: Request) -> None:
            self.server.freeze()
            threading.Timer(seconds, self.server.thaw).start()

        return strike


@contextmanager
def stack(folder: Path) -> Iterator[Stack]:
    """Start the stack once for many trials. Drivers and workers find the store by the environment, as on a cluster."""
    credentials = (seaweedfs.KEY, seaweedfs.SECRET)
    (folder / "s3").mkdir()
    with (
        SeaweedFS(folder / "s3") as server,
        Proxy(server.url, credentials) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        environment = server.environment(proxy.url)
        environment |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_AUTH_MODE": "disabled"}
        for name, value in environment.items():
            patch.setenv(name, value)
        # Workers are processes that have to start: those of this process stay for its next run.
        kept = {"num_workers_soft_limit": 8, "idle_worker_killing_time_threshold_ms": 10 * 60 * 1000}
        options = {"num_cpus": 5, "include_dashboard": False, "object_store_memory": 200 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args=options | {"_system_config": kept})
        try:
            yield Stack(server, proxy, cluster.address, folder)
        finally:
            ray.shutdown()
            cluster.shutdown()


@dataclass(frozen=True)
class Case:
    """A manifest on the local disk, and its results where nothing goes wrong."""

    manifest: Path
    expected: frozenset[tuple[str, str, str, str | None]]

    @classmethod
    def make(cls, number: int, stack: Stack) -> Case:
        """Make 8 to 14 good rows of 64 x 64 pixels, one that is rejected, one without an image, and one twice."""
        random = Random(number)
        folder = stack.folder / f"case-{number}"
        folder.mkdir()
        for index in range(2):
            (folder / f"{index}.png").write_bytes(png(index))
        rows = [
            {
                "request_id": f"r{k:02d}",
                "image": f"{k % 2}.png",
                "prompt": "a red circle moving left",
                "seed": k,
                "format": random.choice(("png_zip", "gif")),
            }
            for k in range(8 + 2 * (number % 4))
        ]
        rows += [rows[0], rows[0] | {"request_id": "bad", "seed": -1}, rows[0] | {"request_id": "gone", "image": "no"}]
        pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
        output = stack.folder / f"case-{number}-without-faults"
        trial = Trial(stack, cls(folder, frozenset()), str(output))
        if (code := trial.run()) not in FINISHED:
            msg = f"a run without faults ended with {code}"
            raise RuntimeError(msg)
        return cls(folder, frozenset(witness.outcomes(output)))

    @property
    def num_expected(self) -> Counter[str]:
        """Number of results that each request id must have."""
        return Counter(request_id for request_id, *_ in self.expected)


@dataclass(frozen=True)
class Standstill:
    """A driver and a worker that were stopped in the middle of a write."""

    driver: subprocess.Popen[bytes]
    processes: list[psutil.Process]
    release: threading.Event

    def end(self) -> None:
        """Let them continue."""
        self.release.set()
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


# --- a trial --------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One output, the drivers that were started on it, and their problems."""

    stack: Stack
    case: Case
    output: str
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)
    """Settings that override SETTINGS."""

    def __post_init__(self) -> None:
        self.folder = self.stack.folder / f"trial-{time.monotonic_ns()}"
        self.pids = self.folder / "pids"
        self.pids.mkdir(parents=True)
        self._first = dict[str, tuple[int, int, int]]()

    @property
    def prefix(self) -> str:
        """Bucket and folder, as the proxy's record and pyarrow name them; empty for a local disk."""
        return self.output.partition("://")[2]

    def start(self, *, seconds: float = 0.0, embedded: bool = False, own_ray: bool = False) -> subprocess.Popen[bytes]:
        """Start a driver in a process group of its own.

        Args:
            seconds: Time that a fake engine takes for a batch, in seconds.
            embedded: Use the embedded model instead of a fake engine.
            own_ray: Use a Ray that the driver starts and ends itself.
        """
        program = ["-m", "pia_batch.cli"] if embedded else [str(SUPPORT / "fast_cli.py"), str(seconds), str(self.pids)]
        command = [sys.executable, *program, *self._arguments(own_ray=own_ray)]
        with (self.folder / f"driver-{len(self.drivers)}.log").open("wb") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.drivers.append(driver)
        return driver

    def run(self, *, seconds: float = 0.0) -> int:
        """Run a driver in this process, whose workers start sooner than a new one's, and return the exit code."""
        engines, said = self.num_engines, io.StringIO()
        if not ray.is_initialized():
            ray.init(address=self.stack.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        with redirect_stdout(said), redirect_stderr(said):
            code = fast_cli.main(seconds, self.pids, self._arguments(own_ray=False))
        if code not in (*FINISHED, REFUSED) or self.num_engines > engines + 1:
            ray.shutdown()  # until then Ray Data keeps replaced engines, and those of a run that stopped
        if code not in FINISHED + STOPPED:
            self.problems.append(f"a driver ended with {code}:\n{said.getvalue()[-6000:]}")
        return code

    def _arguments(self, *, own_ray: bool) -> list[str]:
        settings = SETTINGS | ({} if own_ray else {"placement.ray_address": self.stack.ray_address}) | self.settings
        words = ["run", "--manifest", str(self.case.manifest), "--output", self.output]
        return words + [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]

    def wait(self, *drivers: subprocess.Popen[bytes]) -> int:
        """Wait for the drivers and return the exit code of the last; each code must be one that faults explain."""
        for driver in drivers:
            number = self.drivers.index(driver)
            try:
                driver.wait(START_S)
            except subprocess.TimeoutExpired:
                self.problems.append(f"driver {number} was stuck for {START_S} s")
                self.kill(driver)
                driver.wait()
            if driver.returncode not in FINISHED + STOPPED:
                self.problems.append(f"driver {number} ended with {driver.returncode}:\n{self.log(number)}")
        return drivers[-1].returncode

    def log(self, number: int = -1) -> str:
        """Return the end of a driver's log."""
        number %= len(self.drivers)
        return (self.folder / f"driver-{number}.log").read_text(errors="replace")[-6000:]

    def kill(self, *drivers: subprocess.Popen[bytes]) -> None:
        """Send SIGKILL to these drivers, or to all that live."""
        for driver in drivers or self.drivers:
            if driver.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(driver.pid, signal.SIGKILL)

    def finish(self, most_starts: int = 6) -> int:
        """Start drivers one after the other until one finishes everything; return the number of starts."""
        self.stack.proxy.set()
        for number in range(1, most_starts + 1):
            if self.run() in FINISHED:
                return number
        self.problems.append(f"not finished after {most_starts} starts")
        return most_starts

    # Faults.

    def kill_drivers(self, _: Request) -> None:
        """Kill all drivers; for `Fault.act`."""
        self.kill()

    def kill_sender(self, request: Request) -> None:
        """Kill the process that sent the request, a worker or another driver than this process; for `Fault.act`."""
        if (sender := request.sender()) is not None and sender.pid != os.getpid():
            sender.kill()

    def freeze_at(self, kind: Kind, point: tuple[str, str, int]) -> Standstill | None:
        """Start a driver and stop it with the writing process at that write, as a paused machine stops.

        Args:
            kind: `pass`: the store carries the write out; `held`: it receives it when the processes continue.
            point: Verb, path and number of the write, as in Aimed.

        Returns:
            The stopped processes, or None: the driver ended before that write.
        """

        def stop(request: Request) -> None:
            driver_and_sender = {psutil.Process(driver.pid), request.sender()} - {None}
            for process in driver_and_sender:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
                    stopped.append(process)
            struck.set()

        stopped: list[psutil.Process] = []
        struck = threading.Event()
        fault = Fault(kind, act=stop)
        self.stack.proxy.set(Aimed(fault, *point))
        driver = self.start(seconds=0.2)
        while not struck.wait(0.1):
            if driver.poll() is not None:
                self.wait(driver)
                return None
        return Standstill(driver, stopped, fault.release)

    # Problems.

    def problems_now(self) -> list[str]:
        """List all problems: of the output as it is now, of how it was written, and of the drivers so far."""
        problems = list(self.problems)
        if self.output.startswith("s3://"):
            copy = witness.fetch(self.prefix, self.folder / f"copy-{time.monotonic_ns()}", self.stack.filesystem)
            problems += self._wrong_with_writes(copy)
        else:
            copy = Path(self.output)
            problems += self.look()
        rows, wrong = witness.results(copy)
        problems += (
            wrong + witness.missing_or_doubled(rows, self.case.num_expected) + witness.false_successes(rows, copy)
        )
        problems += witness.orphans(copy)
        outcomes = witness.outcomes(copy)
        problems += [f"other than without faults: {one}" for one in sorted(outcomes ^ self.case.expected, key=str)]
        return problems

    def _wrong_with_writes(self, copy: Path) -> list[str]:
        """List objects that the store wrote twice, or that differ from what was written."""
        problems = []
        now = witness.objects(copy)
        written: dict[str, list[str]] = {name: [] for name in now}
        uncertain: dict[str, set[str]] = {name: set() for name in now}
        for seen in self.stack.proxy.below(self.prefix + "/"):
            name = seen.path.removeprefix(self.prefix + "/")
            if seen.verb == "DELETE":
                problems.append(f"{name} was deleted")
            if seen.verb != "PUT" or not name.startswith(tuple(f"{folder}/" for folder in witness.IMMUTABLE)):
                continue
            if seen.status == 200:
                written.setdefault(name, []).append(seen.sha256)
            elif seen.status is None or seen.status >= 500:
                uncertain.setdefault(name, set()).add(seen.sha256)
        for name, bodies in written.items():
            if len(bodies) > 1:
                problems.append(f"{name} was written {len(bodies)} times")
            if now.get(name) not in {*bodies, *uncertain.get(name, ())}:
                problems.append(f"{name} is not what was written")
        return problems

    def look(self) -> list[str]:
        """List objects on a local disk that changed since the first look."""
        output, problems = Path(self.output), []
        for name in witness.objects(output):
            stat = (output / name).stat()
            state = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if self._first.setdefault(name, state) != state:
                problems.append(f"{name} was overwritten")
        return problems + [f"{name} was removed" for name in self._first if not (output / name).exists()]

    def problems_of_a_rerun(self) -> list[str]:
        """Check that a driver with nothing to do exits with 0 or 3, writes nothing, and starts no engine."""
        self.stack.proxy.set()
        writes, engines = self._writes(), self.num_engines
        code = self.run()
        problems = [] if code in FINISHED else [f"a run with nothing to do ended with {code}"]
        problems += [f"a run with nothing to do wrote {one}" for one in self._writes()[len(writes) :]]
        if self.num_engines != engines:
            problems.append("a run with nothing to do started an engine")
        return problems + self.problems_now()

    def _writes(self) -> list[str]:
        if not self.output.startswith("s3://"):
            files = (path for path in Path(self.output).rglob("*") if path.is_file())
            return sorted(f"{path} {path.stat().st_mtime_ns}" for path in files)
        return [f"{seen.verb} {seen.path}" for seen in self.stack.proxy.below(self.prefix) if seen.verb in _WRITES]

    def committed_keys(self) -> set[str]:
        """Return the keys that the fragments of the journal hold."""
        selector = pyarrow.fs.FileSelector(f"{self.prefix}/_journal")
        files = [item.path for item in self.stack.filesystem.get_file_info(selector) if item.extension == "parquet"]
        tables = [pq.read_table(path, filesystem=self.stack.filesystem, columns=["key"]) for path in files]
        return {key for table in tables for key in table["key"].to_pylist()}

    @property
    def num_engines(self) -> int:
        """Number of processes that have loaded an engine."""
        return len(list(self.pids.iterdir()))


_WRITES = ("PUT", "POST", "DELETE")
