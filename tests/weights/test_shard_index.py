"""`weights.shard_index`: shards are files of their index's own folder, and all of them are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pia_batch import tiny
from pia_batch.errors import ConfigError
from pia_batch.weights import components
from pia_batch.weights.components import DIFFUSION_MODEL
from pia_batch.weights.fetching import FetchedFolder

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = tuple(f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2))


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """Folder of a VAE in two shards, without index."""
    folder = tmp_path / "vae"
    shutil.copytree(tiny.PATH / "vae", folder)
    whole = folder / "diffusion_pytorch_model.safetensors"
    for side, shard in zip(("encoder", "decoder"), SHARDS, strict=True):
        save_file({name: held for name, held in load_file(whole).items() if side[0] == name[0]}, folder / shard)
    whole.unlink()
    return folder


def find(folder: Path, variant: str | None = None) -> components.Component:
    return components.weighted(FetchedFolder(folder, None, str(folder)), "", DIFFUSION_MODEL, variant)


@pytest.mark.parametrize(
    ("shard", "problem"),
    {
        "above": ("../other.safetensors", "is not in the folder of the index"),
        "below": ("sub/other.safetensors", "is not in the folder of the index"),
        "absolute": ("/data/other.safetensors", "is not in the folder of the index"),
        "of Windows": ("sub\\other.safetensors", "is not in the folder of the index"),
        "at a URL": ("https://host.example/other.safetensors", "is not in the folder of the index"),
        "a pickle": ("diffusion_pytorch_model-00001-of-00002.bin", "is a pickle, which is refused"),
        "a folder": ("..", "is not a .safetensors file"),
        "of another format": ("model.gguf", "is not a .safetensors file"),
        "null": (None, "is not the name of a file"),
        "a number": (1, "is not the name of a file"),
        "a list": (["a.safetensors"], "is not the name of a file"),
        "with a line break": ("a\nb.safetensors", "is not the name of a file"),
        "with a zero": ("a\0b.safetensors", "is not the name of a file"),
        "half a character": ("\ud800.safetensors", "is not the name of a file"),
        "too long": ("a" * 250 + ".safetensors", "is not the name of a file"),
        "empty": ("", "is not a .safetensors file"),
    }.values(),
)  # fmt: skip
def test_a_shard_that_is_no_file_of_the_folder_is_refused_with_the_index_and_its_name(vae, shard, problem):
    content = {"weight_map": {"encoder.conv_in.weight": SHARDS[0], "decoder.conv_in.weight": shard}}
    (vae / INDEX).write_text(json.dumps(content))

    with pytest.raises(ConfigError) as caught:
        find(vae)

    message = str(caught.value)
    assert message.startswith(f"{vae / INDEX}: the shard ")
    assert f"of tensor decoder.conv_in.weight {problem}" in message
    assert message.isprintable()
    assert "variant" not in message


@pytest.mark.parametrize(
    "content", [{}, {"metadata": {}}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}]
)
def test_an_index_without_shards_is_refused(vae, content):
    (vae / INDEX).write_text(json.dumps(content))

    with pytest.raises(ConfigError, match=r"index\.json names no shards .*; fetch it again"):
        find(vae)


def test_missing_shards_are_named_with_the_file_that_could_replace_them(vae):
    (vae / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": "x.safetensors"}}))

    with pytest.raises(
        ConfigError, match=r"missing shards: 1 of 2 \(x\.safetensors\).*: fetch the rest of the folder$"
    ):
        find(vae)
    shutil.copy(tiny.PATH / "vae" / "diffusion_pytorch_model.safetensors", vae)
    with pytest.raises(ConfigError, match=r"or remove the index to use diffusion_pytorch_model\.safetensors$"):
        find(vae)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_without_their_index_are_refused_with_its_name(vae, variant):
    middle = "" if variant is None else f".{variant}"
    for shard in SHARDS:
        (vae / shard).rename(vae / shard.replace(".safetensors", f"{middle}.safetensors"))

    with pytest.raises(
        ConfigError, match=rf"has shards of weights .*no index \(\S+\.safetensors\.index{middle}\.json\)"
    ):
        find(vae, variant)


@pytest.mark.parametrize("name", ["safetensors.index.fp16.json", "safetensors.fp16.index.json"])
def test_the_index_of_a_variant_has_the_name_of_any_release(vae, name):
    shards = [shard.replace(".safetensors", ".fp16.safetensors") for shard in SHARDS]
    for old, new in zip(SHARDS, shards, strict=True):
        (vae / old).rename(vae / new)
    index = vae / f"diffusion_pytorch_model.{name}"
    index.write_text(
        json.dumps({"weight_map": {"encoder.conv_in.weight": shards[0], "decoder.conv_in.weight": shards[1]}})
    )

    assert find(vae, "fp16").files == tuple(sorted(["config.json", index.name, *shards]))
