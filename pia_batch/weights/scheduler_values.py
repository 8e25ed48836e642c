"""Settings of schedulers: those that each class of diffusers has, and the values with which it makes a clip. No torch.

Sources: diffusers 0.42.1 `schedulers`: `__init__` of each class, and the branches of `step` that raise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.config.arithmetic import Arithmetic
from pia_batch.errors import ConfigError
from pia_batch.weights import components
from pia_batch.weights.components import Component
from pia_batch.weights.config_values import COUNT, POSITIVE, WHOLE, YES_OR_NO, Rule, is_count, is_number, one_of

FILE = "scheduler_config.json"

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
"""Classes of diffusers by their names in `model.scheduler.name`."""

TRAINED: dict[str, Any] = {"beta_schedule": "linear", "clip_sample": False}
"""Noise schedule of PIA, which replaces that of Stable Diffusion bases.

Source: open-mmlab/PIA `example/config/base.yaml`.
"""

ORIGINAL: dict[str, Any] = TRAINED | {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": True,
}
"""Scheduler of the original: these arguments, and diffusers' own defaults for all others.

Source: open-mmlab/PIA `example/config/base.yaml`, and `i2v_pipeline.py` `build_pipeline`.
"""

KEPT_BY_ORIGINAL = ("prediction_type", "num_train_timesteps")
"""Settings of the base's file that count with the arithmetic of the original."""

_MIN_STEPS = 10
_STEPS = 1000


def check(model: ModelConfig, scheduler: Component) -> None:
    """Check the scheduler in a base's folder, and the one that the config makes of it.

    Args:
        model: Config of the model.
        scheduler: Folder of `scheduler_config.json`.

    Raises:
        ConfigError: The scheduler is none of Stable Diffusion 1.5, or has a setting that it cannot be built with.
    """
    path = scheduler.folder / FILE
    file = components.read_json(path)
    shipped = str(file.get("_class_name"))
    if shipped not in _RULES:
        raise ConfigError(
            f"{path}: {shipped} is not a scheduler of Stable Diffusion 1.5; use its folder of that family"
        )
    if shipped in _NEEDS and importlib.util.find_spec(_NEEDS[shipped]) is None:
        raise ConfigError(
            f"{path}: {shipped} needs the package {_NEEDS[shipped]}, which is not installed; install it on every "
            "machine, or write DPMSolverMultistepScheduler as _class_name"
        )
    found = _invalid(shipped, file)
    if found is not None:
        raise ConfigError(f"{path}: invalid {found}; correct it, or fetch the file again")
    _check_chosen(model, shipped, file, str(path))


def _check_chosen(model: ModelConfig, shipped: str, file: Mapping[str, Any], path: str) -> None:
    made = recipe(model.scheduler, model.arithmetic, shipped, file)
    found = _invalid(made.name, made.start | made.overrides)
    if found is not None:
        where = "model.scheduler.settings" if found.split(" ", 1)[0] in model.scheduler.settings else path
        raise ConfigError(f"{where}: {made.name}: invalid {found}; set another value in model.scheduler.settings")


def notices(model: ModelConfig, scheduler: Component) -> Iterator[str]:
    """Yield a sentence if the base was trained with zero SNR and the scheduler that the config makes leaves that out.

    It is no error: clips that are finished with such a config would be refused.
    """
    path = scheduler.folder / FILE
    file = components.read_json(path)
    shipped = str(file["_class_name"])
    made = recipe(model.scheduler, model.arithmetic, shipped, file)
    known = _RULES[made.name].keys()
    if not file.get(_ZERO) or _ZERO in (made.start | made.overrides).keys() & known:
        return
    if made.name == shipped and _ZERO not in known:
        return  # the base's own scheduler, which has never read it
    if _ZERO in known:
        remedy = f"model.scheduler.settings {{{_ZERO}: true}} keeps it"
    else:
        remedy = f"{made.name} does not have it, and model.scheduler.name ddim does"
    yield f"{path}: the base was trained with {_ZERO}, which the scheduler leaves out; {remedy}"


