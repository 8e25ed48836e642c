"""Tensors that files of models hold and no network uses: constants, training state and parts that PIA leaves out."""

from __future__ import annotations

import re

_GROUPS = (
    (None, r"betas|alphas_cumprod\w*|(sqrt|log|posterior)_\w+|logvar|lvlb_weights|scale_factor|v_posterior"),
    (None, r"model_ema\.(decay|num_updates)|(.+\.)?(position_ids|logit_scale|text_projection(\.weight)?)"),
    ("averaged weights", r"(first_stage_model\.)?(model_)?ema\..+"),
    ("image tower of CLIP", r"(.+\.)?(vision_model|visual_projection)\..+"),
    ("safety checker", r"safety_checker\..+"),
    ("state of a training", r"epoch|global_step|step|iteration|pytorch-lightning_version|(.+\.)?loss\..+"),
    ("state of a training", r"(optimizer|lr_scheduler|callbacks|loops|hyper_parameters|embedding_manager)\w*(\..+)?"),
)
_REASONS = [(group, re.compile(pattern)) for group, pattern in _GROUPS]
"""Reasons to leave a tensor out, by its name. None: a constant, which a notice need not name."""


def left_out(name: str) -> tuple[bool, str | None]:
    """Return True for a tensor that has a known reason to be left out, and the reason if it is worth a notice.

    Args:
        name: Name of the tensor, without the prefixes of trainers.
    """
    return next(((True, group) for group, pattern in _REASONS if pattern.fullmatch(name)), (False, None))
