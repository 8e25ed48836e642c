"""Every purpose of a URI asks the same table of schemes, and gets the same answer."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from s3fs import S3FileSystem

from pia_batch.config import ImagesConfig, RunConfig
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.manifest.files import reading
from pia_batch.storage import filesystems, schemes
from pia_batch.storage.object_store import Store
from pia_batch.storage.schemes import SCHEMES, Purpose
from pia_batch.storage.uris import Policy, parse
from pia_batch.weights.fetching import ObjectFolder, locate


@pytest.fixture(autouse=True)
def fresh_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients are kept by scheme: none of these may meet another test."""
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    filesystems._other_filesystem.cache_clear()
    S3FileSystem.clear_instance_cache()
    yield
    filesystems._other_filesystem.cache_clear()
    S3FileSystem.clear_instance_cache()


AZURE = "container@account.dfs.core.windows.net"
URIS = {
    "file": "file:///data/x",
    **{name: f"{name}://bucket/x" for name in ("s3", "s3a", "S3", "gs", "gcs", "az", "abfs")},
    "abfss": f"abfss://{AZURE}/x",
    "http": "http://host/x",
    "https": "https://host/x",
    "hf": "hf://datasets/owner/name/x",
    "ftp": "ftp://host/x",
    "memory": "memory://x",
}
READABLE = ["file", "s3", "s3a", "S3", "gs", "gcs", "az", "abfs", "abfss"]
EXPECTED: dict[Purpose, list[str]] = {
    "image": [*READABLE, "http", "https"],
    "images.allow": [*READABLE, "http", "https"],
    "manifest": [*READABLE, "http", "https", "hf"],
    "weights": READABLE,
    "output": READABLE,
}


def as_image(uri: str) -> None:
    parse(uri)


def as_allowed(uri: str) -> None:
    ImagesConfig(allow=(uri,))


def as_manifest(uri: str) -> None:
    with reading(uri):
        try:
            filesystems.arrow_filesystem(uri)
        except ImportError as err:  # gcsfs and adlfs need not be installed here
            assert re.search(r"needs the package (gcsfs|adlfs); pip install 'pia-batch\[(gcp|azure)\]'", str(err))  # noqa: PT017 - either is fine


def as_weights(uri: str) -> None:
    if not uri.startswith("file:"):  # a folder that is not there is another mistake
        locate(uri, None, "model.base", hub=None)  # type: ignore[arg-type]  # never asked


def as_output(uri: str) -> None:
    RunConfig.load(None, {"manifest": "m", "output": uri})


USES: dict[Purpose, Callable[[str], None]] = {
    "image": as_image,
    "images.allow": as_allowed,
    "manifest": as_manifest,
    "weights": as_weights,
    "output": as_output,
}


@pytest.mark.parametrize("name", URIS)
@pytest.mark.parametrize("purpose", USES)
def test_a_purpose_accepts_the_schemes_that_the_table_says(purpose: Purpose, name: str) -> None:
    scheme = SCHEMES.get(name.lower())
    expected = name in EXPECTED[purpose]

    assert (scheme is not None and scheme.serves(purpose)) == expected
    if expected:
        USES[purpose](URIS[name])
        return
    with pytest.raises((ValueError, ConfigError, ManifestError)) as caught:
        USES[purpose](URIS[name])
    assert schemes.expected(purpose) in str(caught.value)


@pytest.mark.parametrize("name", READABLE)
def test_images_manifests_weights_and_outputs_of_a_scheme_are_the_same_place_of_one_client(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    uri = (tmp_path / "x").as_uri() if name == "file" else URIS[name]
    store = SCHEMES[name.lower()].store
    clients = {"file": "LocalStore", "s3": "S3Store", "gs": "GCSStore", "abfs": "AzureStore"}

    assert parse(uri).scheme == store
    assert type(Store(uri)._store).__name__ == clients[store]
    if name != "file":
        found, _ = locate(uri, None, "model.base", hub=None)  # type: ignore[arg-type]  # never asked
        assert isinstance(found, ObjectFolder)
        assert type(found.store._store).__name__ == clients[store]
    if (package := SCHEMES[store].package) and importlib.util.find_spec(package) is None:
        with pytest.raises(ImportError, match=f"{store}:// needs the package {package}"):
            filesystems.arrow_filesystem(uri)
        return
    filesystem, path = filesystems.arrow_filesystem(uri)
    assert path == (str(tmp_path / "x") if name == "file" else "bucket/x")
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem if name == "file" else pyarrow.fs.PyFileSystem)


@pytest.mark.parametrize(
    ("base", "same", "other"),
    [
        ("az://photos/day", "abfs://photos/x.png", "az://other/x.png"),
        ("abfs://photos/day", "az://photos/x.png", f"abfs://{AZURE}/x.png"),
        ("gcs://photos/day", "gs://photos/x.png", "gs://other/x.png"),
        ("s3a://photos/day", "s3://photos/x.png", "gs://photos/x.png"),
    ],
)
def test_a_manifest_opens_its_own_bucket_by_every_name_of_its_scheme(base: str, same: str, other: str) -> None:
    policy = Policy(base)

    assert policy.locate("1.png").target == f"{SCHEMES[base.split(':', maxsplit=1)[0]].store}://photos/day/1.png"
    assert policy.locate(same).parts == ("x.png",)
    with pytest.raises(ValueError, match="is not allowed"):
        policy.locate(other)


@pytest.mark.parametrize("uri", ["az://container@account.dfs.core.windows.net/x", "s3://user@bucket/x", "gs://u:p@b/x"])
def test_an_authority_with_a_user_name_is_refused_where_it_names_no_account(uri: str) -> None:
    with pytest.raises(ValueError, match="was given with credentials"):
        parse(uri)


@pytest.mark.parametrize(
    ("uri", "spelling"),
    [
        ("GCS://b/x", "gs://b/x"),
        ("abfss://c@a/x y", "abfs://c@a/x y"),
        ("/a/b", "/a/b"),
        ("memory://x", "memory://x"),
        ("FILE:///x", "file:///x"),
    ],
)
def test_clients_get_the_one_spelling_that_all_of_them_know(uri: str, spelling: str) -> None:
    assert schemes.canonical(uri) == spelling


def test_a_local_output_in_capitals_is_the_same_folder(tmp_path: Path) -> None:
    Store(f"FILE://{tmp_path}/out").create("name", b"data")

    assert (tmp_path / "out" / "name").read_bytes() == b"data"


def test_a_scheme_is_declared_once() -> None:
    assert all(name == scheme.name == name.lower() for name, scheme in SCHEMES.items())
    assert all(scheme.store in SCHEMES for scheme in SCHEMES.values())
    used: dict[str, Any] = {}
    for scheme in SCHEMES.values():
        client = (scheme.reader, scheme.committer, scheme.package)
        assert used.setdefault(scheme.store, client) == client
