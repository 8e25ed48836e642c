"""`weights.resolve` and `weights.identity`: finding, refusing and identifying weights, without torch or a network."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
from hubs import COMMIT, FakeHub
from safetensors.numpy import load_file, save_file

from pia_batch import tiny
from pia_batch.config import FreeUConfig, LoraConfig, ModelConfig, SchedulerConfig, TextualInversionConfig
from pia_batch.errors import ConfigError
from pia_batch.storage.object_store import Store
from pia_batch.weights import components, sd15
from pia_batch.weights.fetching import FetchedFolder
from pia_batch.weights.identity import engine_id, resolved_dtype
from pia_batch.weights.networks import shapes_of
from pia_batch.weights.resolve import resolve


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, to be spoiled."""
    return shutil.copytree(tiny.PATH, tmp_path / "base")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def identify(model: ModelConfig, dtype: str = "float32") -> str:
    return engine_id(model, resolve(model), dtype)


def test_the_embedded_model_is_a_whole_checkpoint():
    found = resolve(ModelConfig())

    assert found.base == tiny.PATH
    assert {name: part.folder for name, part in found.components.items()} == {
        name: tiny.PATH / name for name in ("scheduler", "tokenizer", "text_encoder", "unet", "vae", "motion_adapter")
    }
    assert list(found.parts()) == list(found.components.items())


def test_an_engine_id_is_32_hexadecimal_digits_and_the_same_every_time():
    first, second = identify(ModelConfig()), identify(ModelConfig())

    assert first == second
    assert len(first) == 32
    assert int(first, 16) >= 0


def test_the_same_files_elsewhere_under_another_name_have_the_same_id(base):
    assert identify(ModelConfig(base=str(base), name="moved")) == identify(ModelConfig())


def test_one_changed_byte_of_any_used_file_changes_the_id(base):
    model = ModelConfig(base=str(base))
    seen = {identify(model)}
    for part in resolve(model).components.values():
        for name in part.files:
            path = part.folder / name
            content = path.read_bytes()
            path.write_bytes(
                content[:-1] + bytes([content[-1] ^ 1]) if path.suffix == ".safetensors" else content + b" "
            )
            seen.add(identify(model))
            path.write_bytes(content)

    files = sum(len(part.files) for part in resolve(model).components.values())
    assert len(seen) == 1 + files


def test_a_file_that_is_not_used_does_not_change_the_id(base):
    before = identify(ModelConfig(base=str(base)))
    (base / "README.md").write_text("hello")
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")

    assert identify(ModelConfig(base=str(base))) == before


def test_scheduler_and_dtype_are_part_of_the_id():
    models = [
        ModelConfig(),
        ModelConfig(scheduler=SchedulerConfig(name="euler")),
        ModelConfig(scheduler=SchedulerConfig(settings={"steps_offset": 0})),
    ]

    ids = {identify(model, dtype) for model in models for dtype in ("float32", "float16")}

    assert len(ids) == 6


def test_auto_means_half_precision_on_a_gpu_and_full_precision_on_a_cpu():
    auto, fixed = ModelConfig(), ModelConfig(dtype="bfloat16")

    assert resolved_dtype(auto, on_gpu=True) == "float16"
    assert resolved_dtype(auto, on_gpu=False) == "float32"
    assert resolved_dtype(fixed, on_gpu=False) == "bfloat16"


def test_adapter_and_vae_may_come_from_folders_of_their_own(base, tmp_path):
    for part in ("motion_adapter", "vae"):
        shutil.move(base / part, tmp_path / part)
    model = ModelConfig(base=str(base), motion_adapter=str(tmp_path / "motion_adapter"), vae=str(tmp_path / "vae"))

    found = resolve(model)

    assert [found.components[part].folder for part in ("motion_adapter", "vae")] == [
        tmp_path / "motion_adapter",
        tmp_path / "vae",
    ]
    assert identify(model) == identify(ModelConfig())


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "text_encoder", "unet", "vae"])
def test_a_missing_part_is_named(base, part):
    shutil.rmtree(base / part)

    with pytest.raises(ConfigError, match=f"has no {part}/"):
        resolve(ModelConfig(base=str(base)))


