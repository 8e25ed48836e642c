import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pia_batch.config import FORMATS, Defaults, EncodingConfig, ModelConfig, RunConfig
from pia_batch.config.layers import embedded, read_yaml
from pia_batch.errors import ConfigError
from pia_batch.schema.settings import BY_NAME

PATHS = {"manifest": "requests.parquet", "output": "out"}


def load(**overrides: Any) -> RunConfig:
    """Double underscores stand for dots."""
    return RunConfig.load(None, PATHS | {key.replace("__", "."): value for key, value in overrides.items()})


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_file_gives_its_values_and_flags_win_over_it(tmp_path: Path) -> None:
    path = written(tmp_path, PATHS | {"placement": {"batch_size": 4, "num_cpus": 2}, "defaults": {"fps": 12}})

    config = RunConfig.load(path, {"placement.batch_size": 8, "output": "elsewhere"})

    assert (config.placement.batch_size, config.placement.num_cpus, config.defaults.fps) == (8, 2, 12)
    assert (config.manifest, config.output) == ("requests.parquet", "elsewhere")


def test_the_embedded_model_brings_its_defaults_under_what_the_operator_wrote() -> None:
    own = embedded()

    config = load(defaults__num_frames=5)

    assert config.defaults.num_frames == 5
    assert config.defaults.width == own["defaults"]["width"] != Defaults().width
    assert config.model.scheduler.name == own["model"]["scheduler"]["name"]


def test_a_key_of_a_section_leaves_the_embedded_defaults_of_its_other_keys(tmp_path: Path) -> None:
    config = RunConfig.load(written(tmp_path, PATHS | {"model": {"dtype": "float32"}, "defaults": {"eta": 0.5}}))

    assert config.model.scheduler.name == embedded()["model"]["scheduler"]["name"]
    assert (config.defaults.eta, config.defaults.height) == (0.5, embedded()["defaults"]["height"])


def test_another_model_does_not_get_the_embedded_defaults() -> None:
    config = load(model__base="some/model")

    assert config.defaults == Defaults()
    assert config.model.scheduler.name == "ddim"


