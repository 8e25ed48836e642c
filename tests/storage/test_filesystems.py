"""Files that an operator names and that cannot be read: each reader of them has the same remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from ray import cloudpickle
from s3_recorder import recording

from pia_batch.config import RunConfig, layers
from pia_batch.datasets.sources import Place
from pia_batch.errors import PiaBatchError
from pia_batch.manifest import files, id_tables
from pia_batch.manifest.blocklist import with_blocklist
from pia_batch.storage import filesystems


def as_manifest(path: str) -> None:
    with files.reading(path):
        filesystems.list_files(*filesystems.arrow_filesystem(path))


READERS: dict[str, Callable[[str], object]] = {
    "manifest": as_manifest,
    "--only": id_tables.read,
    "safety.blocklist": lambda path: with_blocklist(
        RunConfig(manifest="/m.csv", output="/out", safety={"blocklist": path})
    ),
    "config": lambda path: layers.read_yaml(Path(path)),
    "source": Place.of,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_the_system_refuses_to_open_has_the_remedy_of_its_error(reader: str, tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * 300))  # also root may not have a longer name

    with pytest.raises(PiaBatchError, match=r"; choose a shorter path or name$") as refused:
        READERS[reader](path)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("place", "raised", "remedy"),
    [
        ("/a/b", PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "give this user access to it"),
        ("file:///a/b", OSError(errno.ESTALE, os.strerror(errno.ESTALE)), "mount the network disk again"),
        ("s3://a/b", PermissionError("Forbidden"), "check the credentials and the policy"),
        ("s3://a/b", PermissionError("set AWS_DEFAULT_REGION to it"), None),
        ("s3://a/b", OSError(errno.EIO, "the store fails"), None),
        ("/a/b", ValueError("no Parquet"), None),
    ],
)
def test_the_remedy_is_that_of_the_place(place: str, raised: Exception, remedy: str | None) -> None:
    found = filesystems.reading_remedy(place, raised)

    assert (found is None, remedy is None or remedy in str(found)) == (remedy is None, True)


def test_a_file_system_that_was_read_from_is_sent_to_a_worker_without_its_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with recording() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.objects[urlsplit(server.url).netloc, "/bucket/name"] = b"data"
        filesystem, path = filesystems.arrow_filesystem("s3://bucket/name")
        with filesystem.open_input_file(path) as file:
            assert file.read() == b"data"

        copy = cloudpickle.loads(cloudpickle.dumps(filesystem))
        with copy.open_input_file(path) as file:
            assert file.read() == b"data"
