"""Jobs between buckets whose credentials expire under way: one line and exit code 4; started again, they finish."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import local_ray
import pytest
import seaweedfs
from finished_outputs import make_output
from inputs import png
from proxy import Fault, Proxy, Request
from seaweedfs import SeaweedFS

from pia_batch import cli
from pia_batch.storage import s3_config
from pia_batch.storage.object_store import Store

EXPIRED = Fault("error", answer=(400, "ExpiredToken"))
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d ")


@dataclass
class ExpiresAt:
    """Refuses every request from the `nth` on whose verb and path match."""

    verb: str
    where: str
    nth: int
    is_over: bool = False

    def fault(self, request: Request) -> Fault | None:
        if not self.is_over and request.verb == self.verb and re.search(self.where, request.path):
            self.nth -= 1
            self.is_over = self.nth <= 0
        return EXPIRED if self.is_over else None


@pytest.fixture(scope="module")
def proxy(s3_server: SeaweedFS) -> Iterator[Proxy]:
    """A way to the store that fails on demand, and a Ray whose workers go that way."""
    with Proxy(s3_server.url, (seaweedfs.KEY, seaweedfs.SECRET)) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment(found.url).items():
            patch.setenv(name, value)
        s3_config.forget()
        with local_ray.started(num_cpus=4, object_store_memory=200 * 2**20):
            yield found


JOBS = {
    "export": (["export", "{out}", "--to", "{to}", "--format", "webdataset", "--shard-size", "3"], "PUT", r"/to/.*tar"),
    "evaluate": (["evaluate", "{out}", "--no-flow"], "GET", "/out/animations/"),
    "prepare": (["prepare", "{images}", "--to", "{to}"], "PUT", "/to/part"),
}
"""Commands, and the requests at which the credentials expire."""


def run(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed to stderr."""
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as left:
        cli.main(arguments)
    return int(left.value.code or 0), said.getvalue()


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("name", JOBS)
def test_a_job_whose_credentials_expire_is_resumed(name: str, proxy: Proxy, s3_server: SeaweedFS) -> None:
    base = f"s3://{s3_server.bucket}/jobs-{name}-{time.time_ns()}"
    make_output(Store(f"{base}/out"), ["gif"] * 6)
    images = Store(f"{base}/images")
    for number in range(3):
        images.create(f"{number}.png", png(number))
        images.create(f"{number}.txt", b"a picture")
    arguments, verb, where = JOBS[name]
    places = {place: f"{base}/{place}" for place in ("out", "to", "images")}
    command = [each.format(**places) for each in arguments]

    proxy.set(ExpiresAt(verb, where, 1))
    stopped, printed = run(command)
    proxy.set()
    finished, last = run(command)

    lines = [line for line in printed.splitlines() if line and not LOG_LINE.match(line)]
    assert stopped == 4, printed[-2000:]
    assert len(lines) == 1
    assert re.search(r"ExpiredToken .* have expired; renew them, .* Start again to (resume|continue)$", lines[0])
    assert finished == 0, last[-2000:]
