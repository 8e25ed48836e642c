"""Real input: photographs, a partitioned manifest on a real S3 server, real Ray, the embedded model."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pyarrow.dataset as ds
import pyarrow.fs
import pytest
from PIL import Image
from seaweedfs import KEY, SECRET

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.s3, pytest.mark.long]


def frames_of(data: bytes, file_format: str) -> list[tuple[int, int]]:
    """The size of every frame, read by others than this project's code."""
    if file_format == "mp4":
        with av.open(io.BytesIO(data)) as container:
            return [(frame.width, frame.height) for frame in container.decode(video=0)]
    if file_format == "png_zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [Image.open(archive.open(name)).size for name in archive.namelist() if name.endswith(".png")]
    with Image.open(io.BytesIO(data)) as image:
        sizes = []
        for k in range(image.n_frames):
            image.seek(k)
            sizes.append(image.size)
        return sizes


def test_photographs_become_animations_with_the_settings_of_their_rows(s3: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "photographs.py"), s3]
    subprocess.run(command, check=True, capture_output=True, text=True)
    arguments = ["--manifest", f"{s3}/manifest", "--output", f"{s3}/out", "--run-id", "photographs"]
    run = [sys.executable, "-m", "pia_batch.cli", "run", *arguments, "--set", "placement.batch_size=3"]

    done = subprocess.run(run, check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "24 requests: 24 succeeded, 0 failed" in done.stdout
    filesystem = pyarrow.fs.S3FileSystem(
        access_key=KEY, secret_key=SECRET, endpoint_override=_endpoint(), scheme="http", region="us-east-1"
    )
    folder = s3.removeprefix("s3://")
    results = ds.dataset(f"{folder}/out/results/photographs", filesystem=filesystem).to_table().to_pylist()
    asked = ds.dataset(f"{folder}/manifest", filesystem=filesystem, partitioning="hive").to_table().to_pylist()
    by_id = {row["request_id"]: row for row in asked}
    assert len(results) == len(by_id) == 24
    for row in results:
        wanted = by_id[row["request_id"]]
        for name in ("prompt", "num_frames", "width", "height", "format", "guidance_scale", "strength", "subject"):
            assert row[name] == wanted[name], (row["request_id"], name)
        with filesystem.open_input_file(row["animation_uri"].removeprefix("s3://")) as file:
            data = file.read()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert len(data) == row["num_bytes"]
        assert frames_of(data, row["format"]) == [(row["width"], row["height"])] * row["num_frames"]
        assert np.isfinite(row["motion"])
    again = subprocess.run(run, check=True, capture_output=True, text=True)
    assert "0 computed in this run" in again.stdout


def _endpoint() -> str:
    import os  # noqa: PLC0415

    return os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