def test_a_base_without_an_adapter_asks_for_one(base):
    shutil.rmtree(base / "motion_adapter")

    with pytest.raises(ConfigError, match=r"set model\.motion_adapter"):
        resolve(ModelConfig(base=str(base)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(base="/no/such/folder"), "model.base: there is no folder or file /no/such/folder"),
        (ModelConfig(motion_adapter="./nowhere"), "model.motion_adapter: there is no folder"),
        (ModelConfig(vae="nowhere"), "model.vae: there is no folder or file nowhere"),
        (ModelConfig(base=__file__), "not a .safetensors file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_not_there_is_named_with_its_key(model, message):
    with pytest.raises(ConfigError, match=message):
        resolve(model)


def test_pickled_weights_are_refused(base):
    (base / "unet" / "diffusion_pytorch_model.safetensors").rename(base / "unet" / "diffusion_pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"only diffusion_pytorch_model\.bin; pickled weights are refused"):
        resolve(ModelConfig(base=str(base)))


def test_weights_of_another_variant_only_ask_for_the_variant(base):
    plain = base / "vae" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))

    with pytest.raises(ConfigError, match=r"but diffusion_pytorch_model\.fp16\.safetensors; set"):
        resolve(ModelConfig(base=str(base)))


def test_a_variant_is_taken_where_it_is_asked_for(base):
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (base / part / f"{stem}.safetensors").rename(base / part / f"{stem}.fp16.safetensors")

    found = resolve(ModelConfig(base=str(base), variant="fp16"))

    assert found.components["text_encoder"].files == ("config.json", "model.fp16.safetensors")
    assert found.components["unet"].variant == "fp16"
    assert found.components["motion_adapter"].variant is None


STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def rename(folder: Path, *variants: str, stem: str = "diffusion_pytorch_model") -> None:
    """Give the weights of a folder names of these variants instead of the plain one."""
    for variant in variants:
        shutil.copy(folder / f"{stem}.safetensors", folder / f"{stem}.{variant}.safetensors")
    (folder / f"{stem}.safetensors").unlink()


@pytest.mark.parametrize("place", ["here", "hub", pytest.param("store", marks=pytest.mark.s3)])
@pytest.mark.parametrize("having", [("unet",), ("vae",), ("unet", "text_encoder")], ids="+".join)
def test_networks_without_the_variant_are_loaded_without_it(base, tmp_path, having, place, request, monkeypatch):
    for part in having:
        rename(base / part, "fp16", stem=STEMS[part])
    (base / "vae" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(b"another variant")
    name, hub = elsewhere(base, tmp_path, place, request, monkeypatch)

    found = resolve(ModelConfig(base=name, variant="fp16"), hub)

    for part, stem in STEMS.items():
        variant = "fp16" if part in having else None
        assert found.components[part].variant == variant
        file = f"{stem}.fp16.safetensors" if variant else f"{stem}.safetensors"
        assert found.components[part].files == ("config.json", file)


def elsewhere(
    folder: Path, tmp_path: Path, place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, FakeHub | None]:
    """Return the name of a folder, of a repository of the hub with its files, or of a prefix of a store."""
    if place == "here":
        return str(folder), None
    if place == "hub":
        return "someone/copy", FakeHub(tmp_path / "hub", copy=folder)
    monkeypatch.setenv("PIA_BATCH_CACHE", str(tmp_path / "cache"))
    uri = request.getfixturevalue("s3")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        Store(uri).create(f"copy/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"{uri}/copy", None


def test_a_variant_that_no_network_has_is_refused(base):
    with pytest.raises(ConfigError, match=r"has no text_encoder/model\.fp8\.safetensors, but model\.safetensors"):
        resolve(ModelConfig(base=str(base), variant="fp8"))


@pytest.mark.parametrize("name", ["model.gguf", "model.onnx", "flax_model.msgpack", "tf_model.h5"])
def test_weights_of_other_programs_are_named_and_not_called_pickled(base, name):
    (base / "text_encoder" / "model.safetensors").rename(base / "text_encoder" / name)

    with pytest.raises(ConfigError, match=rf"has no text_encoder/model\.safetensors, only {name}; .* in safetensors$"):
        resolve(ModelConfig(base=str(base)))


def test_weights_of_another_name_are_not_called_a_variant(base):
    (base / "text_encoder" / "model.safetensors").rename(base / "text_encoder" / "open_clip_model.safetensors")

    with pytest.raises(
        ConfigError, match=r"but open_clip_model\.safetensors; give the one to use the name model\.safe"
    ):
        resolve(ModelConfig(base=str(base)))


def test_a_link_to_a_missing_file_is_named_with_its_target(base):
    weights = base / "text_encoder" / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../../blobs/0123")

    with pytest.raises(
        ConfigError, match=r"model\.safetensors is a link to \.\./\.\./blobs/0123, which is missing; copy"
    ):
        resolve(ModelConfig(base=str(base)))
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ConfigError, match=r"model\.safetensors is no file; copy"):
        resolve(ModelConfig(base=str(base)))


@pytest.mark.parametrize("place", ["here", "hub", pytest.param("store", marks=pytest.mark.s3)])
def test_a_vae_that_has_one_variant_alone_is_loaded(base, tmp_path, place, request, monkeypatch):
    folder = shutil.copytree(base / "vae", tmp_path / "vae")
    rename(folder, "fp16")
    name, hub = elsewhere(folder, tmp_path, place, request, monkeypatch)

    vae = resolve(ModelConfig(vae=name), hub).components["vae"]

    assert vae.files == ("config.json", "diffusion_pytorch_model.fp16.safetensors")
    if place == "hub":
        assert vae.identity() == {"commit": COMMIT, "variant": "fp16"}
    shutil.copy(base / "vae" / "diffusion_pytorch_model.safetensors", folder)
    plain = resolve(ModelConfig(vae=str(folder))).components["vae"]
    assert plain.files == ("config.json", "diffusion_pytorch_model.safetensors")


def test_a_vae_of_several_variants_asks_for_the_file_of_one(base, tmp_path):
    folder = shutil.copytree(base / "vae", tmp_path / "vae")
    rename(folder, "fp16", "bf16")

    with pytest.raises(
        ConfigError, match=r"model\.vae: .* variants bf16, fp16; name the file of one, such as diffusion_"
    ):
        resolve(ModelConfig(vae=str(folder)))
    file = folder / "diffusion_pytorch_model.fp16.safetensors"
    assert resolve(ModelConfig(vae=str(file))).components["vae"].files == (file.name,)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "config.json"], {None}),
        (["model.fp16.safetensors"], {"fp16"}),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], {None}),
        (["model-00001-of-00002.fp16.safetensors"], {"fp16"}),
        (["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"], {"fp16"}),
        (["model.fp16.bin", "model.fp16.safetensors.part", "other.safetensors", "model_2.safetensors"], set()),
        (["model.fp16.safetensors", "model.non_ema.safetensors", "model.safetensors"], {"fp16", "non_ema", None}),
    ],
)
def test_the_variants_of_a_folder_are_in_the_names_of_its_weights(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()

    assert components.variants(FetchedFolder(tmp_path, None, ""), "", "model") == expected


def test_shards_are_all_needed_and_all_part_of_the_id(base):
    unet = base / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    held = load_file(unet / shards[0])
    index = {"weight_map": {name: shards[name.startswith("up")] for name in held}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    model = ModelConfig(base=str(base))

    with pytest.raises(ConfigError, match=r"missing shards: 1 of 2 \(diffusion_pytorch_model-00002-of-00002"):
        resolve(model)
    for number, shard in enumerate(shards):
        save_file({name: held[name] for name in held if name.startswith("up") == number}, unet / shard)

    assert set(shards) < set(resolve(model).components["unet"].files)
    save_file(held, unet / shards[1])
    with pytest.raises(ConfigError, match=r"tensor \S+ is in .*00001-of-00002.* and in .*00002-of-00002.*are mixed"):
        resolve(model)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "inpainting"),
        ("unet", {"in_channels": 8}, r"is the UNet of InstructPix2Pix \(8 input channels\)"),
        ("unet", {"in_channels": 3}, "not the UNet of Stable Diffusion 1.5"),
        ("unet", {"addition_embed_type": "text_time"}, "the UNet of Stable Diffusion XL"),
        ("unet", {"_class_name": "UNetMotionModel"}, "use a UNet of PIA"),
        ("motion_adapter", {"conv_in_channels": None}, "not a PIA motion adapter"),
    ],
)
def test_networks_that_pia_cannot_use_are_refused(base, part, changes, message):
    edit(base / part / "config.json", **changes)

    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(base=str(base)))


