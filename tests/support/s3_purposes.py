"""Everything that a run does with S3, on a prefix that holds the object `name` with the content `data`."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from pia_batch.config import ImagesConfig
from pia_batch.manifest.files import reading
from pia_batch.media.fetch import read_image
from pia_batch.storage import filesystems
from pia_batch.storage.object_store import Store
from pia_batch.weights.fetching import ObjectFolder, locate

_BUNDLES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


def bare_environment(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Remove every key, profile and proxy from the environment, and forbid requests to a metadata address."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "BOTO")) or name.upper().endswith("_PROXY") or name in _BUNDLES:
            patch.delenv(name)
    home.mkdir()
    patch.setenv("HOME", str(home))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def as_manifest(place: str) -> None:
    uri = f"{place}/name"
    with reading(uri):
        filesystem, path = filesystems.arrow_filesystem(uri)
        assert filesystem.get_file_info(path).is_file
        with filesystem.open_input_file(path) as file:
            assert file.read() == b"data"


def as_image(place: str) -> None:
    assert read_image("name", place, ImagesConfig(timeout_s=20)) == b"data"


def as_allowed_image(place: str) -> None:
    images = ImagesConfig(allow=(place,), timeout_s=20)
    assert read_image(f"{place}/name", "/nowhere", images) == b"data"


def as_weights(place: str) -> None:
    found, _ = locate(place, None, "model.base", hub=None)  # type: ignore[arg-type]  # never asked
    assert isinstance(found, ObjectFolder)
    assert found.store.read("name") == b"data"


def as_output(place: str) -> None:
    store = pickle.loads(pickle.dumps(Store(place)))  # noqa: S301 - our own bytes
    name = f"made/{time.time_ns()}"
    store.create(name, b"data")
    assert store.read(name) == b"data"


PURPOSES = {
    "manifest": as_manifest,
    "image": as_image,
    "images.allow": as_allowed_image,
    "weights": as_weights,
    "output": as_output,
}
