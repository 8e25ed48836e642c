"""Marks of a LoRA's training: a sentence for each that does not fit the base, though the LoRA's tensors do.

Metadata may be wrong, for instance after a merge, and shapes say more than words. So the plan only warns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pia_batch.config import ModelConfig
from pia_batch.errors import printable
from pia_batch.weights import checkpoint_marks
from pia_batch.weights.components import Component
from pia_batch.weights.safetensors import SafetensorsHeader

_FAMILY = ("ss_base_model_version", "modelspec.architecture", "architecture", "base_model", "baseModel")
"""Names of the metadata with the family of the base. Sources: kohya-ss/sd-scripts, Stability-AI/ModelSpec."""

_OTHER_FAMILY = re.compile(
    r"sd ?xl|(^|[^a-z])xl([^a-z]|$)|(stable diffusion|sd) ?v? ?[23]|(^| )(flux|pony|illustrious|stable "
    r"(cascade|video)|svd|pix ?art|playground|kolors|hunyuan|lumina|chroma|qwen|aura ?flow|wan|cogvideo|ltx)"
)
"""Families other than Stable Diffusion 1, in lower case with spaces for dashes and underscores."""

_MOST_SHOWN = 80

_TRAINING = {
    "ss_v_parameterization": ("prediction_type", "v_prediction"),
    "ss_zero_terminal_snr": ("rescale_betas_zero_snr", True),
}
"""Names of metadata that are `True` for a scheduler's setting. Source: kohya-ss/sd-scripts `train_network.py`."""


def notices(model: ModelConfig, header: SafetensorsHeader, scheduler: Component, where: str) -> Iterator[str]:
    """Yield a sentence for each mark of a LoRA that contradicts the base or its scheduler.

    Args:
        model: Config of the model; its scheduler settings override those of the file.
        header: Header of the LoRA.
        scheduler: Folder of `scheduler_config.json`.
        where: Key of the config and name of the file.
    """
    family = _other_family(header)
    if family is not None:
        yield (
            f"{where}: its metadata says that it is for another family than Stable Diffusion 1.5 ({family}), though "
            "its tensors fit the base; compare a clip without it, or use a LoRA for Stable Diffusion 1.5"
        )
    continuous = checkpoint_marks.continuous_mark(header)
    if continuous is not None:
        yield (
            f"{where} has the mark {continuous}: it was trained on continuous noise levels (EDM), which PIA does not "
            "use; compare a clip without it, or use another LoRA"
        )
    trained = checkpoint_marks.trained_with(header)
    trained |= dict(setting for key, setting in _TRAINING.items() if header.metadata.get(key) == "True")
    used = checkpoint_marks.used_by(model, scheduler)
    wrong = {key: value for key, value in trained.items() if used[key] != value}
    if wrong:
        yield (
            f"{where} was trained with {checkpoint_marks.listed(wrong)}, but the model's scheduler uses "
            f"{checkpoint_marks.listed({key: used[key] for key in wrong})}; compare a clip without it, or use a LoRA "
            "that was trained on a base like this one"
        )


def _other_family(header: SafetensorsHeader) -> str | None:
    """Return the name and value of the metadata that say another family than Stable Diffusion 1, or None."""
    for key in _FAMILY:
        value = header.metadata.get(key, "")
        if _OTHER_FAMILY.search(re.sub(r"[-_/]+", " ", value.lower())):
            return f"{key}: {printable(value)[:_MOST_SHOWN]}"
    return "ss_v2: True" if header.metadata.get("ss_v2") == "True" else None
