"""Marks of a checkpoint's training, in its metadata and as tensors: the scheduler must use what it was trained for."""

from __future__ import annotations

import json
import re
from typing import Any

from pia_batch.config import ModelConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import components
from pia_batch.weights.components import Component
from pia_batch.weights.safetensors import SafetensorsHeader

_MARKS: dict[str, tuple[str, Any]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
"""Tensors without content by which trainers and ComfyUI mark a checkpoint, with the scheduler's setting and its value.

Source: comfyanonymous/ComfyUI `comfy/supported_models.py` `model_type`.
"""

_METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
"""Names of the metadata with what a checkpoint predicts, as `epsilon` or `v`.

Sources: Stability-AI/ModelSpec, whose name sd-scripts writes; comfyanonymous/ComfyUI
`comfy_extras/nodes_model_merging.py` `save_checkpoint` for the second.
"""

_CONTINUOUS = re.compile(r"edm_(mean|std)|edm_vpred\.sigma_(max|min)")
"""Names of marks of a training on continuous noise levels. Source: the same."""

_NOISE_LEVELS = re.compile(r"(.+\.)?(log_)?sigmas")

_NEUTRAL = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
_NEVER_RESCALED = {"pndm": "PNDMScheduler", "lms": "LMSDiscreteScheduler", "heun": "HeunDiscreteScheduler"}
"""Schedulers without `rescale_betas_zero_snr`. Source: diffusers 0.42.1."""

_STEPS = 1000
"""Default of `num_train_timesteps`. Source: diffusers 0.42.1, all schedulers."""


def is_mark(name: str) -> bool:
    """Return True for a tensor that belongs to no network, but says how the checkpoint was trained."""
    return name in _MARKS or any(pattern.fullmatch(name) for pattern in (_CONTINUOUS, _NOISE_LEVELS))


def continuous_mark(header: SafetensorsHeader) -> str | None:
    """Return the name of the mark of a training on continuous noise levels, or None."""
    return next(filter(_CONTINUOUS.fullmatch, header.shapes), None)


def check(model: ModelConfig, header: SafetensorsHeader, scheduler: Component) -> None:
    """Check that the scheduler reads what the checkpoint was trained to predict, on the noise that it was trained on.

    Args:
        model: Config of the model; its scheduler settings override those of the file.
        header: Header of the checkpoint, a single file.
        scheduler: Folder of `scheduler_config.json`.

    Raises:
        ConfigError: The scheduler uses another prediction type or noise; the message has the settings to set.
    """
    name = header.path.name
    file = components.read_json(scheduler.folder / "scheduler_config.json")
    used = used_by(model, scheduler)
    continuous = continuous_mark(header)
    if continuous is not None:
        raise ConfigError(
            f"model.base: {name} has the mark {continuous}: it was trained on continuous noise levels (EDM), which PIA "
            "does not use; set model.base to an ordinary checkpoint of Stable Diffusion 1.5"
        )
    steps = used.get("num_train_timesteps", _STEPS)
    for level in filter(_NOISE_LEVELS.fullmatch, header.shapes):
        if header.shapes[level] != (steps,):
            raise ConfigError(
                f"model.base: {name} was trained on other noise levels than the scheduler has ({level}: got shape "
                f"{header.shapes[level]}, expected ({steps},)); set model.base to an ordinary checkpoint"
            )
    wanted = trained_with(header)
    wrong = {key: value for key, value in wanted.items() if used[key] != value}
    if wrong:
        raise ConfigError(
            f"model.base: {name} was trained with {listed(wanted)} (by {_sources(header)}), but the scheduler uses "
            f"{listed({key: used[key] for key in wrong})}; set model.scheduler.settings to {{{listed(wrong)}}}"
        )
    chosen = model.scheduler.name
    kind = file.get("_class_name") if chosen == "checkpoint" else _NEVER_RESCALED.get(chosen)
    if wanted.get("rescale_betas_zero_snr") and kind in _NEVER_RESCALED.values():
        raise ConfigError(
            f"model.base: {name} was trained with rescale_betas_zero_snr (by {_sources(header)}), which {kind} does "
            "not have; set model.scheduler.name to ddim"
        )


def used_by(model: ModelConfig, scheduler: Component) -> dict[str, Any]:
    """Return the settings of the scheduler that a model uses: those of its file, overridden by those of the config."""
    file = components.read_json(scheduler.folder / "scheduler_config.json")
    return _NEUTRAL | {key: value for key, value in file.items() if value is not None} | dict(model.scheduler.settings)


def trained_with(header: SafetensorsHeader) -> dict[str, Any]:
    """Return the settings of a scheduler that a file names by its metadata and marks, with their values."""
    trained = next((str(header.metadata[name]).lower() for name in _METADATA if header.metadata.get(name)), "")
    wanted: dict[str, Any] = {}
    if trained[:1] in ("v", "e"):
        wanted["prediction_type"] = "v_prediction" if trained[:1] == "v" else "epsilon"
    return wanted | dict(setting for mark, setting in _MARKS.items() if mark in header.shapes)


def _sources(header: SafetensorsHeader) -> str:
    metadata = ["its metadata"] if any(map(header.metadata.get, _METADATA)) else []
    return " and ".join([*metadata, *(f"its mark {mark}" for mark in _MARKS if mark in header.shapes)])


def listed(settings: dict[str, Any]) -> str:
    """Return settings as the config has them, for a message."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return ", ".join(f"{key}: {text}" for key, text in texts.items())