@dataclass(frozen=True)
class Recipe:
    """Class and settings of a scheduler.

    Attributes:
        name: Class of diffusers.
        start: Config from which it takes what it knows.
        overrides: Arguments that replace those of `start`.
    """

    name: str
    start: dict[str, Any]
    overrides: dict[str, Any]


def recipe(config: SchedulerConfig, calculates: Arithmetic, shipped: str, settings: Mapping[str, Any]) -> Recipe:
    """Return what the scheduler that the config names is built from, with the noise schedule that PIA was trained on.

    `checkpoint` is the shipped scheduler itself. Any other starts from the shipped scheduler's config, with a linear
    beta schedule and without clipping of samples. With the arithmetic of the original it starts from the defaults of
    diffusers and the original's arguments; the shipped config then decides only what the UNet predicts. The config's
    own settings override all of these.

    Args:
        config: Config of the scheduler.
        calculates: Implementation of PIA whose defaults it has.
        shipped: Class of the scheduler that the base has.
        settings: Config of that scheduler.

    Raises:
        ConfigError: The scheduler does not have one of the config's settings.
    """
    name, start, trained = shipped, dict(settings), dict[str, Any]()
    if config.name != "checkpoint":
        name, trained = CLASSES[config.name], TRAINED
        if calculates == "original":
            start, trained = {key: start[key] for key in KEPT_BY_ORIGINAL if key in start}, ORIGINAL
    rules = _RULES[name]
    unknown = sorted(config.settings.keys() - rules.keys())
    if unknown:
        known = ", ".join(sorted(rules))
        raise ConfigError(f"model.scheduler.settings: {name} has no {', '.join(unknown)}; it has {known}")
    overrides = {key: value for key, value in trained.items() if key in rules} | config.settings
    return Recipe(name, start, overrides)


def _invalid(name: str, settings: Mapping[str, Any]) -> str | None:
    """Return the first setting with a value that a class cannot be built with, and what it must be; None if all can."""
    for key, rule in _RULES[name].items():
        value = settings.get(key)
        if key not in settings or (value is None and rule.nullable):
            continue
        if value is None or not rule.accepts(value, settings):
            return f"{key} (got {value!r}, expected {rule.expected})"
    return None


_NEEDS = {"DPMSolverSDEScheduler": "torchsde"}
"""Packages without which a class cannot be built."""


def _are_betas(value: Any, settings: Mapping[str, Any]) -> bool:
    steps = settings.get("num_train_timesteps", _STEPS)
    return isinstance(value, list) and len(value) == steps and all(map(is_number, value))


def _is_only_one(_: Any, settings: Mapping[str, Any]) -> bool:
    values = [settings.get(key, False) for key in _SIGMAS]
    return all(isinstance(value, bool) for value in values) and sum(values) <= 1


def _ends_above_zero(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("final_sigmas_type", "zero") == "sigma_min")


def _solver(*kinds: str, above_zero: tuple[str, ...] = ()) -> Rule:
    """Return the rule for values of which some need a last step that ends above a noise of zero."""
    more = f"; with final_sigmas_type sigma_min also {', '.join(above_zero)}" if above_zero else ""
    return Rule(
        f"one of {', '.join(kinds)}{more}",
        lambda value, settings: value in kinds or (value in above_zero and _ends_above_zero(settings)),
    )


def _from_one_to(most: int) -> Rule:
    return Rule(f"a whole number from 1 to {most}", lambda value, _: is_count(value) and value <= most)