def test_a_saved_pia_pipeline_needs_no_adapter_and_takes_no_other(base):
    settings = json.loads((base / "unet" / "config.json").read_text())
    settings |= {
        "_class_name": "UNetMotionModel",
        "in_channels": 9,
        "down_block_types": ["DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"],
        "up_block_types": ["CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"],
    }
    edit(base / "unet" / "config.json", **settings)
    layouts.hollow(shapes_of("unet", settings), base / "unet" / "diffusion_pytorch_model.safetensors")

    assert "motion_adapter" not in resolve(ModelConfig(base=str(base))).components
    with pytest.raises(ConfigError, match=r"leave model\.motion_adapter out"):
        resolve(ModelConfig(base=str(base), motion_adapter=str(tiny.PATH / "motion_adapter")))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_file_is_named(base, text):
    (base / "unet" / "config.json").write_text(text)

    with pytest.raises(ConfigError, match=r"unet/config\.json"):
        resolve(ModelConfig(base=str(base)))


def test_hub_ids_are_fetched_at_their_revisions_and_identified_by_their_commits(tmp_path):
    hub = FakeHub(tmp_path, sd15=tiny.PATH, adapter=tiny.PATH / "motion_adapter", better_vae=tiny.PATH / "vae")
    model = ModelConfig(
        base="someone/sd15",
        revision="main",
        motion_adapter="else/adapter",
        motion_adapter_revision=COMMIT,
        vae="third/better_vae",
    )

    found = resolve(model, hub)

    assert hub.asked == [("someone/sd15", "main"), ("third/better_vae", None), ("else/adapter", COMMIT)]
    assert {part.commit for part in found.components.values()} == {COMMIT}
    assert found.components["vae"].identity() == {"commit": COMMIT, "variant": None}
    assert not (found.base / "vae").exists()
    assert not (found.base / "motion_adapter").exists()


