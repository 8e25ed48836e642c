"""`weights.lora_marks`: a LoRA that fits, but whose metadata or marks name another base, is named in the plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pia_batch import tiny
from pia_batch.config import LoraConfig, ModelConfig, SchedulerConfig
from pia_batch.weights.resolve import resolve

LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
EPSILON = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def notices(folder: Path, metadata: dict[str, str], mark: str | None = None, **settings: object) -> tuple[str, ...]:
    """The notices of the embedded model with a LoRA of one layer."""
    held = {
        f"{LAYER}.lora_down.weight": np.zeros((4, 64), np.float16),
        f"{LAYER}.lora_up.weight": np.zeros((64, 4), np.float16),
        **({} if mark is None else {mark: np.ones((), np.float32)}),
    }
    save_file(held, folder / "style.safetensors", metadata)
    loras = (LoraConfig(source=str(folder / "style.safetensors")),)
    scheduler = SchedulerConfig(settings={**EPSILON, **settings})
    found = resolve(ModelConfig(loras=loras, scheduler=scheduler)).notices
    assert all(each.startswith("model.loras[0]: style.safetensors") and "\n" not in each for each in found)
    return found


FAMILY = ("ss_base_model_version", "modelspec.architecture")
OTHERS = [
    "sd_v2", "sd_v2_v", "sd_v2_768_v", "sdxl_base_v1-0", "sdxl_base_v0-9", "SDXL 1.0", "SD 2.1", "SD 2.1 768", "sd3_m",
    "sd3", "flux1", "flux-1-dev/lora", "stable-diffusion-v2-768-v/lora", "stable-diffusion-v2-512/lora",
    "stable-diffusion-xl-v1-base/lora", "stable-diffusion-v3-medium/lora", "Pony", "Illustrious", "pixart-sigma",
    "stable-cascade", "lumina-2/lora", "Flux.1 D", "hunyuan-dit", "wan2.1",
]  # fmt: skip
OURS = [
    "sd_v1", "sd_v1_v", "sd_1.5", "SD 1.5", "SD 1.4", "SD 1.5 LCM", "sd_v1_inpainting", "sd-1.5-inpainting",
    "stable-diffusion-v1/lora", "stable-diffusion-v1-inpainting/lora", "stable-diffusion-v1-5", "unknown", "", "v1",
    "my own mix 2", "runwayml/stable-diffusion-v1-5", "Taiwan", "swan", "mxl", "influx", "dreamshaper_8", "Other",
]  # fmt: skip


@pytest.mark.parametrize("key", FAMILY)
@pytest.mark.parametrize("value", OTHERS)
def test_another_family_in_the_metadata_is_named_though_the_tensors_fit(tmp_path, key, value):
    (notice,) = notices(tmp_path, {key: value})
    assert f"it is for another family than Stable Diffusion 1.5 ({key}: {value})" in notice


@pytest.mark.parametrize("key", FAMILY)
@pytest.mark.parametrize("value", OURS)
def test_the_family_of_the_base_and_unknown_names_give_no_notice(tmp_path, key, value):
    assert notices(tmp_path, {key: value}) == ()


@pytest.mark.parametrize(("value", "number"), [("True", 1), ("False", 0), ("None", 0)])
def test_sd_scripts_names_stable_diffusion_2_by_a_key_of_its_own(tmp_path, value, number):
    assert len(notices(tmp_path, {"ss_v2": value})) == number


SOURCES = [
    ({"modelspec.prediction_type": "v"}, None, "prediction_type", "v_prediction"),
    ({"modelspec.prediction_type": "v_prediction"}, None, "prediction_type", "v_prediction"),
    ({"modelspec.prediction_type": "epsilon"}, None, "prediction_type", "epsilon"),
    ({"ss_v_parameterization": "True"}, None, "prediction_type", "v_prediction"),
    ({}, "v_pred", "prediction_type", "v_prediction"),
    ({"ss_zero_terminal_snr": "True"}, None, "rescale_betas_zero_snr", True),
    ({}, "ztsnr", "rescale_betas_zero_snr", True),
]


@pytest.mark.parametrize(("metadata", "mark", "setting", "value"), SOURCES)
@pytest.mark.parametrize("used", [EPSILON, V])
def test_a_training_for_another_scheduler_is_named(tmp_path, metadata, mark, setting, value, used):
    found = [each for each in notices(tmp_path, metadata, mark, **used) if "was trained with" in each]

    assert bool(found) == (used[setting] != value)
    for each in found:
        assert f"was trained with {setting}: {json.dumps(value).strip(chr(34))}, but the model's scheduler uses" in each


def test_a_scheduler_file_counts_where_the_config_sets_nothing(tmp_path):
    base = shutil.copytree(tiny.PATH, tmp_path / "base")
    lora = {f"{LAYER}.lora_down.weight": np.zeros((4, 64), np.float16), f"{LAYER}.lora_up.weight": np.zeros((64, 4))}
    save_file(lora, tmp_path / "a.safetensors", {"modelspec.prediction_type": "v"})
    path = base / "scheduler" / "scheduler_config.json"
    for kind, number in (("v_prediction", 0), ("epsilon", 1)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": kind}))
        model = ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "a.safetensors")),))
        assert len(resolve(model).notices) == number


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_training_on_continuous_noise_is_named(tmp_path, mark):
    assert f"has the mark {mark}: it was trained on continuous noise levels" in notices(tmp_path, {}, mark)[-1]
