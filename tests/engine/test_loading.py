"""`pia_batch.engine.network_files` and `loading`: every layout gives the networks it was made from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import layouts
import pipelines
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, MotionAdapter, PIAPipeline, UNet2DConditionModel
from pipelines import assert_equals_single_calls, shot
from safetensors.torch import load_file, save_file

from pia_batch.config import LoraConfig, ModelConfig, SchedulerConfig, TextualInversionConfig
from pia_batch.engine import PiaEngine, adapters, loading, loras, network_files
from pia_batch.errors import ConfigError
from pia_batch.weights import sd15
from pia_batch.weights.components import Component
from pia_batch.weights.resolve import resolve
from pia_batch.weights.tensor_map import Stored

CPU = torch.device("cpu")
SHIPPED = SchedulerConfig(name="checkpoint")


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    return pipelines.build()


READERS: dict[str, Callable[[Component], object]] = {
    "network": lambda part: network_files._tensors({"w": Stored(part.path, "w", (8,))}, torch.float32),
    "check of values": lambda part: network_files._first_invalid(part.path),
    "LoRA": lambda part: loras.read(part, LoraConfig(source="x")),
    "textual inversion": lambda part: adapters._inversion(part, TextualInversionConfig(source="x")),
}
"""Readers of a safetensors file whose header was valid before Ray started."""


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 80), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_was_cut_meanwhile_is_named_with_the_remedy(
    reader: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    part = Component(tmp_path, None, ("a.safetensors",), None, "single_file")
    save_file({"w": torch.ones(8)}, part.path)
    damage(part.path)

    with pytest.raises(ConfigError, match=r"cannot read .*a\.safetensors: .*; .*fetch the file again$"):
        READERS[reader](part)


@pytest.fixture(scope="module")
def folder(pipe: PIAPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as a diffusers folder, from which all other layouts are made."""
    path = tmp_path_factory.mktemp("diffusers")
    pipelines.save(pipe, path)
    return path


@pytest.fixture(scope="module")
def tensors(folder: Path) -> layouts.Tensors:
    return layouts.checkpoint(folder)