def test_nothing_but_json_text_and_safetensors_is_asked_of_the_hub(tmp_path):
    hub = FakeHub(tmp_path, sd15=tiny.PATH)

    resolve(ModelConfig(base="someone/sd15"), hub)

    assert {Path(pattern).suffix for pattern in hub.patterns} == {".json", ".txt", ".safetensors"}


IN_A_FRESH_PROCESS = """
import sys
from pia_batch.config import ModelConfig
from pia_batch.errors import ConfigError
from pia_batch.weights.networks import shapes_of
from pia_batch.weights.identity import engine_id
from pia_batch.weights.resolve import resolve
model = ModelConfig(base="someone/sd15", revision="main")
print(engine_id(model, resolve(model), "float32"))
try:
    resolve(ModelConfig(base="someone/not-cached"))
except ConfigError as err:
    print(err)
print(sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""


def test_without_a_network_the_hub_cache_answers_and_torch_is_never_imported(tmp_path):
    repository = tmp_path / "hub" / "models--someone--sd15"
    shutil.copytree(tiny.PATH, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}

    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )

    identity, error, imported = done.stdout.splitlines()[0], done.stdout, done.stdout.splitlines()[-1]
    assert len(identity) == 32
    assert "cannot get someone/not-cached from the hub" in error
    assert imported == "[]"


# --- single files ---------------------------------------------------------------------------------------------------

UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
READS_TEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
POSITIONS = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"


def write(path: Path, **shapes: tuple[int, ...]) -> str:
    """A safetensors file of zeros; two underscores in a name are a dot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name.replace("__", "."): np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
    return str(path)


def checkpoint(path: Path, width: int = 768, channels: int = 4, without: str = "-", **more: tuple[int, ...]) -> str:
    """A file with some of the names that tell a Stable Diffusion 1.5 checkpoint."""
    shapes = {
        UNET_INPUT: (8, channels, 3, 3),
        READS_TEXT: (8, width),
        "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,),
    }
    return write(path, **{name: shape for name, shape in shapes.items() if not name.startswith(without)}, **more)


def adapter_file(path: Path, **shapes: tuple[int, ...]) -> str:
    """A file with some of the names that tell a PIA motion adapter."""
    known = {"conv_in__weight": (8, 9, 3, 3), "down_blocks__0__motion_modules__0__proj_in__weight": (8, 8)}
    return write(path, **(known | shapes))


def whole(path: Path, name: str, **settings: Any) -> str:
    """A file with all tensors of a network of real size."""
    config = json.loads((sd15.PATH / name / "config.json").read_text()) | settings
    return str(layouts.hollow(shapes_of(name, config), path))


@pytest.fixture
def single(tmp_path: Path) -> dict[str, str]:
    """A base and an adapter in single files, whole and of real size, but with zeros for weights."""
    return {
        "base": str(layouts.hollow_checkpoint(tmp_path / "models" / "realistic.safetensors", sd15.PATH)),
        "motion_adapter": whole(tmp_path / "adapters" / "pia.safetensors", "motion_adapter"),
    }