_FRACTION = Rule("a number above 0 and below 1", lambda value, _: is_number(value) and 0 < value < 1)
_FALSE = Rule("false, as for Stable Diffusion 1.5", lambda value, _: value is False)
_TRUE_TO_ZERO = Rule(
    "true, or false with final_sigmas_type sigma_min",
    lambda value, settings: value is True or (value is False and _ends_above_zero(settings)),
)
_NULL = Rule("null", lambda *_: False, nullable=True)
_SIGMA = Rule("null or a number above 0", POSITIVE.accepts, nullable=True)
_ANY = Rule("any number", lambda value, _: isinstance(value, int | float) and not isinstance(value, bool))
_FIXED = ("fixed_small", "fixed_small_log", "fixed_large")
_VARIANCE = Rule("null, as the UNet predicts no variance", lambda value, _: value in _FIXED, nullable=True)
_SIGMAS = dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    Rule("true for one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas at most", _is_only_one),
)
_EVERY_SCHEDULE = ("linear", "scaled_linear", "squaredcos_cap_v2")
_NOISE = {
    "num_train_timesteps": Rule(
        f"a whole number from {_MIN_STEPS}", lambda value, _: is_count(value) and value >= _MIN_STEPS
    ),
    "beta_start": _FRACTION,
    "beta_end": _FRACTION,
    "beta_schedule": one_of(*_EVERY_SCHEDULE),
    "trained_betas": Rule("null or a list of num_train_timesteps numbers", _are_betas, nullable=True),
}
_OFFSET = Rule(
    "a whole number below a tenth of num_train_timesteps",
    lambda value, settings: (
        WHOLE.accepts(value, settings) and abs(value) < settings.get("num_train_timesteps", _STEPS) / _MIN_STEPS
    ),
)
_PREDICTION = {"prediction_type": one_of("epsilon", "v_prediction", "sample")}
_NOT_SAMPLE = {"prediction_type": one_of("epsilon", "v_prediction")}
_SPACING = {"timestep_spacing": one_of("leading", "linspace", "trailing"), "steps_offset": _OFFSET}
_SPACED = _PREDICTION | _SPACING
_CLIPPED = {"clip_sample": YES_OR_NO, "clip_sample_range": POSITIVE}
_THRESHOLD = {"thresholding": YES_OR_NO, "dynamic_thresholding_ratio": _FRACTION, "sample_max_value": POSITIVE}
_ZERO = "rescale_betas_zero_snr"
"""Setting of bases that were trained up to noise without a signal; without it their clips have another brightness."""

_ZERO_SNR = {_ZERO: YES_OR_NO}
_FLOW = {"use_flow_sigmas": _FALSE, "flow_shift": POSITIVE}
_SHIFTED = _FLOW | {"use_dynamic_shifting": _FALSE, "time_shift_type": one_of("exponential", "linear")}
_ORDER = {"solver_order": _from_one_to(3), "lower_order_final": YES_OR_NO}
_LAST = {"final_sigmas_type": one_of("zero", "sigma_min")}
_SOLVER = (
    _NOISE
    | _THRESHOLD
    | _SIGMAS
    | _ORDER
    | _LAST
    | _SHIFTED
    | {"solver_type": one_of("midpoint", "heun", "logrho", "bh1", "bh2"), "lambda_min_clipped": _ANY}
    | {"variance_type": _VARIANCE}
)
_ALPHA = {"set_alpha_to_one": YES_OR_NO}
_DDPM = (
    _NOISE
    | _SPACED
    | _CLIPPED
    | _THRESHOLD
    | _ZERO_SNR
    | {
        "beta_schedule": one_of(*_EVERY_SCHEDULE, "sigmoid", "laplace"),
        "variance_type": one_of(*_FIXED),
    }
)
_DDIM = _NOISE | _SPACED | _CLIPPED | _THRESHOLD | _ZERO_SNR | _ALPHA
_DISTILLED = _DDIM | {
    "original_inference_steps": Rule(
        "a whole number from 1 to num_train_timesteps",
        lambda value, settings: is_count(value) and value <= settings.get("num_train_timesteps", _STEPS),
    ),
    "timestep_scaling": POSITIVE,
    "rescale_betas_zero_snr": Rule(
        "false, or true with prediction_type v_prediction",
        lambda value, settings: (
            value is False or (value is True and settings.get("prediction_type", "epsilon") != "epsilon")
        ),
    ),
}
_KDPM2 = _NOISE | _NOT_SAMPLE | _SPACING | _SIGMAS

