"""`weights.scheduler_values`: settings of schedulers that `plan` accepts make a clip; it refuses the others by name."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from pia_batch import tiny
from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.driver.preflight.storage import check_weights
from pia_batch.errors import ConfigError
from pia_batch.weights import scheduler_values
from pia_batch.weights.resolve import resolve

# The class that needs torchsde cannot be built here.
CLASSES = sorted(scheduler_values._RULES.keys() - scheduler_values._NEEDS.keys())
VALUES: dict[str, tuple[Any, ...]] = {
    "algorithm_type": (
        "dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "data_prediction", "noise_prediction",
    ),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"),
    "beta_end": (0.03, 1.5),
    "final_sigmas_type": ("zero", "sigma_min", "none"),
    "interpolation_type": ("linear", "log_linear", "cubic"),
    "original_inference_steps": (25, 2000),
    "predictor_order": (0, 1, 4),
    "corrector_order": (0, 1, 4),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "solver_order": (0, 1, 3, 4),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "shift_terminal": (0.1,),
    "steps_offset": (0, 1, -1, 1000),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "timestep_type": ("discrete", "continuous", "sideways"),
    "trained_betas": ([0.001] * 1000, [0.001] * 500),
    "variance_type": ("learned", "learned_range", "fixed_small", "fixed_large", None),
}  # fmt: skip
SWITCHES = (
    "clip_sample", "euler_at_final", "lower_order_final", "predict_x0", "rescale_betas_zero_snr", "set_alpha_to_one",
    "skip_prk_steps", "thresholding", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas",
    "use_flow_sigmas", "use_karras_sigmas", "use_lu_lambdas",
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(tiny.PATH, tmp_path / "base")


@pytest.mark.parametrize("name", CLASSES)
def test_the_settings_of_each_class_are_those_of_diffusers(name):
    parameters = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "kwargs"}

    assert set(scheduler_values._RULES[name]) == parameters


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # schedulers give their own tables to numpy in a form that it deprecates
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_accepted_makes_a_finite_clip(name):
    rules = scheduler_values._RULES[name]
    kind = getattr(diffusers, name)
    ordinary = {key: value for key, value in {"beta_start": 0.00085, "beta_end": 0.012}.items() if key in rules}
    accepted = 0
    for settings in cases(rules):
        if scheduler_values._invalid(name, ordinary | settings) is None:
            assert is_finite(kind(**ordinary | settings)), settings
            accepted += 1
    assert accepted >= 2 * len(ordinary)


def cases(rules: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for key in rules:
        found += [{key: value} for value in VALUES.get(key, (True, False) if key in SWITCHES else ())]
    if "final_sigmas_type" in rules:
        found += [each | {"final_sigmas_type": "sigma_min"} for each in found if "final_sigmas_type" not in each]
    return found


def is_finite(scheduler: Any) -> bool:
    torch.manual_seed(0)
    scheduler.set_timesteps(5)
    latents = torch.randn(1, 4, 2, 2) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        scheduler.scale_model_input(latents, step)
        latents = scheduler.step(torch.randn(1, 4, 2, 2) / 10, step, latents).prev_sample
    return bool(torch.isfinite(latents).all())


PUBLISHED: tuple[dict[str, Any], ...] = (
    {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "skip_prk_steps": True, "trained_betas": None},
    {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf"), "variance_type": None},
    {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0},
    {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [], "solver_p": None, "solver_type": "bh2"},
    {"_class_name": "DEISMultistepScheduler", "solver_order": 2, "predict_epsilon": True},
)
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
@pytest.mark.parametrize("name", ["ddim", "checkpoint", "lcm"])
def test_published_configs_are_accepted(base, number, name):
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(NOISE | PUBLISHED[number]))

    resolve(ModelConfig(base=str(base), scheduler=SchedulerConfig(name=name)))


SDE = {"_class_name": "DPMSolverSDEScheduler"}
DPM = {"_class_name": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize(
    ("file", "scheduler", "message"),
    [
        ({}, {"settings": {"spacing": "trailing"}}, "DDIMScheduler has no spacing; it has .*timestep_spacing"),
        ({}, {"settings": {"timestep_spacing": "sideways"}}, "settings: DDIMScheduler: invalid timestep_spacing"),
        ({}, {"name": "euler", "settings": {"use_karras_sigmas": "yes"}}, "EulerDiscreteScheduler: invalid use_karras"),
        ({"prediction_type": "sample"}, {"name": "pndm"}, r"PNDMScheduler: invalid prediction_type \(got 'sample'"),
        (DPM | {"algorithm_type": "dpmsolver"}, {}, "algorithm_type .*with final_sigmas_type sigma_min also dpmsolver"),
        (DPM | {"use_flow_sigmas": True}, {}, r"use_flow_sigmas \(got True, expected false, as for"),
        ({"beta_schedule": "sigmoid"}, {}, "invalid beta_schedule"),
        (SDE, {}, "needs the package torchsde, .* or write DPMSolverMultistepScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {}, "is not a scheduler of Stable Diffusion 1.5"),
    ],
)  # fmt: skip
def test_what_no_engine_builds_is_refused_by_plan_and_doctor(base, monkeypatch, file, scheduler, message):
    monkeypatch.setattr(scheduler_values.importlib.util, "find_spec", lambda _: None)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | file))
    model = ModelConfig(base=str(base), scheduler=SchedulerConfig(**scheduler))

    with pytest.raises(ConfigError, match=message):
        resolve(model)
    (finding,) = check_weights({"default": model})
    assert finding.state == "fail"


ZERO = {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("file", "model", "said"),
    [
        (ZERO, {}, None),  # diffusers' arithmetic starts from the base's file
        (ZERO, {"scheduler": {"name": "checkpoint"}}, None),
        (ZERO, {"scheduler": {"name": "pndm"}}, "PNDMScheduler does not have it, and model.scheduler.name ddim does"),
        (ZERO, {"arithmetic": "original"}, "model.scheduler.settings {rescale_betas_zero_snr: true} keeps it"),
        (ZERO, {"arithmetic": "original", "scheduler": {"settings": ZERO}}, None),
        (ZERO, {"arithmetic": "original", "scheduler": {"settings": {"rescale_betas_zero_snr": False}}}, None),
        (ZERO | {"_class_name": "PNDMScheduler"}, {"scheduler": {"name": "checkpoint"}}, None),
        ({"rescale_betas_zero_snr": False}, {"arithmetic": "original"}, None),
        ({"rescale_betas_zero_snr": False}, {"scheduler": {"name": "pndm"}}, None),
    ],
)
def test_zero_snr_that_a_scheduler_leaves_out_is_told(base, file, model, said):
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | file))

    notices = resolve(ModelConfig(base=str(base), **model)).notices

    assert [said in notice for notice in notices if "zero_snr" in notice] == [True] * bool(said)
