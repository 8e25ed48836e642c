"""`preset`: names for sets of keys, below what the config writes itself."""

from __future__ import annotations

import pytest

from pia_batch.config import ModelConfig, RunConfig
from pia_batch.config.arithmetic import NEGATIVE_PROMPT
from pia_batch.config.presets import PRESETS
from pia_batch.errors import ConfigError

PATHS = {"manifest": "m.parquet", "output": "out", "model.base": "some/model"}


def config(**written: object) -> RunConfig:
    return RunConfig.load(None, PATHS | {name.replace("__", "."): value for name, value in written.items()})


def test_paper_is_the_authors_script_in_one_word():
    found = config(preset="paper")

    assert found.preset == ("paper",)
    model, defaults = found.model, found.defaults
    assert (model.arithmetic, model.vae_dtype, model.vae_decode) == ("original", "bfloat16", "per_frame")
    assert (model.scheduler.name, model.scheduler.settings) == ("ddim", {})
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.num_frames) == (25, 7.5, 16)
    assert (defaults.size, defaults.long_side, defaults.format, defaults.fps) == ("auto", 512, "gif", 8)
    assert defaults.negative_prompt == NEGATIVE_PROMPT["original"]


def test_what_is_written_wins_over_a_preset():
    found = config(preset="paper", model__vae_dtype="float32", defaults__format="mp4", defaults__negative_prompt="")

    assert (found.model.vae_dtype, found.model.arithmetic) == ("float32", "original")
    assert (found.defaults.format, found.defaults.size, found.defaults.negative_prompt) == ("mp4", "auto", "")


def test_presets_add_up_and_each_stands_alone():
    both = config(preset=["per_frame_vae", "bf16_vae"])

    assert (both.model.arithmetic, both.model.vae_dtype, both.model.vae_decode) == (
        "diffusers",
        "bfloat16",
        "per_frame",
    )
    assert config(preset="paper_negative_prompt").defaults.negative_prompt == NEGATIVE_PROMPT["original"]
    assert config().defaults.negative_prompt is None


def test_objects_of_sections_keep_what_was_set_in_them():
    model = ModelConfig(base="some/model", vae_decode="chunks")
    found = RunConfig(manifest="m.parquet", output="out", model=model, preset=("paper",))

    assert (found.model.arithmetic, found.model.vae_decode, found.model.base) == ("original", "chunks", "some/model")
    assert RunConfig.model_validate(found.model_dump()) == found


def test_the_embedded_model_keeps_its_own_size_steps_and_scheduler():
    found = RunConfig.load(None, {"manifest": "m.parquet", "output": "out", "preset": "paper"})

    assert (found.defaults.size, found.defaults.width, found.defaults.num_inference_steps) == ("fixed", 64, 4)
    assert (found.model.arithmetic, found.model.scheduler.name) == ("original", "checkpoint")


def test_entries_of_models_take_the_preset_from_model():
    found = config(preset="paper", models__toon__base="toon/base", models__plain__arithmetic="diffusers")

    assert found.original_models == {"default", "toon"}


def test_an_unknown_preset_is_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match="preset") as refusal:
        config(preset="papers")

    assert all(name in str(refusal.value) for name in PRESETS)
