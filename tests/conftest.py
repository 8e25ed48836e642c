"""Fixtures that more than one file of tests needs: pictures, manifests, and a real S3 server on loopback."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import png, requests_table
from places import PYTHONPATH
from seaweedfs import SeaweedFS

from pia_batch.config import RunConfig
from pia_batch.storage.object_store import Store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


# Before any test imports torch: networks of this size lose more to waiting for a second core than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for all tests of a module: starting it takes longer than they do."""
    import ray  # noqa: PLC0415 - slow, and most modules need none

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH}},  # fakes.py
    )
    yield
    ray.shutdown()


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


# --- a real S3 server -----------------------------------------------------------------------------------------------


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
