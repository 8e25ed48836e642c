"""Whole models in the layouts of trainers and loaders: `plan` and `doctor` refuse exactly what no engine loads.

The same files load from a folder, from the hub's cache without a network, and from an object store.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import model_files
import pipelines
import pytest
import torch
from hubs import COMMIT
from inputs import requests_table
from layouts import Tensors

from pia_batch import cli
from pia_batch.config import ModelConfig, RunConfig
from pia_batch.driver.preflight.storage import check_weights
from pia_batch.engine import loading
from pia_batch.errors import ConfigError
from pia_batch.storage.object_store import Store
from pia_batch.weights.resolve import resolve

pytestmark = pytest.mark.long

CPU = torch.device("cpu")
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept")
    pipelines.save(pipelines.build(), path)
    return path


@pytest.fixture(scope="module")
def tensors(kept: Path) -> Tensors:
    return layouts.checkpoint(kept)


@pytest.fixture
def folder(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIA_BATCH_CACHE", str(tmp_path / "cache"))
    model_files.prepare(kept, tmp_path / "models")
    return tmp_path / "models"


def here(folder: Path) -> Callable[[str], str]:
    return lambda place: str(folder / place)


def in_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Each folder as a repository in the hub's cache, whose files are links to blobs, without a network."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        name, _, inside = path.relative_to(folder).as_posix().partition("/")
        repository = cache / f"models--someone--{name}"
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        link = repository / "snapshots" / COMMIT / inside
        for each in (blob, link, repository / "refs" / "main"):
            each.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
        (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return lambda place: f"someone/{place}"


def in_store(folder: Path, uri: str) -> Callable[[str], str]:
    store = Store(uri)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        store.create(path.relative_to(folder).as_posix(), path.read_bytes())
    return lambda place: f"{uri}/{place}"


def config_of(settings: Settings, tmp_path: Path, name: str = "run") -> Path:
    path = tmp_path / f"{name}.yaml"
    content = {"manifest": str(tmp_path / "m.parquet"), "output": str(tmp_path / "out"), "model": settings}
    path.write_text(json.dumps(content))
    return path


def load(config: Path) -> loading.Components:
    """Load the model as an engine does."""
    model = RunConfig.load(config).model
    return loading.load(model, resolve(model), CPU, torch.float32)


def assert_same(found: loading.Components, wanted: loading.Components) -> None:
    for name in ("text_encoder", "vae", "unet", "image_encoder"):
        theirs, ours = (getattr(each, name, None) for each in (wanted, found))
        if theirs is None:
            assert ours is None
            continue
        held = ours.state_dict()
        assert set(held) == set(theirs.state_dict())
        for each, tensor in theirs.state_dict().items():
            assert torch.equal(held[each], tensor), each


def refusal_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except ConfigError as err:
        return str(err)
    return None


@pytest.mark.parametrize("name", model_files.ALL)
def test_plan_and_doctor_refuse_exactly_what_no_engine_loads(tensors, folder, tmp_path, write_manifest, capsys, name):
    case = model_files.ALL[name]
    settings = model_files.placed(case.make(folder, tensors), here(folder))
    config = config_of(settings, tmp_path)
    manifest = write_manifest(requests_table(1))

    with pytest.raises(SystemExit) as left:
        cli.main(["plan", str(config), "--manifest", manifest])
    said = capsys.readouterr().err
    (finding,) = check_weights({"default": RunConfig.load(config).model})
    refusal = refusal_of(lambda: load(config))

    assert (refusal is None) == (case.refused is None), refusal
    if refusal is None:
        assert (left.value.code, finding.state) == (0, "ok")
        return
    assert re.search(case.refused, refusal), refusal
    assert (left.value.code, finding.state) == (2, "fail")
    assert "\n" not in refusal
    assert refusal in said
    assert refusal in finding.message


@pytest.mark.parametrize("key", model_files.KEYS)
def test_what_belongs_elsewhere_is_refused_in_one_line_that_helps(tensors, folder, key):
    kinds = model_files.write_kinds(folder, tensors)
    put, fitting = model_files.KEYS[key]

    for kind, place in kinds.items():
        model = ModelConfig(**model_files.placed({"base": "small"} | put(place), here(folder)))
        refusal = refusal_of(lambda model=model: resolve(model))
        assert (refusal is None) == (kind in fitting), (kind, refusal)
        if refusal is not None:
            assert "\n" not in refusal
            assert Path(place).name in refusal or (kind.startswith("folder") and ".safetensors" in refusal), refusal
            assert re.search(
                r"[;:,] (it belongs|set|use|leave|fetch|name|they are made|PIA|its tensor names)\b", refusal
            ), refusal
            assert "give the one to use the name" not in refusal


@pytest.mark.s3
@pytest.mark.parametrize("name", model_files.ALL)
def test_a_model_elsewhere_is_that_of_a_folder(tensors, folder, tmp_path, monkeypatch, s3, name):
    case = model_files.ALL[name]
    relative = case.make(folder, tensors)
    elsewhere = {"hub": in_cache(folder, tmp_path / "hub", monkeypatch), "store": in_store(folder, s3)}
    configs = {place: config_of(model_files.placed(relative, put), tmp_path, place) for place, put in elsewhere.items()}
    if case.refused is not None:
        for place, config in configs.items():
            refusal = refusal_of(lambda config=config: load(config))
            assert refusal is not None, place
            assert re.search(case.refused, refusal), (place, refusal)
        return
    wanted = load(config_of(model_files.placed(relative, here(folder)), tmp_path))

    for config in configs.values():
        assert_same(load(config), wanted)
