"""Shapes of a LoRA's tensors: the checks that they fit the layers of a network, for every kind of LoRA. No torch.

Sources of the kinds: kohya-ss/sd-scripts `networks/lora.py`, KohakuBlueleaf/LyCORIS `lycoris/modules`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pia_batch.errors import ConfigError
from pia_batch.weights.lora_files import NUMBERS, LoraContent, Shape
from pia_batch.weights.network_layers import NetworkLayer, NetworkLayers

_LATENT_CHANNELS = 4
_PIA_CHANNELS = 9
_IS_ANOTHER_FAMILY = "is the LoRA for another family, such as SDXL?"


def fit(
    content: LoraContent, network: str, shapes: Mapping[str, Shape], layers: NetworkLayers, where: str
) -> Iterator[tuple[str, NetworkLayer]]:
    """Yield each layer in a file, as it is spelled, with the network's layer that it changes.

    Args:
        content: Tensors of the file.
        network: `unet` or `text_encoder`.
        shapes: Shapes by tensor name.
        layers: Layers of the network.
        where: Name of the file, for messages.

    Raises:
        ConfigError: The network has no such layer, or one of another shape; a tensor is missing.
    """
    taken: dict[str, str] = {}
    for named, roles in content.layers.get(network, {}).items():
        here = f"{where}: {named!r} of the {network}"
        target = layers.find(named)
        if target is None:
            if "motion_modules" in named and not layers.has_motion:
                continue  # the header of the motion adapter has names that only the engine converts
            if layers.has_no_place_for(named):
                continue  # `without_place` counts them
            raise ConfigError(f"{here} is not a layer of this model; {_IS_ANOTHER_FAMILY}")
        if target.name in taken:
            raise ConfigError(f"{here} and {taken[target.name]!r} are the same layer; the file holds it twice")
        taken[target.name] = named
        check({role: shapes[name] for role, name in roles.items()}, target, here)
        yield named, target


def without_place(content: LoraContent, network: str, layers: NetworkLayers) -> int:
    """Return the number of tensors of the middle block's motion module that are left out of this network.

    Args:
        content: Tensors of the file.
        network: `unet` or `text_encoder`.
        layers: Layers of the network.
    """
    held = content.layers.get(network, {})
    return sum(len(roles) for named, roles in held.items() if layers.has_no_place_for(named))


def channels(roles: Mapping[str, Shape], target: NetworkLayer) -> Shape:
    """Return the shape of the weight that a file changes.

    It is that of the layer, except for the first layer of PIA. That layer has nine input channels; a LoRA trained on
    Stable Diffusion has four, which are the first four.
    """
    weight = target.weight
    if target.name != "conv_in" or len(weight) < 2 or weight[1] != _PIA_CHANNELS:  # noqa: PLR2004 - out, in, ...
        return weight
    smaller = (weight[0], _LATENT_CHANNELS, *weight[2:])
    return smaller if _misfit(roles, weight) is not None and _misfit(roles, smaller) is None else weight


def check(roles: Mapping[str, Shape], target: NetworkLayer, where: str) -> None:
    """Check the shapes of a layer's tensors against the layer.

    Raises:
        ConfigError: A tensor is missing, belongs to another kind of LoRA, or has another shape.
    """
    problem = _incomplete(set(roles))
    if problem is not None:
        raise ConfigError(f"{where}: {problem}; the file is damaged")
    others = sorted(set(roles) - _OF_A_VECTOR)
    if len(target.weight) == 1 and others:
        raise ConfigError(
            f"{where}: a norm, whose weight is a vector, cannot have {others[0]}; the file is damaged, or is for "
            "another network"
        )
    for role in NUMBERS:
        if math.prod(roles.get(role, ())) != 1:
            raise ConfigError(f"{where}: {role} must be one number (got shape {roles[role]}); the file is damaged")
    empty = next((role for role, shape in roles.items() if 0 in shape), None)
    if empty is not None:
        raise ConfigError(
            f"{where}: its rank is 0 ({empty} has shape {roles[empty]}), so it changes nothing; remove these tensors, "
            "or train the LoRA with a rank of at least 1"
        )
    misfit = _misfit(roles, channels(roles, target))
    if misfit is not None:
        raise ConfigError(f"{where}: invalid shapes ({misfit}); {_IS_ANOTHER_FAMILY}")
    for role in ("diff_b", "b_norm", "up_bias"):
        if role in roles and target.bias is None:
            raise ConfigError(
                f"{where}: it changes a bias (shape {roles[role]}), but the layer has none; train it without biases "
                "(peft: lora_bias), or remove this tensor"
            )
        if role in roles and target.bias is not None and math.prod(roles[role]) != math.prod(target.bias):
            raise ConfigError(
                f"{where}: its bias is {roles[role]}, that of the layer {target.bias}; {_IS_ANOTHER_FAMILY}"
            )


_OF_A_VECTOR = {"w_norm", "b_norm", "diff", "diff_b", *NUMBERS}
"""Roles of tensors that a norm may have."""

_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def _incomplete(roles: set[str]) -> str | None:
    kinds = [any(role in each for role in roles) for each in ({"down", "up"}, _HADA)]
    kinds += [any(role.startswith("lokr_") for role in roles), "diff" in roles, "w_norm" in roles]
    if sum(kinds) > 1:
        return "tensors of several kinds of LoRA change one layer"
    if (roles & {"down", "up", "mid", "up_bias"}) and not {"down", "up"} <= roles:
        return "one of the two matrices is missing"
    if roles & (_HADA | {"hada_t1", "hada_t2"}) and not (roles >= _HADA and len(roles & {"hada_t1", "hada_t2"}) != 1):
        return "a matrix of its LoHa is missing"
    if any(role.startswith("lokr_") for role in roles) and not _has_both_factors(roles):
        return "a factor of its LoKr is missing"
    if roles & {"dora_scale", "magnitude"} and not any(kinds[:4]):
        return "it has a DoRA magnitude but no matrices"
    return None


def _has_both_factors(roles: set[str]) -> bool:
    for factor in ("lokr_w1", "lokr_w2"):
        parts = {f"{factor}_a", f"{factor}_b"}
        if (factor in roles) == bool(parts & roles) or (parts & roles and not parts <= roles):
            return False
    return "lokr_t2" not in roles or "lokr_w2_a" in roles


def _misfit(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    """Return how the shapes differ from those that a weight of this shape needs, or None."""
    if any(role.startswith("lokr_") for role in roles):
        return _lokr_misfit(roles, weight)
    wanted = _wanted(roles, weight)
    found = {role: roles[role] for role in wanted}
    alike = all(_alike(found[role], shape) for role, shape in wanted.items())
    if not alike or any(0 in shape for shape in found.values()):
        return f"got {_listed(found)}, expected {_listed(wanted)}"
    return _magnitude_misfit(roles, weight)


def _wanted(roles: Mapping[str, Shape], weight: Shape) -> dict[str, Shape]:
    """Return the shapes of the matrices that a weight of this shape needs, for the rank that the file has."""
    out, taken, kernel = weight[0], weight[1:2], weight[2:]
    if "down" in roles:
        rank = roles["down"][:1]
        if "mid" in roles:
            return {"down": (*rank, *taken), "up": (out, *rank), "mid": (*rank, *rank, *kernel)}
        return {"down": (*rank, *weight[1:]), "up": (out, *rank, *(1 for _ in kernel))}
    wanted: dict[str, Shape] = {}
    for each in "12" if "hada_w1_a" in roles else "":
        rank = roles[f"hada_w{each}_b"][:1]
        if f"hada_t{each}" in roles:
            wanted |= {f"hada_w{each}_a": (*rank, out), f"hada_w{each}_b": (*rank, *taken)}
            wanted[f"hada_t{each}"] = (*rank, *rank, *kernel)
        else:
            wanted |= {f"hada_w{each}_a": (out, *rank), f"hada_w{each}_b": (*rank, math.prod(weight[1:]))}
    return wanted | {role: weight for role in ("diff", "w_norm") if role in roles}


def _magnitude_misfit(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    for role, sizes in (("dora_scale", weight[:2]), ("magnitude", weight[:1])):
        if role in roles and math.prod(roles[role]) not in sizes:
            return f"got {role} {roles[role]}, expected {weight[0]} numbers"
    return None


def _lokr_misfit(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    first = roles.get("lokr_w1") or _product(roles["lokr_w1_a"], roles["lokr_w1_b"])
    if "lokr_t2" in roles:
        core, left, right = (roles[f"lokr_{each}"] for each in ("t2", "w2_a", "w2_b"))
        two = 2
        known = len(core) > two and len(left) == len(right) == two and core[:2] == (left[0], right[0])
        second: Shape | None = (left[1], right[1] * math.prod(core[2:])) if known else None
    else:
        whole = roles.get("lokr_w2")
        second = _product(roles["lokr_w2_a"], roles["lokr_w2_b"]) if whole is None else _matrix(whole)
    wanted = (weight[0], math.prod(weight[1:]))
    first = None if first is None else _matrix(first)
    found = None if first is None or second is None else (first[0] * second[0], first[1] * second[1])
    if found != wanted or 0 in wanted:
        return f"got LoKr factors {first} and {second}, expected a product of {wanted}"
    return _magnitude_misfit(roles, weight)


def _product(left: Shape, right: Shape) -> Shape | None:
    left_matrix, right_matrix = _matrix(left), _matrix(right)
    if left_matrix is None or right_matrix is None or left_matrix[1] != right_matrix[0]:
        return None
    return (left_matrix[0], right_matrix[1])


def _matrix(shape: Shape) -> Shape | None:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else None


def _alike(found: Shape, wanted: Shape) -> bool:
    """Return True for equal shapes, apart from sides of 1 at the end, or a kernel that is flattened."""
    least = min(len(wanted), 2)  # a matrix of rank 1 is no vector
    return _trimmed(found, least) == _trimmed(wanted, least) or (
        len(found) == 2 < len(wanted) and found == (wanted[0], math.prod(wanted[1:]))  # noqa: PLR2004 - a matrix
    )


def _trimmed(shape: Shape, least: int) -> Shape:
    while len(shape) > least and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _listed(shapes: Mapping[str, Shape]) -> str:
    return " and ".join(str(shape) for shape in shapes.values())
