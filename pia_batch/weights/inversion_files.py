"""Textual inversion files: finds the tensor with the vectors, by names and shapes. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from pia_batch.errors import ConfigError

NAMELESS = ("emb_params", "string_to_param", "string_to_param.*", "*")
"""Tensor names of files converted from the web UI's format, which do not hold the word."""

SPARE = ("step", "sd_checkpoint", "sd_checkpoint_name", "name", "num_vectors", "optimizer_state_dict", "hash")
"""Names of training state that some tools save next to the vectors."""


def vectors_of(shapes: Mapping[str, tuple[int, ...]], where: str) -> str:
    """Return the name of the tensor with the vectors.

    Args:
        shapes: Shapes by tensor name.
        where: Name of the file, for messages.

    Raises:
        ConfigError: There is none, or more than one.
    """
    held = [name for name in shapes if name not in SPARE]
    if len(held) != 1:
        raise ConfigError(
            f"{where} holds {', '.join(sorted(held)) or 'no tensors'}; a textual inversion for Stable Diffusion 1.5 "
            "holds one tensor (one for SDXL holds two)"
        )
    return held[0]
