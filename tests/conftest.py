"""Fixtures that more than one file of tests needs: pictures, manifests, and a real S3 server on loopback."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pia_batch.config import RunConfig
from pia_batch.storage import Store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


# Before any test imports torch: networks of this size lose more to waiting for a second core than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def png(seed: int = 0, width: int = 64, height: int = 64) -> bytes:
    """A smooth random picture, as a PNG file."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    sink = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(sink, "PNG")
    return sink.getvalue()


def requests_table(count: int = 4, **columns: Any) -> pa.Table:
    """A manifest of `count` good requests for the embedded model; `columns` are added or replaced."""
    table: dict[str, Any] = {
        "request_id": [f"r{k:03d}" for k in range(count)],
        "image": [f"images/{k % 4}.png" for k in range(count)],
        "prompt": [f"a red circle moving left, number {k}" for k in range(count)],
    }
    return pa.table(table | columns)


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

S3_KEY, S3_SECRET, S3_BUCKET = "testkey", "testsecret", "pia"


@dataclass(frozen=True)
class S3Server:
    """SeaweedFS on loopback, with one bucket."""

    url: str
    pid: int
    bucket: str = S3_BUCKET


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Started once; every test uses a prefix of its own. Loopback only, no telemetry, no bucket but the one named."""
    folder = tmp_path_factory.mktemp("s3")
    master, volume, filer, s3, admin = _free_ports(5)
    command = [
        *(str(Path(sys.executable).with_name("weed")), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"),
        *(f"-admin.port={admin}", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-s3.autoCreateBucket=false", f"-bucket={S3_BUCKET}", "-master.telemetry=false"),
    ]
    credentials = {"AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET}
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | credentials, start_new_session=True, cwd=folder
        )
    server = S3Server(f"http://127.0.0.1:{s3}", process.pid)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3_environment(server).items():
                patch.setenv(name, value)
            _wait_until_it_stores(process, folder / "weed.log")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # SIGTERM takes up to half a minute once clients have used it
        process.wait()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty `s3://` prefix of this test's own; the environment has what every client needs."""
    for name, value in s3_environment(s3_server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/{request.node.name[:60].replace('[', '-').rstrip(']')}-{time.time_ns()}"


def s3_environment(server: S3Server) -> dict[str, str]:
    """What obstore, s3fs and pyarrow read."""
    return {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _wait_until_it_stores(process: subprocess.Popen[bytes], log: Path) -> None:
    import obstore  # noqa: PLC0415
    from obstore.exceptions import BaseError  # noqa: PLC0415
    from obstore.store import S3Store  # noqa: PLC0415

    store = S3Store(
        S3_BUCKET,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "5s"},
        retry_config={"max_retries": 0},
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            obstore.put(store, "ready", b"1")
        except (BaseError, FileNotFoundError):
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"the S3 server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _free_ports(count: int) -> list[int]:
    """Ports free on loopback, each with its gRPC sibling 10,000 above."""
    ports: list[int] = []
    rng = np.random.default_rng()
    while len(ports) < count:
        port = int(rng.integers(20_000, 45_000))
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
