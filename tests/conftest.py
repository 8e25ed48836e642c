"""Fixtures that more than one file of tests needs: pictures, manifests, and a real S3 server on loopback."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import local_ray as shared_ray
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import png, requests_table
from seaweedfs import SeaweedFS
from xdist.scheduler import LoadScopeScheduling

from pia_batch.config import RunConfig
from pia_batch.storage.object_store import Store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

# A busy machine makes an example slow, not wrong. Every run of the tests tries the same examples, so that only a change
# decides whether they pass; `make torture` searches with other ones.
_PATIENT = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow], "print_blob": True}
hypothesis.settings.register_profile("same-examples", derandomize=True, database=None, **_PATIENT)
hypothesis.settings.register_profile("other-examples", derandomize=False, **_PATIENT)
hypothesis.settings.load_profile("same-examples")

# Before any test imports torch: networks of this size lose more to waiting for a second core than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# --- one Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def local_ray() -> None:
    """A Ray on this machine, started once for all tests that use it: they run one after another in one process."""
    if not shared_ray.is_running():
        shared_ray.start(num_cpus=4, object_store_memory=200 * 2**20)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the shared Ray after its last test: other tests start their own, or expect none."""
    if _uses_local_ray(item):
        if not (nextitem and _uses_local_ray(nextitem)):
            shared_ray.stop()
    elif (nextitem is None or nextitem.path != item.path) and shared_ray.is_running():
        shared_ray.stop()
        pytest.fail(f"A test of {item.path.name} left a Ray running, which later files would use: see local_ray.")


def _uses_local_ray(item: pytest.Item) -> bool:
    return "local_ray" in getattr(item, "fixturenames", ())


# --- one browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A Chromium for all tests of a process: Playwright does not start twice in one."""
    from browsers import chromium_browser  # noqa: PLC0415 - Playwright, which most modules do not need

    with chromium_browser() as browser:
        yield browser


# --- order and distribution -------------------------------------------------------------------------------------------

PROCESSES = (
    "pipeline/test_dataset",
    "system/test_pipeline",
    "datasets/test_export",
    "evaluation/test_evaluate",
    "pipeline/test_metrics",
    "driver/test_ray_cluster",
    "cli/test_cli",
)
"""Files that start Ray or whole programs, in the order in which one worker runs them. The first three share one Ray."""

FIRST = ("system", "engine", "pipeline", "report", "driver", "planning", "journal", "manifest", "cli")
"""Folders that run first, after PROCESSES: the longest, so that two workers end at about the same time."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Give every file to one worker, and all of PROCESSES to the same one: the other runs tests that only compute.

    A scheduler of our own, as `--dist loadgroup` of pytest-xdist 3.8 has no effect with pytest 9.2: the ids of tests
    that it changes are computed there.
    """
    return FileScheduling(config, log)


class FileScheduling(LoadScopeScheduling):
    """A scheduler that keeps tests of a file together."""

    def _split_scope(self, nodeid: str) -> str:
        file = _file(nodeid)
        return "processes" if file in PROCESSES else file


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep what was imported out of the garbage collector's passes, which took a third of the time of small tests."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests by file, repeat once those that other work on the machine can delay, and give long ones more time."""
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
        if any(item.get_closest_marker(name) for name in ("slow", "s3", "long")):
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=lambda item: (*_rank(_file(item.nodeid)), _file(item.nodeid)))


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")


def _rank(file: str) -> tuple[int, int]:
    if file in PROCESSES:
        return 0, PROCESSES.index(file)
    folder = file.partition("/")[0]
    return 1, FIRST.index(folder) if folder in FIRST else len(FIRST)


# --- the end ----------------------------------------------------------------------------------------------------------

_STATUS = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process that ran tests, once all is reported, without taking its libraries down.

    Their threads go on while the C++ of the others is destroyed. With those of Ray, Arrow, PyTorch, Lance, DuckDB and
    Polars in one process, one of many runs ended in a segmentation fault after its last line, and was taken for failed.
    The programs of this project end as all programs do, and tests compare their exit codes.
    """
    if _STATUS in config.stash and not hasattr(config, "workerinput"):  # pytest-xdist ends its workers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_STATUS])


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., str]:
    """Writes a table as `manifest/requests.parquet` beside four images, and returns the folder's path."""

    def write(table: pa.Table | None = None, name: str = "requests.parquet") -> str:
        folder = tmp_path / "manifest"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for k in range(4):
            (folder / "images" / f"{k}.png").write_bytes(png(k))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(requests_table() if table is None else table, path)
        return str(folder)

    return write


@pytest.fixture
def make_config(write_manifest: Callable[..., str], tmp_path: Path) -> Callable[..., RunConfig]:
    """A config over a manifest of this test; dotted keys override."""

    def make(table: pa.Table | None = None, **overrides: Any) -> RunConfig:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        paths = {"manifest": write_manifest(table), "output": str(tmp_path / "out")}
        return RunConfig.load(None, paths | dotted)

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


# --- a real S3 server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """Started once; every test uses a prefix of its own. Loopback only, no telemetry, no bucket but the one named."""
    with SeaweedFS(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty `s3://` prefix of this test's own; the environment has what every client needs."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/{request.node.name[:60].replace('[', '-').rstrip(']')}-{time.time_ns()}"
