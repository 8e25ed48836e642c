"""Names of tensors inside of the wrappers that trainers put around a network: its own names are left."""

from __future__ import annotations

import re

_FIRST = ("state_dict.",)
"""Beginnings of names: of checkpoints of Lightning."""

_PARTS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names, at any place, of modules that wrap another one: parallel training (DataParallel, DeepSpeed),
torch.compile, FSDP, and activation checkpoints. No network of Stable Diffusion has parts of these names."""


def unwrapped(name: str) -> str:
    """Return the name that a tensor has in its network.

    Sources: torch `nn/parallel`, `_dynamo/eval_frame.py` `OptimizedModule`, `distributed/fsdp/_common_utils.py`
    `FSDP_WRAPPED_MODULE`, `distributed/algorithms/_checkpoint/checkpoint_wrapper.py`.
    """
    name = _PARTS.sub("", name)
    while name.startswith(_FIRST):
        name = _PARTS.sub("", name.split(".", 1)[1])
    return name
