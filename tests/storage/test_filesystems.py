"""Files that an operator names and that cannot be read: each reader of them has the same remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import aiohttp
import botocore.exceptions
import pytest
from ray import cloudpickle
from s3_recorder import recording

from pia_batch.config import RunConfig, layers
from pia_batch.datasets import sources
from pia_batch.datasets.sources import Place
from pia_batch.errors import ManifestError, PiaBatchError
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


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"config"}))  # a config is a local file
@pytest.mark.parametrize("uri", ["s3://b/../x.csv", "s3a://b/a/./x.csv", "gs://b/a/../x.csv", "abfs://b@c/a/../x.csv"])
def test_dots_in_a_key_are_refused_before_a_server_calls_the_signature_wrong(reader: str, uri: str) -> None:
    with pytest.raises(PiaBatchError, match=r"a segment of the path is '\.' or '\.\.'; write the path without them"):
        READERS[reader](uri)


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


NO_FAULTS = {
    *("MissingServiceIdError", "UndefinedModelAttributeError"),  # about its own descriptions of services
    *("ImminentRemovalWarning", "UnsupportedTLSVersionWarning"),
    "WSMessageTypeError",  # of web sockets
}
"""Exceptions of botocore and aiohttp that no operator can cause."""

OF_CLIENTS = {
    f"{module.__name__}.{name}": kind
    for module in (botocore.exceptions, aiohttp)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Exception) and name not in NO_FAULTS
    if kind.__module__.startswith(("botocore", "aiohttp.client_exceptions"))
}


def _made(kind: type[Exception]) -> Exception:
    """Return an exception of two lines, whatever its class wants for its text."""
    named = type(kind.__name__, (kind,), {"__str__": lambda _: "first\nsecond", "__module__": kind.__module__})
    return named.__new__(named)


@pytest.mark.parametrize("name", sorted(OF_CLIENTS))
@pytest.mark.parametrize("reading", [files.reading, sources.reading])
def test_every_exception_of_a_client_of_s3_is_one_line_with_a_remedy(
    name: str, reading: Callable[[str], AbstractContextManager[None]]
) -> None:
    with pytest.raises(ManifestError) as refused, reading("s3://bucket/x"):
        raise _made(OF_CLIENTS[name])

    line = str(refused.value)
    assert "s3://bucket/x" in line
    assert ": first; " in line
    assert "\n" not in line


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"config"}))
def test_a_store_that_does_not_answer_is_one_line_for_every_reader(
    reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> NoReturn:
        raise botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:9/")

    monkeypatch.setattr(filesystems, "arrow_filesystem", refuse)

    with pytest.raises(PiaBatchError, match=r"127\.0\.0\.1:9.*; check that the store runs, its address"):
        READERS[reader]("s3://bucket/x")


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
