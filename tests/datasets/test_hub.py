"""Datasets on the Hugging Face hub: read by the real client from a hub on loopback, at the commit that was pinned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import foreign_datasets as foreign
import hub_server
import pytest

PROGRAM = """
import json, sys
from pia_batch.datasets.kinds import kind_of
from pia_batch.datasets.sources import Place, ReadOptions
place = Place.of(sys.argv[1])
source = kind_of(place, None).open(place, ReadOptions())
rows = [found for piece in source.pieces for found in source.read(piece)]
print(json.dumps([place.uri, source.pinned, [len(found.table) for found in rows], rows[0].places[0].as_py()]))
"""


def read(uri: str, hub: hub_server.HubServer, home: Path) -> subprocess.CompletedProcess[str]:
    """Read a source in a process of its own: huggingface_hub reads its endpoint when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, uri], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_revision_is_pinned_to_its_commit(tmp_path: Path, revision: str) -> None:
    foreign.write_hugging_face(tmp_path / "repository" / "data")
    with hub_server.served("boats/boats", tmp_path / "repository", "c" * 40) as hub:
        done = read(f"hf://datasets/boats/boats{revision}", hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    uri, pinned, rows, first = json.loads(done.stdout)
    assert uri == f"hf://datasets/boats/boats@{'c' * 40}"
    assert pinned == {"commit": "c" * 40}
    assert rows == [3, 3]
    assert first == "data/train-00000-of-00002.parquet:0"
    read_files = [request for request in hub.requests if "/resolve/" in request]
    assert read_files
    assert all("c" * 40 in request for request in read_files)


@pytest.mark.slow
def test_a_dataset_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    with hub_server.served("boats/boats", tmp_path / "repository", "c" * 40) as hub:
        done = read("hf://datasets/boats/baots", hub, tmp_path / "home")
    assert "ManifestError: source hf://datasets/boats/baots does not exist" in done.stderr
