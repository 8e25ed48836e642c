"""`pia_batch.weights`: finding, refusing and naming weights, without torch and without a network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pia_batch import tiny, weights
from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, to be spoiled."""
    return shutil.copytree(tiny.PATH, tmp_path / "base")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def identify(model: ModelConfig, dtype: str = "float32") -> str:
    return weights.engine_id(model, weights.resolve(model), dtype)


class FakeHub:
    """Serves copies of folders as snapshots of one commit; remembers what was asked for."""

    def __init__(self, cache: Path, **repositories: Path) -> None:
        self._cache = cache
        self._repositories = repositories
        self.asked: list[tuple[str, str | None]] = []
        self.patterns: list[str] = []

    def __call__(self, repo_id: str, revision: str | None, patterns: list[str]) -> Path:
        self.asked.append((repo_id, revision))
        self.patterns += patterns
        name = repo_id.partition("/")[2]
        target = self._cache / name / COMMIT
        source = self._repositories[name]
        for path in source.rglob("*"):
            inside = path.relative_to(source)
            if path.is_file() and any(inside.match(pattern) for pattern in patterns):
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / inside)
        return target


def test_the_embedded_model_is_a_whole_checkpoint():
    found = weights.resolve(ModelConfig())

    assert found.base == tiny.PATH
    assert found.motion_adapter == tiny.PATH / "motion_adapter"
    assert found.vae == tiny.PATH / "vae"
    assert set(found.components) == {
        "scheduler",
        "tokenizer",
        "text_encoder",
        "unet",
        "vae",
        "motion_adapter",
    }


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
    for part in weights.resolve(model).components.values():
        for name in part.files:
            path = part.folder / name
            content = path.read_bytes()
            path.write_bytes(content + b" ")
            seen.add(identify(model))
            path.write_bytes(content)

    files = sum(len(part.files) for part in weights.resolve(model).components.values())
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

    assert weights.resolved_dtype(auto, on_gpu=True) == "float16"
    assert weights.resolved_dtype(auto, on_gpu=False) == "float32"
    assert weights.resolved_dtype(fixed, on_gpu=False) == "bfloat16"


def test_adapter_and_vae_may_come_from_folders_of_their_own(base, tmp_path):
    for part in ("motion_adapter", "vae"):
        shutil.move(base / part, tmp_path / part)
    model = ModelConfig(base=str(base), motion_adapter=str(tmp_path / "motion_adapter"), vae=str(tmp_path / "vae"))

    found = weights.resolve(model)

    assert (found.motion_adapter, found.vae) == (tmp_path / "motion_adapter", tmp_path / "vae")
    assert identify(model) == identify(ModelConfig())


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "text_encoder", "unet", "vae"])
def test_a_missing_part_is_named(base, part):
    shutil.rmtree(base / part)

    with pytest.raises(ConfigError, match=f"has no {part}/"):
        weights.resolve(ModelConfig(base=str(base)))