def test_the_defaults_of_the_embedded_model_are_not_changed_by_a_load() -> None:
    before = embedded()

    load(defaults__width=128, model__scheduler__name="pndm")

    assert embedded() == before
    assert load().defaults.width == before["defaults"]["width"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("defaults.num_frame", "defaults.num_frames"),
        ("placement.batchsize", "placement.batch_size"),
        ("manifset", "manifest"),
        ("model.schedular", "model.scheduler"),
        ("model.scheduler.nam", "model.scheduler.name"),
        ("encoding.mp4_cfr", "encoding.mp4_crf"),
        ("limits.max_fail", "limits.max_failed"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_known_one(key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: unknown key; did you mean '{hint}'\?"):
        RunConfig.load(None, PATHS | {key: 1})


def test_an_unknown_key_like_no_other_is_an_error_without_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"zzzzqqqq: unknown key$"):
        load(zzzzqqqq=1)


def test_every_mistake_of_a_config_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(None, {"manifest": "m", "defaults.width": 7, "placement.batch_size": 0, "nope": 1})

    for part in ("output: required", "defaults.width", "placement.batch_size", "nope: unknown key"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("defaults.motion_scale", 9, "less than or equal to 8"),
        ("defaults.motion_scale", 1.5, "whole number"),
        ("defaults.motion_curve", [0.5, 1.5], "less than or equal to 1"),
        ("defaults.motion_curve", [], "at least 1 item"),
        ("defaults.guidance_scale", float("nan"), "finite number"),
        ("defaults.guidance_scale", -1, "greater than or equal to 0"),
        ("defaults.strength", 0, "greater than 0"),
        ("defaults.num_inference_steps", 1001, "less than or equal to 1000"),
        ("defaults.num_frames", 1025, "less than or equal to 1024"),
        ("defaults.width", 100, "multiple of 8"),
        ("defaults.height", 0, "greater than or equal to 8"),
        ("defaults.clip_skip", 12, "less than or equal to 11"),
        ("defaults.fps", 61, "less than or equal to 60"),
        ("defaults.format", "avi", "'mp4', 'gif', 'webp', 'png_zip' or 'webm'"),
        ("model.dtype", "int8", "'float16'"),
        ("model.name", "", "at least 1 character"),
        ("model.scheduler.name", "magic", "'ddim'"),
        ("images.background", "red", "a colour such as '#ff8000'"),
        ("images.fit", "zoom", "'cover'"),
        ("encoding.mp4_crf", 52, "less than or equal to 51"),
        ("placement.num_gpus", 2, "less than or equal to 1"),
        ("placement.batch_size", 0, "greater than or equal to 1"),
        ("limits.lease_ttl_s", 1, "greater than or equal to 3"),
        ("defaults", 3, "a section"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_itself_and_what_is_allowed(
    key: str, value: Any, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(None, PATHS | {key: value})

    message = str(caught.value)
    assert message.startswith(f"command line: {key}")
    assert remedy in message
    assert f"got {value[1] if value == [0.5, 1.5] else value!r}" in message


def test_fewer_actors_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"placement.*: .*max_engines 2 is below min_engines 3"):
        load(placement__min_engines=3, placement__max_engines=2)


def test_a_minimum_out_of_range_is_told_without_a_word_about_the_maximum() -> None:
    with pytest.raises(ConfigError, match=r"placement.min_engines: [^;]*$"):
        load(placement__min_engines=0, placement__max_engines=2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("manifest: [a", "cannot read config"),
        ("manifest: \x01", "cannot read config"),
        ("!!python/object/apply:os.getcwd []", "cannot read config"),
        ("- a\n- b\n", "must be a mapping of keys to values, not list"),
        ("just words", "must be a mapping of keys to values, not str"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_by_name(tmp_path: Path, content: str, reason: str) -> None:
    path = written(tmp_path, content)

    with pytest.raises(ConfigError, match=reason) as caught:
        RunConfig.load(path)

    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(ConfigError, match=f"cannot read config {tmp_path / name}"):
            RunConfig.load(tmp_path / name)


def test_a_mistake_in_a_file_is_told_with_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, PATHS | {"defaults": {"fps": 0}})

    with pytest.raises(ConfigError, match=f"{path}: defaults.fps: "):
        RunConfig.load(path)


def test_an_empty_file_leaves_everything_to_the_flags(tmp_path: Path) -> None:
    assert RunConfig.load(written(tmp_path, ""), PATHS) == load()


def test_an_empty_section_counts_as_not_written(tmp_path: Path) -> None:
    config = RunConfig.load(written(tmp_path, "manifest: m\noutput: o\ndefaults:\nmodel:\n"))

    assert config.defaults == load().defaults
    assert config.model == load().model


def test_a_flag_may_reach_into_a_section_that_the_file_left_empty(tmp_path: Path) -> None:
    path = written(tmp_path, "manifest: m\noutput: o\ndefaults:\n")

    assert RunConfig.load(path, {"defaults.fps": 12}).defaults.fps == 12


def test_a_key_below_a_value_cannot_be_set() -> None:
    with pytest.raises(ConfigError, match=r"cannot set manifest\.x: manifest is a value, not a section"):
        RunConfig.load(None, PATHS | {"manifest.x": 1})


def test_nothing_in_a_config_can_be_changed() -> None:
    config = load()
    for section, name in ((config, "output"), (config.defaults, "fps"), (config.model.scheduler, "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))


def test_a_config_survives_its_own_dump() -> None:
    config = load(defaults__motion_curve=[1, 0.5], model__scheduler__settings={"clip_sample": False, "x": 0.5})

    assert RunConfig.model_validate(config.model_dump()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_identity_of_a_format_moves_with_its_own_settings_only(file_format: str) -> None:
    changed = {
        "mp4_crf": 18,
        "mp4_preset": "slow",
        "av1_crf": 30,
        "av1_preset": 5,
        "webm_crf": 30,
        "webm_lossless": True,
        "webm_speed": 2,
        "gif_dither": True,
        "webp_quality": 80,
        "webp_lossless": True,
        "webp_method": 4,
        "provenance": False,
    }
    assert set(changed) == set(EncodingConfig.model_fields)
    for name, value in changed.items():
        for codec in ("h264", "av1") if file_format == "mp4" else (None,):
            own = "av1" if codec == "av1" else file_format
            same = EncodingConfig(**{name: value}).identity(file_format, codec) == EncodingConfig().identity(
                file_format, codec
            )
            assert same == (not name.startswith((own, "provenance"))), (name, codec)


def test_every_number_that_a_row_may_set_has_a_range() -> None:
    unbounded = [BY_NAME[name] for name, item in Defaults.model_fields.items() if not item.metadata]
    free = {item.name for item in unbounded if not item.choices and item.data_type != pa.bool_()}

    assert free == {"negative_prompt", "lora_scales"}  # texts, and names with scales: their own checks limit them


def test_an_entry_of_models_takes_from_model_what_it_leaves_out() -> None:
    config = RunConfig.load(
        None,
        PATHS
        | {
            "model.base": "photos/base",
            "model.revision": "abc",
            "model.vae": "better/vae",
            "model.scheduler.name": "euler",
            "models.toon.base": "toon/base",
            "models.lora": None,
            "models.tiny.base": "embedded",
            "models.lora.loras": [{"source": "style.safetensors", "scale": 0.5}],
        },
    )

    toon, lora, tiny = (config.models[name] for name in ("toon", "lora", "tiny"))
    assert list(config.all_models) == ["default", "toon", "lora", "tiny"]
    assert [model.name for model in config.all_models.values()] == list(config.all_models)
    assert (toon.base, toon.revision, toon.vae, toon.scheduler.name) == ("toon/base", None, "better/vae", "euler")
    assert (lora.base, lora.revision, lora.loras[0].scale) == ("photos/base", "abc", 0.5)
    assert (tiny.base, tiny.scheduler.name) == ("embedded", "checkpoint")


def test_models_made_in_python_get_their_names() -> None:
    given = {"toon": ModelConfig(base="toon/base")}

    assert RunConfig(manifest="m", output="o", models=given).models["toon"].name == "toon"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"default": {}}, "models.default: this is the name of `model` too"),
        ({"toon": {"bsae": "x"}}, r"models.toon.bsae: unknown key"),
        ({"toon": "x"}, "models.toon"),
        (["toon"], "models"),
    ],
)
def test_models_that_cannot_be_are_refused(models: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(None, PATHS | {"models": models})


@given(st.lists(st.sampled_from(["manifest", "output", "run_id"]), min_size=1, max_size=5))
def test_a_key_that_stands_twice_is_refused_with_both_of_its_lines(keys: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text("".join(f"{key}: v{line}\n" for line, key in enumerate(keys, start=1)))
        if len(set(keys)) == len(keys):
            assert read_yaml(path) == {key: f"v{line}" for line, key in enumerate(keys, start=1)}
            return
        again = next(line for line, key in enumerate(keys, start=1) if key in keys[: line - 1])
        first = keys.index(keys[again - 1]) + 1

        told = f"line {again}, column 1: the key '{keys[again - 1]}' is in line {first} already"
        with pytest.raises(ConfigError, match=told):
            read_yaml(path)


def test_a_section_may_take_over_another_and_change_what_it_took(tmp_path: Path) -> None:
    text = """
    manifest: requests.parquet
    output: out
    model: &photo {name: photo, dtype: float32, speed: balanced}
    models:
      toon: {<<: *photo, speed: fast, name: toon}
    """
    loaded = RunConfig.load(written(tmp_path, text))

    assert (loaded.models["toon"].dtype, loaded.models["toon"].speed) == ("float32", "fast")
