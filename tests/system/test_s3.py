"""Photographs in colour and grey, a partitioned manifest on a real S3 server, real Ray, the embedded model."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile

import av
import fsspec
import local_ray
import numpy as np
import photographs
import pyarrow.dataset as ds
import pyarrow.fs
import pytest
from PIL import Image
from seaweedfs import KEY, SECRET

from pia_batch import cli

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


def test_photographs_become_animations_with_the_settings_of_their_rows(
    s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # one of another test may know another server
    photographs.main(s3, ("astronaut", "camera"))
    arguments = ["run", "--manifest", f"{s3}/manifest", "--output", f"{s3}/out", "--run-id", "photographs"]
    arguments += ["--set", "placement.batch_size=3"]

    with local_ray.started(num_cpus=3, object_store_memory=200 * 2**20):  # its workers have the store's variables
        assert pia_batch(*arguments) == 0

    assert "8 requests: 8 succeeded, 0 failed" in capsys.readouterr().out
    filesystem = pyarrow.fs.S3FileSystem(
        access_key=KEY, secret_key=SECRET, endpoint_override=_endpoint(), scheme="http", region="us-east-1"
    )
    folder = s3.removeprefix("s3://")
    results = ds.dataset(f"{folder}/out/results/photographs", filesystem=filesystem).to_table().to_pylist()
    asked = ds.dataset(f"{folder}/manifest", filesystem=filesystem, partitioning="hive").to_table().to_pylist()
    by_id = {row["request_id"]: row for row in asked}
    assert len(results) == len(by_id) == 8
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
    assert pia_batch(*arguments) == 0
    assert "0 computed in this run" in capsys.readouterr().out


def pia_batch(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


def _endpoint() -> str:
    return os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