@pytest.fixture
def small(tmp_path: Path) -> dict[str, str]:
    """A base in a single file of the embedded model's size."""
    base = layouts.hollow_checkpoint(tmp_path / "models" / "small.safetensors", tiny.PATH)
    return {"base": str(base), "config": str(tiny.PATH), "motion_adapter": str(tiny.PATH / "motion_adapter")}


def test_a_single_file_gets_the_packages_configs_and_tokenizer(single):
    found = resolve(ModelConfig(**single))

    assert found.base == Path(single["base"])
    assert set(found.components) == {"scheduler", "tokenizer", "text_encoder", "unet", "vae", "motion_adapter"}
    for name in ("text_encoder", "unet", "vae"):
        part = found.components[name]
        assert (part.layout, part.path) == ("single_file", found.base)
        assert part.config is not None
        assert part.config.folder == sd15.PATH / name
    for name in ("scheduler", "tokenizer"):
        assert (found.components[name].layout, found.components[name].folder) == ("diffusers", sd15.PATH / name)
    adapter = found.components["motion_adapter"]
    assert (adapter.layout, adapter.path) == ("single_file", Path(single["motion_adapter"]))
    assert adapter.settings["conv_in_channels"] == 9


def test_the_id_of_a_single_file_is_that_of_its_content_and_not_of_its_name(small, tmp_path):
    before = identify(ModelConfig(**small))
    moved = shutil.copy(small["base"], tmp_path / "other.safetensors")
    assert identify(ModelConfig(**(small | {"base": str(moved)}))) == before

    content = bytearray(moved.read_bytes())
    content[-1] ^= 1
    moved.write_bytes(content)
    assert identify(ModelConfig(**(small | {"base": str(moved)}))) != before


@pytest.mark.long
def test_the_packages_configs_are_those_of_a_single_file_that_names_none(single, tmp_path):
    other = shutil.copytree(sd15.PATH, tmp_path / "configs")
    before = identify(ModelConfig(**single))
    assert before == identify(ModelConfig(**single, config=str(other)))

    merges = other / "tokenizer/merges.txt"
    merges.write_text(f"#version: 0.1\n{merges.read_text()}")
    assert identify(ModelConfig(**single, config=str(other))) != before


def test_other_configs_make_another_model_of_a_single_file(small, tmp_path):
    other = shutil.copytree(tiny.PATH, tmp_path / "configs")
    same = ModelConfig(**(small | {"config": str(other)}))
    before = identify(same)
    assert before == identify(ModelConfig(**small))

    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        content = (other / name).read_text()
        (other / name).write_text(f"{content}\n")
        assert identify(same) != before
        (other / name).write_text(content)


def test_a_single_file_may_come_from_the_hub_or_an_uri(small, tmp_path):
    hub = FakeHub(tmp_path / "hub", files=Path(small["base"]).parent)
    names = ["someone/files/small.safetensors", Path(small["base"]).as_uri()]
    models = [ModelConfig(**(small | {"base": name, "revision": "v1"})) for name in names]

    found = [resolve(model, hub) for model in models]

    assert hub.asked == [("someone/files", "v1")]
    assert found[0].components["unet"].commit == COMMIT
    assert found[0].components["unet"].identity()["commit"] == COMMIT
    assert found[0].components["unet"].identity()["file"] == "small.safetensors"
    assert found[1].components["unet"].path == Path(small["base"])


def test_configs_may_come_from_the_hub(small, tmp_path):
    hub = FakeHub(tmp_path / "hub", configs=tiny.PATH)

    found = resolve(ModelConfig(**(small | {"config": "someone/configs"})), hub)

    assert found.components["unet"].identity()["config"] == {"commit": COMMIT, "variant": None}
    assert found.components["tokenizer"].commit == COMMIT
    assert not any(pattern.endswith(".safetensors") for pattern in hub.patterns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 9}, r"realistic\.safetensors is of the wrong kind: inpainting checkpoint"),
        ({"conditioner__embedders__0__x": (1,)}, "wrong kind: Stable Diffusion XL checkpoint"),
        ({"cond_stage_model__model__ln_final__weight": (1,)}, "wrong kind: Stable Diffusion 2 checkpoint"),
        ({"width": 1024}, "takes text embeddings of 1024 dimensions, but its config says 768"),
        ({"without": "cond_stage_model."}, r"has no text encoder \(cond_stage_model"),
        ({"without": "first_stage_model."}, r"has no VAE \(first_stage_model.*set model\.vae"),
    ],
    ids=["inpainting", "xl", "sd2", "width", "text encoder", "vae"],
)
def test_a_checkpoint_of_another_family_is_refused_by_its_header(tmp_path, changes, message):
    base = checkpoint(tmp_path / "realistic.safetensors", **changes)

    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(base=base, motion_adapter=str(tiny.PATH / "motion_adapter")))