@pytest.fixture(scope="module")
def single(folder: Path, tensors: layouts.Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base in a single file with its configs, and the adapter in its folder."""
    path = tmp_path_factory.mktemp("single")
    return {
        "base": str(layouts.write(tensors, path / "base.safetensors")),
        "config": str(layouts.configs(folder, path / "configs")),
        "motion_adapter": str(folder / "motion_adapter"),
        "scheduler": SHIPPED,
    }


def load(dtype: torch.dtype = torch.float32, **settings: Any) -> loading.Components:
    model = ModelConfig(**settings)
    return loading.load(model, resolve(model), CPU, dtype)


def assert_same_networks(found: loading.Components, wanted: loading.Components) -> None:
    for name in ("text_encoder", "vae", "unet"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert type(ours) is type(theirs)
        assert ours.training is theirs.training is False
        assert_same_tensors(ours.state_dict(), theirs.state_dict())
        assert_same_tensors(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert found.tokenizer.get_vocab() == wanted.tokenizer.get_vocab()
    assert type(found.scheduler) is type(wanted.scheduler)
    assert dict(found.scheduler.config) == dict(wanted.scheduler.config)


def assert_same_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# --- every layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_gives_the_networks_of_the_folder_bit_for_bit(single, folder, dtype):
    assert_same_networks(load(dtype, **single), load(dtype, base=str(folder), scheduler=SHIPPED))


def test_half_precision_in_the_file_is_that_of_the_folder(single, tensors, tmp_path):
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    base = layouts.write(half, tmp_path / "half.safetensors")

    found = load(**(single | {"base": str(base)})).unet.state_dict()

    name = "down_blocks.0.resnets.0.conv1.weight"
    original = tensors["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"]
    assert torch.equal(found[name], original.half().float())


def test_an_engine_of_a_single_file_draws_what_the_pipeline_draws(pipe, single):
    engine = PiaEngine.load(ModelConfig(**single), device="cpu")

    assert_equals_single_calls(pipe, engine, [shot(1), shot(2, guidance_scale=1.0, motion_scale=2, clip_skip=1)])


def test_networks_own_their_weights(single, tmp_path):
    base = shutil.copy(single["base"], tmp_path / "base.safetensors")
    wanted, found = load(**single), load(**(single | {"base": str(base)}))

    with base.open("r+b") as file:
        file.write(bytes(base.stat().st_size))

    assert_same_networks(found, wanted)


def test_two_loads_of_one_file_share_nothing(single):
    first, second = load(**single), load(**single)
    first.unet.conv_in.weight.zero_()
    first.vae.encoder.conv_in.weight.zero_()

    assert second.unet.conv_in.weight.abs().sum() > 0
    assert second.vae.encoder.conv_in.weight.abs().sum() > 0


def test_the_layout_of_stable_diffusion_one_five_is_the_one_that_is_read(tmp_path):
    """Four blocks of two layers, as in the real one, whose names are known; the channels are fewer."""
    torch.manual_seed(0)
    config = json.loads((sd15.PATH / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [32, 64, 96, 96], "cross_attention_dim": 16}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    unet = UNet2DConditionModel.from_config(config)
    named = {layouts.UNET + name: tensor for name, tensor in layouts.original_unet(unet).items()}
    layouts.write(named, tmp_path / "x.safetensors")

    found = network_files.read("unet", _part(tmp_path / "x.safetensors", tmp_path / "unet"), torch.float32)

    assert len(named) == 686
    assert {
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.11.0.out_layers.3.bias",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
    } <= set(named)
    assert_same_tensors(found.state_dict(), unet.state_dict())


def test_the_vae_of_stable_diffusion_one_five_is_the_one_that_is_read(tmp_path):
    torch.manual_seed(0)
    config = json.loads((sd15.PATH / "vae" / "config.json").read_text()) | {"block_out_channels": [32, 64, 96, 96]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    vae = AutoencoderKL.from_config(config)
    named = layouts.original_vae(vae)
    layouts.write(named, tmp_path / "x.safetensors")

    found = network_files.read("vae", _part(tmp_path / "x.safetensors", tmp_path), torch.float32)

    assert len(named) == 248
    assert {
        "encoder.down.2.downsample.conv.weight",
        "encoder.mid.attn_1.q.weight",
        "decoder.up.3.block.0.conv1.weight",
        "decoder.up.0.block.2.conv2.bias",
        "decoder.mid.block_2.norm1.weight",
    } <= set(named)
    assert named["encoder.mid.attn_1.q.weight"].shape == (96, 96, 1, 1)
    assert_same_tensors(found.state_dict(), vae.state_dict())


def _part(path: Path, config: Path) -> Component:
    return Component(
        path.parent, None, (path.name,), None, "single_file", Component(config, None, ("config.json",), None)
    )


@pytest.mark.parametrize("old", [True, False])
def test_the_text_encoder_is_found_under_its_names_of_any_year(single, tensors, tmp_path, old):
    cut = {
        name.replace(".text_model.", ".") if old and name.startswith(layouts.TEXT) else name: tensor
        for name, tensor in tensors.items()
    }
    for name in ("logit_scale", "transformer.text_projection.weight"):
        cut[f"cond_stage_model.{name}"] = torch.ones(1)
    base = layouts.write(cut, tmp_path / "base.safetensors")

    assert_same_networks(load(**(single | {"base": str(base)})), load(**single))


@pytest.mark.parametrize("layout", ["checkpoint", "bare", "unpruned", "diffusers"])
def test_a_vae_in_a_file_of_its_own_takes_the_place_of_the_bases(single, folder, tensors, tmp_path, layout):
    torch.manual_seed(5)
    other = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae", local_files_only=True))
    bare = layouts.original_vae(other)
    held = {
        "checkpoint": tensors | {f"first_stage_model.{name}": tensor for name, tensor in bare.items()},
        "bare": bare,
        "unpruned": bare | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)},
        "diffusers": other.state_dict(),
    }[layout]
    file = layouts.write(held, tmp_path / "vae.safetensors")

    found = load(**single, vae=str(file))

    assert_same_tensors(found.vae.state_dict(), other.state_dict())
    assert_same_tensors(found.unet.state_dict(), load(**single).unet.state_dict())


@pytest.mark.parametrize("layout", ["original", "trained in parallel", "diffusers"])
def test_a_motion_adapter_in_a_file_is_that_of_the_folder(folder, tmp_path, layout):
    kept = load_file(folder / "motion_adapter" / "diffusion_pytorch_model.safetensors")
    held = kept if layout == "diffusers" else layouts.original_adapter(kept)
    if layout == "trained in parallel":
        held = {f"module.{name}": tensor for name, tensor in held.items()}
    file = layouts.write(held, tmp_path / "pia.safetensors")
    shutil.copy(folder / "motion_adapter" / "config.json", tmp_path / "config.json")

    found = load(base=str(folder), motion_adapter=str(file), scheduler=SHIPPED)

    assert_same_networks(found, load(base=str(folder), scheduler=SHIPPED))


def test_the_original_names_of_a_motion_adapter_are_animatediffs(folder):
    kept = load_file(folder / "motion_adapter" / "diffusion_pytorch_model.safetensors")
    block = "down_blocks.0.motion_modules.0.temporal_transformer."

    assert {
        "conv_in.weight",
        f"{block}proj_in.weight",
        f"{block}norm.weight",
        f"{block}transformer_blocks.0.attention_blocks.1.to_out.0.weight",
        f"{block}transformer_blocks.0.attention_blocks.0.pos_encoder.pe",
        f"{block}transformer_blocks.0.norms.1.weight",
        f"{block}transformer_blocks.0.ff.net.0.proj.weight",
        f"{block}transformer_blocks.0.ff_norm.weight",
    } <= set(layouts.original_adapter(kept))


# --- what must never load -------------------------------------------------------------------------------------------


NETWORKS = {"unet": layouts.UNET, "vae": layouts.VAE, "text_encoder": layouts.TEXT}


@pytest.mark.parametrize("part", NETWORKS)
def test_no_tensor_of_a_checkpoint_may_be_missing(single, tensors, tmp_path, part):
    """The first and the last of all that are named alike but for their numbers are left out, one at a time."""
    prefix = NETWORKS[part]
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    own.pop("cond_stage_model.transformer.text_model.embeddings.position_ids", None)
    alike: dict[str, list[str]] = {}
    for name in own:
        alike.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    file = tmp_path / "base.safetensors"
    for left_out in {name for names in alike.values() for name in (names[0], names[-1])}:
        layouts.write({name: tensor for name, tensor in own.items() if name != left_out}, file)
        with pytest.raises(ConfigError, match=r"base\.safetensors: missing tensor"):
            network_files.read(part, _part(file, Path(single["config"]) / part), torch.float32)


def test_a_missing_tensor_is_named(single, tensors, tmp_path):
    name = "model.diffusion_model.middle_block.1.norm.bias"
    base = layouts.write({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "base.safetensors")

    with pytest.raises(
        ConfigError, match=r"missing tensors of the UNet2DConditionModel: mid_block\.attentions\.0\.norm\.bias"
    ):
        load(**(single | {"base": str(base)}))


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn3.to_q.weight",
        "model.diffusion_model.input_blocks.9.0.in_layers.0.weight",
        "first_stage_model.decoder.up.5.block.0.norm1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.7.layer_norm1.weight",
    ],
)
def test_a_tensor_that_the_network_has_no_place_for_is_refused(single, tensors, tmp_path, name):
    base = layouts.write(tensors | {name: torch.zeros(16)}, tmp_path / "base.safetensors")

    with pytest.raises(
        ConfigError, match=r"base\.safetensors: unexpected tensors for a .*set model\.config to the matching one"
    ):
        load(**(single | {"base": str(base)}))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(single, tensors, tmp_path):
    name = "first_stage_model.encoder.conv_in.weight"
    base = layouts.write(tensors | {name: torch.zeros(9, 3, 3, 3)}, tmp_path / "base.safetensors")

    message = "other shapes than in the AutoencoderKL: encoder.conv_in.weight (9x3x3x3 instead of 8x3x3x3)"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(**(single | {"base": str(base)}))


def test_a_small_checkpoint_with_the_packages_configs_is_told_to_name_its_own(single):
    """As a real one of another size would be; here the width of its text is the first to differ."""
    settings = {name: value for name, value in single.items() if name != "config"}

    with pytest.raises(ConfigError, match="takes text embeddings of 16 dimensions, but its config says 768"):
        load(**settings)


def test_an_adapter_that_lacks_a_tensor_or_has_others_is_refused(folder, tmp_path):
    kept = layouts.original_adapter(load_file(folder / "motion_adapter" / "diffusion_pytorch_model.safetensors"))
    shutil.copy(folder / "motion_adapter" / "config.json", tmp_path / "config.json")
    name = "up_blocks.1.motion_modules.1.temporal_transformer.proj_out.bias"
    for held, message in (
        (
            {key: tensor for key, tensor in kept.items() if key != name},
            r"missing tensor.* up_blocks\.1\.motion_modules\.1\.proj_out",
        ),
        (
            kept | {"mid_block.resnets.0.conv1.weight": torch.zeros(1)},
            r"unexpected tensors for a MotionAdapter: mid_block\.resnets",
        ),
    ):
        layouts.write(held, tmp_path / "pia.safetensors")
        with pytest.raises(ConfigError, match=message):
            load(base=str(folder), motion_adapter=str(tmp_path / "pia.safetensors"))


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet", "motion_adapter"])
def test_a_folder_that_lacks_a_tensor_is_refused_too(folder, tmp_path, part):
    spoiled = shutil.copytree(folder, tmp_path / "spoiled")
    path = next((spoiled / part).glob("*.safetensors"))
    held = load_file(path)
    held.pop(next(name for name in sorted(held, reverse=True) if name.endswith(".bias")))
    layouts.write(held, path)

    with pytest.raises(ConfigError, match=r"missing tensors of the .*; download the folder again"):
        load(base=str(spoiled))


def test_a_folder_in_the_names_of_older_releases_loads(folder, tmp_path):
    """transformers wrote `text_model.` before its names, and diffusers called attention `query`, `key` and `value`."""
    older = shutil.copytree(folder, tmp_path / "older")
    text = older / "text_encoder" / "model.safetensors"
    plain = {name.removeprefix("text_model."): tensor for name, tensor in load_file(text).items()}
    layouts.write({f"text_model.{name}": tensor for name, tensor in plain.items()}, text)
    vae = older / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    held = {}
    for name, tensor in load_file(vae).items():
        renamed = name
        for new, old in names.items():
            renamed = renamed.replace(f".{new}.", f".{old}.")
        held[renamed] = tensor
    assert any(".query." in name for name in held)
    layouts.write(held, vae)

    assert_same_networks(load(base=str(older), scheduler=SHIPPED), load(base=str(folder), scheduler=SHIPPED))


# --- without a network ----------------------------------------------------------------------------------------------

OFFLINE = """
import sys

def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(forbid)
import torch
from pia_batch.config import ModelConfig
from pia_batch.engine import loading
from pia_batch.weights.resolve import resolve
model = ModelConfig.model_validate_json(sys.argv[1])
parts = loading.load(model, resolve(model), torch.device("cpu"), torch.float32)
print(sum(parameter.numel() for parameter in parts.unet.parameters()))
"""


@pytest.mark.long
def test_a_single_file_loads_without_asking_any_network(single, folder, tmp_path):
    """Not because a variable forbids it: HF_HUB_OFFLINE is unset, and any attempt would end the process."""
    model = ModelConfig(**(single | {"vae": single["base"]}))
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}

    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, model.model_dump_json()],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )

    assert done.returncode == 0, done.stderr
    wanted = load(base=str(folder), scheduler=SHIPPED)
    assert int(done.stdout) == sum(parameter.numel() for parameter in wanted.unet.parameters())
    assert not list(tmp_path.rglob("*.json"))


# --- the packaged configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A  Photo\nof a CAT", [320, 1125, 539, 320, 2368]),
        ("", []),
        ("hello world!", [3306, 1002, 256]),
    ],
)
def test_the_packaged_tokenizer_is_clips(text, ids):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(sd15.PATH / "tokenizer", local_files_only=True)

    assert tokenizer(text).input_ids == [49406, *ids, 49407]
    padded = tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    assert padded == [49406, *ids, *[49407] * (76 - len(ids))]


def test_the_packaged_vocabulary_is_the_published_one():
    """49,408 tokens: bytes, bytes that end a word, merges, begin, end."""
    vocabulary = json.loads((sd15.PATH / "tokenizer" / "vocab.json").read_text())
    merges = (sd15.PATH / "tokenizer" / "merges.txt").read_text().splitlines()[1:]

    assert sorted(vocabulary.values()) == list(range(49408))
    assert len(merges) == 49408 - 2 * 256 - 2
    assert ["".join(merge.split()) for merge in merges] == sorted(vocabulary, key=vocabulary.__getitem__)[512:-2]
    assert (vocabulary["!"], vocabulary["the</w>"], vocabulary["cat</w>"]) == (0, 518, 2368)
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)


@pytest.mark.parametrize(
    ("name", "count"),
    [("unet", 859_520_964), ("vae", 83_653_863), ("text_encoder", 123_060_480), ("motion_adapter", 417_163_840)],
)
def test_the_packaged_configs_have_the_parameters_of_the_published_networks(name, count):
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "motion_adapter": MotionAdapter}
    with torch.device("meta"):
        if name == "text_encoder":
            config = transformers.CLIPTextConfig.from_pretrained(sd15.PATH / name, local_files_only=True)
            network = transformers.CLIPTextModel(config)
        else:
            network = kinds[name].from_config(kinds[name].load_config(sd15.PATH / name, local_files_only=True))

    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_the_package_stays_small():
    assert sum(path.stat().st_size for path in sd15.PATH.rglob("*") if path.suffix != ".pyc") < 1_500_000
