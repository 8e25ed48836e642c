"""SeaweedFS, a real S3 server, on loopback: started for tests, and killed, frozen and started again for some."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

KEY, SECRET, BUCKET = "testkey", "testsecret", "pia"

_START_S = 90
"""Time in which a server must store its first object, in seconds."""


@dataclass
class SeaweedFS:
    """One server over one folder, with one bucket; a context manager. Loopback only, no telemetry."""

    folder: Path
    bucket: str = BUCKET
    ports: list[int] = field(default_factory=lambda: _free_ports(5))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()  # SIGTERM takes up to half a minute once clients have used it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[3]}"

    def environment(self, url: str | None = None) -> dict[str, str]:
        """Return the variables that obstore, s3fs and pyarrow read; `url` replaces the server's own."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start it over its folder, on the same ports as before, and wait until it stores."""
        master, volume, filer, s3, admin = self.ports
        command = [
            *(str(Path(sys.executable).with_name("weed")), "mini", f"-dir={self.folder}", "-ip=127.0.0.1"),
            *("-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            *(f"-s3.port={s3}", f"-admin.port={admin}", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0"),
            *("-s3.port.lance=0", "-s3.autoCreateBucket=false", f"-bucket={self.bucket}", "-master.telemetry=false"),
        ]
        log_path = self.folder / "weed.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment(),
                start_new_session=True,
                cwd=self.folder,
            )
        deadline = time.monotonic() + _START_S
        while not self._stores():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                msg = f"the S3 server did not start:\n{log_path.read_text(errors='replace')[-3000:]}"
                raise RuntimeError(msg)
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL the server: its folder holds all that it has acknowledged, and nothing else."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def freeze(self) -> None:
        """Stop the server: the kernel still accepts connections, and it answers none."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def _stores(self) -> bool:
        store = S3Store(
            self.bucket,
            endpoint=self.url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )
        try:
            obstore.put(store, "ready", b"1")
        except (BaseError, FileNotFoundError):
            return False
        return True


def _free_ports(count: int) -> list[int]:
    """Return free ports of loopback, each with its gRPC sibling 10,000 above."""
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