def test_a_checkpoint_without_vae_takes_another(tmp_path, single):
    bare = str(layouts.hollow_checkpoint(tmp_path / "bare.safetensors", sd15.PATH, without="first_stage_model."))

    found = resolve(ModelConfig(**(single | {"base": bare}), vae=single["base"]))

    assert found.components["vae"].path == Path(single["base"])


@pytest.mark.parametrize(
    ("key", "shapes", "message"),
    [
        ("base", {"unet__mid__lora_A__weight": (4, 8), "b": (1,)}, r"model\.base: .*LoRA; it belongs in model\.loras"),
        ("base", {"cat": (1, 768)}, r"textual inversion; it belongs in model\.textual_inversions"),
        (
            "base",
            {"conv_in__weight": (8, 4, 3, 3), "b": (1,)},
            "unknown layout; its tensor names match no supported kind",
        ),
        ("vae", {UNET_INPUT: (8, 9, 3, 3), "b": (1,)}, r"model\.vae: .*inpainting"),
        ("vae", {"encoder.conv_in.weight": (1,), "b": (1,)}, "has no decoder"),
        ("vae", {"decoder.conv_in.weight": (8, 4, 3, 3)}, "has no encoder"),
        ("vae", {UNET_INPUT: (8, 4, 3, 3), "b": (1,)}, "has no encoder and no decoder"),
        (
            "vae",
            {"encoder.conv_in.weight": (1,), "decoder.conv_in.weight": (8, 16, 3, 3)},
            r"wrong latent channels \(got 16",
        ),
        (
            "motion_adapter",
            {"first_stage_model__x": (1,), "b": (1,)},
            r"model\.motion_adapter: .*belongs in model\.vae",
        ),
    ],
)
def test_a_file_of_the_wrong_kind_is_told_where_it_belongs(tmp_path, single, key, shapes, message):
    wrong = write(tmp_path / "wrong.safetensors", **shapes)

    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(**(single | {key: wrong})))


@pytest.mark.parametrize("file", ["model.ckpt", "model.safetensors"])
def test_a_pickled_checkpoint_is_refused_whatever_its_name(tmp_path, file):
    (tmp_path / file).write_bytes(pickle.dumps({"state_dict": {}}, protocol=2) + bytes(100))

    with pytest.raises(ConfigError, match=r"is a pickle"):
        resolve(ModelConfig(base=str(tmp_path / file)))


def test_a_pickle_in_the_place_of_safetensors_in_a_folder_is_refused(base):
    (base / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(list(range(100)), protocol=4))

    with pytest.raises(ConfigError, match=r"vae/diffusion_pytorch_model\.safetensors has a safetensors name, but"):
        resolve(ModelConfig(base=str(base)))


def test_a_file_of_a_folder_that_was_cut_short_is_told_before_anything_is_loaded(base):
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ConfigError, match="was not copied in full"):
        resolve(ModelConfig(base=str(base)))


@pytest.mark.parametrize("name", ["vae", "motion_adapter"])
def test_a_config_beside_a_single_file_counts_where_it_is_of_that_network(tmp_path, single, name):
    file = Path(whole(tmp_path / "own" / "own.safetensors", name))
    shutil.copy(sd15.PATH / name / "config.json", file.with_name("config.json"))
    model = ModelConfig(**(single | {name: str(file)}))

    part = resolve(model).components[name]
    edit(file.with_name("config.json"), _class_name="ControlNetModel")
    other = resolve(model).components[name]

    assert part.config is not None
    assert other.config is not None
    assert (part.config.folder, other.config.folder) == (file.parent, sd15.PATH / name)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"conv_in__weight": (8, 4, 3, 3)},
            r"must both be 9 \(got 4\); an AnimateDiff adapter does not read the image",
        ),
        ({"conv_in__weight": (8,)}, r"must both be 9 \(got None\)"),
    ],
    ids=["channels", "a vector"],
)
def test_an_adapter_that_is_not_pias_is_refused_by_its_header(tmp_path, single, shapes, message):
    wrong = adapter_file(tmp_path / "wrong.safetensors", **shapes)

    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(**(single | {"motion_adapter": wrong})))