def test_a_base_without_an_adapter_asks_for_one(base):
    shutil.rmtree(base / "motion_adapter")

    with pytest.raises(ConfigError, match=r"set model\.motion_adapter"):
        weights.resolve(ModelConfig(base=str(base)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(base="/no/such/folder"), "model.base: there is no folder /no/such/folder"),
        (ModelConfig(motion_adapter="./nowhere"), "model.motion_adapter: there is no folder"),
        (ModelConfig(vae="nowhere"), "model.vae: there is no folder nowhere"),
        (ModelConfig(base=__file__), "is a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_not_there_is_named_with_its_key(model, message):
    with pytest.raises(ConfigError, match=message):
        weights.resolve(model)


def test_pickled_weights_are_refused(base):
    (base / "unet" / "diffusion_pytorch_model.safetensors").rename(base / "unet" / "diffusion_pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"only diffusion_pytorch_model\.bin; pickled weights are refused"):
        weights.resolve(ModelConfig(base=str(base)))


def test_weights_of_another_variant_only_ask_for_the_variant(base):
    plain = base / "vae" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))

    with pytest.raises(ConfigError, match=r"but diffusion_pytorch_model\.fp16\.safetensors; set"):
        weights.resolve(ModelConfig(base=str(base)))


def test_a_variant_is_taken_where_it_is_asked_for(base):
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (base / part / f"{stem}.safetensors").rename(base / part / f"{stem}.fp16.safetensors")

    found = weights.resolve(ModelConfig(base=str(base), variant="fp16"))

    assert found.components["text_encoder"].files == ("config.json", "model.fp16.safetensors")
    assert found.components["unet"].variant == "fp16"
    assert found.components["motion_adapter"].variant is None


def test_shards_are_all_needed_and_all_part_of_the_id(base):
    unet = base / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    model = ModelConfig(base=str(base))

    with pytest.raises(ConfigError, match="has no unet/diffusion_pytorch_model-00002-of-00002"):
        weights.resolve(model)
    (unet / shards[1]).write_bytes(b"the second half")

    assert set(shards) < set(weights.resolve(model).components["unet"].files)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "inpainting"),
        ("unet", {"in_channels": 8}, "not the UNet of Stable Diffusion 1.5"),
        ("unet", {"addition_embed_type": "text_time"}, "not the UNet of Stable Diffusion 1.5"),
        ("unet", {"_class_name": "UNetMotionModel"}, "not PIA's UNet"),
        ("motion_adapter", {"conv_in_channels": None}, "no PIA motion adapter"),
    ],
)
def test_networks_that_pia_cannot_use_are_refused(base, part, changes, message):
    edit(base / part / "config.json", **changes)

    with pytest.raises(ConfigError, match=message):
        weights.resolve(ModelConfig(base=str(base)))


def test_a_saved_pia_pipeline_needs_no_adapter_and_takes_no_other(base):
    edit(base / "unet" / "config.json", _class_name="UNetMotionModel", in_channels=9)

    assert weights.resolve(ModelConfig(base=str(base))).motion_adapter is None
    with pytest.raises(ConfigError, match=r"leave model\.motion_adapter out"):
        weights.resolve(ModelConfig(base=str(base), motion_adapter=str(tiny.PATH / "motion_adapter")))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_file_is_named(base, text):
    (base / "unet" / "config.json").write_text(text)

    with pytest.raises(ConfigError, match=r"unet/config\.json"):
        weights.resolve(ModelConfig(base=str(base)))


def test_hub_ids_are_fetched_at_their_revisions_and_identified_by_their_commits(tmp_path):
    hub = FakeHub(tmp_path, sd15=tiny.PATH, adapter=tiny.PATH / "motion_adapter", better_vae=tiny.PATH / "vae")
    model = ModelConfig(
        base="someone/sd15",
        revision="main",
        motion_adapter="else/adapter",
        motion_adapter_revision=COMMIT,
        vae="third/better_vae",
    )

    found = weights.resolve(model, download=hub)

    assert hub.asked == [("someone/sd15", "main"), ("third/better_vae", None), ("else/adapter", COMMIT)]
    assert {part.commit for part in found.components.values()} == {COMMIT}
    assert found.components["vae"].identity() == {"commit": COMMIT, "variant": None}
    assert not (found.base / "vae").exists()
    assert not (found.base / "motion_adapter").exists()


def test_nothing_but_json_text_and_safetensors_is_asked_of_the_hub(tmp_path):
    hub = FakeHub(tmp_path, sd15=tiny.PATH)

    weights.resolve(ModelConfig(base="someone/sd15"), download=hub)

    assert {Path(pattern).suffix for pattern in hub.patterns} == {".json", ".txt", ".safetensors"}


IN_A_FRESH_PROCESS = """
import sys
from pia_batch import weights
from pia_batch.config import ModelConfig
from pia_batch.errors import ConfigError
model = ModelConfig(base="someone/sd15", revision="main")
print(weights.engine_id(model, weights.resolve(model), "float32"))
try:
    weights.resolve(ModelConfig(base="someone/not-cached"))
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
        cwd=Path(__file__).parents[1],
    )

    identity, error, imported = done.stdout.splitlines()[0], done.stdout, done.stdout.splitlines()[-1]
    assert len(identity) == 32
    assert "cannot get someone/not-cached from the hub" in error
    assert imported == "[]"