_RULES: dict[str, dict[str, Rule]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DEISMultistepScheduler": {
        key: rule
        for key, rule in (_SOLVER | _SPACED).items()
        if key not in ("final_sigmas_type", "lambda_min_clipped", "variance_type")
    }
    | {"algorithm_type": one_of("deis", "dpmsolver", "dpmsolver++")},
    "DPMSolverMultistepScheduler": _SOLVER
    | _SPACED
    | _ZERO_SNR
    | {
        "algorithm_type": _solver("dpmsolver++", "sde-dpmsolver++", above_zero=("dpmsolver", "sde-dpmsolver", "deis")),
        "euler_at_final": YES_OR_NO,
        "use_lu_lambdas": YES_OR_NO,
    },
    "DPMSolverSDEScheduler": _KDPM2
    | {"noise_sampler_seed": Rule("null or a whole number", WHOLE.accepts, nullable=True)},
    "DPMSolverSinglestepScheduler": _SOLVER
    | _PREDICTION
    | {"algorithm_type": _solver("dpmsolver++", "sde-dpmsolver++", above_zero=("dpmsolver", "deis"))},
    "EulerAncestralDiscreteScheduler": _NOISE | _NOT_SAMPLE | _SPACING | _ZERO_SNR,
    "EulerDiscreteScheduler": _NOISE
    | _SPACED
    | _SIGMAS
    | _ZERO_SNR
    | _LAST
    | {
        "interpolation_type": one_of("linear", "log_linear"),
        "sigma_min": _SIGMA,
        "sigma_max": _SIGMA,
        "timestep_type": one_of("discrete", "continuous"),
    },
    "HeunDiscreteScheduler": _NOISE
    | _SPACED
    | _SIGMAS
    | _CLIPPED
    | {"beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2", "exp")},
    "IPNDMScheduler": {"num_train_timesteps": _NOISE["num_train_timesteps"], "trained_betas": _NULL},
    "KDPM2AncestralDiscreteScheduler": _KDPM2 | {"beta_schedule": one_of("linear", "scaled_linear")},
    "KDPM2DiscreteScheduler": _KDPM2,
    "LCMScheduler": _DISTILLED,
    "LMSDiscreteScheduler": _NOISE | _SPACED | _SIGMAS,
    "PNDMScheduler": _NOISE | _NOT_SAMPLE | _SPACING | _ALPHA | {"skip_prk_steps": YES_OR_NO},
    "SASolverScheduler": _NOISE
    | _SPACED
    | _THRESHOLD
    | _SIGMAS
    | _FLOW
    | {
        "predictor_order": _from_one_to(4),
        "corrector_order": _from_one_to(4),
        "tau_func": _NULL,
        "algorithm_type": one_of("data_prediction", "noise_prediction"),
        "lower_order_final": YES_OR_NO,
        "lambda_min_clipped": _ANY,
        "variance_type": _VARIANCE,
    },
    "TCDScheduler": _DISTILLED,
    "UniPCMultistepScheduler": {
        key: rule
        for key, rule in (_SOLVER | _SPACED | _ZERO_SNR).items()
        if key not in ("lambda_min_clipped", "variance_type")
    }
    | {
        "lower_order_final": _TRUE_TO_ZERO,
        "predict_x0": _TRUE_TO_ZERO,
        "solver_type": _solver("bh2", "midpoint", "heun", "logrho", above_zero=("bh1",)),
        "solver_order": COUNT,
        "disable_corrector": Rule("a list of whole numbers", lambda value, _: isinstance(value, list)),
        "solver_p": _NULL,
        "sigma_min": _SIGMA,
        "sigma_max": _SIGMA,
        "shift_terminal": _NULL,
    },
}
"""Settings of each class with the values that it makes a clip with."""