def test_an_adapter_without_config_has_the_frame_positions_of_its_file(tmp_path, single):
    config = json.loads((sd15.PATH / "motion_adapter" / "config.json").read_text())
    names = shapes_of("motion_adapter", config)
    held = {name: (1, 24, shape[2]) if name.endswith(".pe") else shape for name, shape in names.items()}
    file = layouts.hollow(held, tmp_path / "own" / "pia24.safetensors")
    model = ModelConfig(**(single | {"motion_adapter": str(file)}))

    found = resolve(model)
    assert (found.positions, found.components["motion_adapter"].settings["motion_max_seq_length"]) == (24, 24)

    shutil.copy(sd15.PATH / "motion_adapter" / "config.json", file.parent)
    with pytest.raises(ConfigError, match="has 24 frame positions, but its config says 32; correct motion_max_seq_len"):
        resolve(model)
    edit(file.with_name("config.json"), motion_max_seq_length=24)
    assert resolve(model).positions == 24


OTHER_ADAPTERS = {
    "HotShot-XL": (
        {"down_blocks.1.temporal_attentions.0.norm.weight": (8,), "b": (1,)},
        "wrong kind: motion modules of HotShot-XL; they are made for Stable Diffusion XL",
    ),
    "AnimateDiff-SDXL": (
        {f"down_blocks.{each}.motion_modules.0.temporal_transformer.norm.weight": (320,) for each in range(3)},
        r"not a PIA motion adapter: .*; an AnimateDiff adapter for Stable Diffusion XL does not read the image",
    ),
    "AnimateLCM": (
        {f"module.down_blocks.{each}.motion_modules.0.temporal_transformer.norm.weight": (8,) for each in range(4)},
        r"not a PIA motion adapter: .*\(got None\); an AnimateDiff adapter does not read the image",
    ),
    "SparseCtrl": (
        {
            "module.controlnet_cond_embedding.conv_in.weight": (8, 4, 3, 3),
            "module.down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (8,),
        },
        "wrong kind: ControlNet; PIA uses no ControlNet and no SparseCtrl",
    ),
    "domain adapter of v3": (
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (4, 8), "b": (1,)},
        r"wrong kind: LoRA; it belongs in model\.loras",
    ),
    "camera's motion": (
        {
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor."
            "to_q_lora.down.weight": (4, 8),
            "b": (1,),
        },
        r"wrong kind: LoRA; it belongs in model\.loras",
    ),
}


@pytest.mark.parametrize("case", OTHER_ADAPTERS)
def test_another_motion_adapter_is_named(tmp_path, single, case):
    shapes, message = OTHER_ADAPTERS[case]
    file = layouts.hollow(shapes, tmp_path / "other.safetensors")

    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(**(single | {"motion_adapter": str(file)})))


def test_an_animatediff_adapter_has_no_first_layer(tmp_path, single):
    wrong = write(tmp_path / "mm_sd_v15.safetensors", **{POSITIONS: (1, 32, 8), "b": (1,)})

    with pytest.raises(ConfigError, match=r"is not a PIA motion adapter: .*\(got None\)"):
        resolve(ModelConfig(**(single | {"motion_adapter": wrong})))


def test_an_adapter_whose_config_lies_about_its_file_is_refused(base):
    path = base / "motion_adapter" / "diffusion_pytorch_model.safetensors"
    adapter_file(path, conv_in__weight=(8, 4, 3, 3))

    with pytest.raises(ConfigError, match=r"must both be 9 \(got 4\)"):
        resolve(ModelConfig(base=str(base)))


def test_the_vae_of_another_family_is_refused(base, tmp_path):
    shutil.copytree(base / "vae", tmp_path / "sdxl-vae")
    edit(tmp_path / "sdxl-vae" / "config.json", scaling_factor=0.13025)

    with pytest.raises(ConfigError, match="the VAE of Stable Diffusion XL"):
        resolve(ModelConfig(vae=str(tmp_path / "sdxl-vae")))


def test_configs_without_a_single_file_are_an_error():
    with pytest.raises(ConfigError, match=r"model\.config applies to .* in a single file, but this model has none"):
        resolve(ModelConfig(config=str(sd15.PATH)))


