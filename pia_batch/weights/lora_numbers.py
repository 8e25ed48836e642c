"""Alphas and scalars of a LoRA file: reads these single numbers and checks that they leave a change. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from pia_batch.errors import ConfigError
from pia_batch.weights import safetensors
from pia_batch.weights.lora_files import NUMBERS, LoraContent, rank_role
from pia_batch.weights.safetensors import SafetensorsHeader

_LARGEST = 2.0**128 - 2.0**104
"""Largest number of float32, with which an engine computes."""

_NOT_MULTIPLIED = {"dora_scale", "magnitude", "diff_b", "b_norm"}
"""Roles of tensors that change a layer whose alpha or scalar is 0."""


def notices(
    header: SafetensorsHeader, content: LoraContent, zero_networks: Container[str], where: str
) -> Iterator[str]:
    """Check all alphas and scalars; yield a notice that counts the layers that change nothing because one is 0.

    Args:
        header: Header of the file.
        content: Tensors of the file, whose alphas and scalars have one element.
        zero_networks: Networks for which peft's record has the alpha 0; it counts for layers without an own alpha.
        where: Name of the file, for messages.

    Raises:
        ConfigError: One is NaN, too large or not a number, or every layer of the file has one that is 0.
    """
    layers = [(network, roles) for network, held in content.layers.items() for roles in held.values()]
    named = [name for _, roles in layers for role, name in roles.items() if role in NUMBERS]
    try:
        values = safetensors.numbers(header, named)
    except ValueError as err:
        raise ConfigError(f"{where}: {err}; save it in F16, BF16 or F32") from err
    for name, value in values.items():
        if not abs(value) <= _LARGEST:  # also NaN
            raise ConfigError(
                f"{where}: tensor {name} is {value}, expected a finite number of at most {_LARGEST:.1e}; the file is "
                "damaged, or its training failed: fetch it again, or use another"
            )
    unchanged = [roles for network, roles in layers if _is_zero(roles, values, with_zero=network in zero_networks)]
    if not unchanged:
        return
    first = next(iter(unchanged[0].values()))
    if len(unchanged) == len(layers) and not content.embeddings:
        raise ConfigError(
            f"{where} changes nothing: the alpha or scalar of every layer is 0, such as that of {first}; leave the "
            "LoRA out, or fetch it again"
        )
    yield (
        f"{where}: layers without effect, because their alpha or scalar is 0: {len(unchanged)}, such as that of {first}"
    )


def _is_zero(roles: Mapping[str, str], values: Mapping[str, float], *, with_zero: bool) -> bool:
    """Return True if the alpha or scalar of a layer leaves it as it is.

    Args:
        roles: Tensor names of the layer by role.
        values: Alphas and scalars by tensor name.
        with_zero: True if the alpha is 0 for a layer that has none of its own.
    """
    if _NOT_MULTIPLIED & set(roles):
        return False
    if "alpha" not in roles and with_zero:
        return True
    used = NUMBERS if rank_role(roles) is not None else ("scalar",)
    return any(values[roles[role]] == 0 for role in used if role in roles)