def test_configs_must_be_a_folder_and_whole(single, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.config: .* is a file; name the folder"):
        resolve(ModelConfig(**single, config=single["base"]))
    (tmp_path / "configs" / "unet").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"configs has no text_encoder/config\.json"):
        resolve(ModelConfig(**single, config=str(tmp_path / "configs")))


def test_a_file_that_the_hub_does_not_have_is_named(tmp_path):
    hub = FakeHub(tmp_path / "hub", files=tmp_path)
    (tmp_path / "hub" / "files" / COMMIT).mkdir(parents=True)

    with pytest.raises(ConfigError, match=r"model\.base: there is no x\.safetensors in someone/files"):
        resolve(ModelConfig(base="someone/files/x.safetensors"), hub)


# --- pins -----------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pins_that_hold_change_nothing(base, small):
    unet = "unet/diffusion_pytorch_model.safetensors"
    pins = {unet: sha256(base / unet), "tokenizer/tokenizer.json": sha256(base / "tokenizer/tokenizer.json").upper()}
    assert identify(ModelConfig(base=str(base), sha256=pins)) == identify(ModelConfig(base=str(base)))

    pins = {Path(small["base"]).name: sha256(Path(small["base"]))}
    assert identify(ModelConfig(**small, sha256=pins)) == identify(ModelConfig(**small))


def test_a_pin_of_another_file_names_the_file_and_both_hashes(base):
    name = "vae/diffusion_pytorch_model.safetensors"

    with pytest.raises(ConfigError) as caught:
        resolve(ModelConfig(base=str(base), sha256={name: "0" * 64}))

    assert all(part in str(caught.value) for part in (name, sha256(base / name), "0" * 64))


def test_a_pin_that_pins_nothing_is_an_error_with_the_nearest_name():
    model = ModelConfig(sha256={"unet/diffusion_pytorch_model.fp16.safetensors": "0" * 64})

    with pytest.raises(ConfigError, match=r"is used; did you mean unet/diffusion_pytorch_model\.safetensors\?"):
        resolve(model)


def test_pins_hold_for_files_of_the_hub_too(tmp_path):
    hub = FakeHub(tmp_path / "hub", sd15=tiny.PATH)
    name = "unet/diffusion_pytorch_model.safetensors"

    resolve(ModelConfig(base="someone/sd15", sha256={name: sha256(tiny.PATH / name)}), hub)
    with pytest.raises(ConfigError, match="is another file"):
        resolve(ModelConfig(base="someone/sd15", sha256={name: "0" * 64}), hub)


_LORA = {"unet__conv_out__lora_A__weight": (4, 32, 3, 3), "unet__conv_out__lora_B__weight": (4, 4, 1, 1)}
_OTHER_LORA = {"unet__conv_out__lora_A__weight": (5, 32, 3, 3), "unet__conv_out__lora_B__weight": (4, 5, 1, 1)}


# --- what is laid over, in the id -----------------------------------------------------------------------------------


def test_what_is_laid_over_a_base_is_part_of_the_id(tmp_path):
    lora = LoraConfig(source=write(tmp_path / "a.safetensors", **_LORA))
    other = LoraConfig(source=write(tmp_path / "b.safetensors", **_OTHER_LORA))
    word = TextualInversionConfig(source=write(tmp_path / "c.safetensors", cat=(1, 64)))
    models = [
        ModelConfig(),
        ModelConfig(loras=(lora,)),
        ModelConfig(loras=(lora.model_copy(update={"scale": 0.5}),)),
        ModelConfig(loras=(lora,), fuse_loras=True),
        ModelConfig(loras=(lora, other)),
        ModelConfig(loras=(other, lora)),
        ModelConfig(textual_inversions=(word,)),
        ModelConfig(textual_inversions=(word.model_copy(update={"token": "<dog>"}),)),
        ModelConfig(freeu=FreeUConfig()),
        ModelConfig(freeu=FreeUConfig(b1=1.4)),
        ModelConfig(memory="low"),
    ]

    assert len({identify(model) for model in models}) == len(models)


def test_what_cannot_change_a_pixel_is_no_part_of_the_id(tmp_path):
    lora = tmp_path / "a.safetensors"
    write(lora, **_LORA)
    renamed = shutil.copy(lora, tmp_path / "renamed.safetensors")

    assert identify(ModelConfig(memory="max_speed", name="x", fuse_loras=True)) == identify(ModelConfig())
    assert identify(ModelConfig(loras=(LoraConfig(source=str(lora)),))) == identify(
        ModelConfig(loras=(LoraConfig(source=str(renamed)),))
    )
