"""Networks from safetensors files: reads the tensors that the weights' map has found in a folder or a single file.

Every tensor of the network comes from a file; no weight stays random and none is dropped. Only the part's files and
config are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from pia_batch.errors import ConfigError, message_of
from pia_batch.weights import safetensors, tensor_map
from pia_batch.weights.components import CONFIG, Component
from pia_batch.weights.networks import text_settings
from pia_batch.weights.tensor_map import Stored


def read(name: str, part: Component, dtype: torch.dtype) -> Any:
    """Return the network of a part, on the CPU, in its own memory.

    Args:
        name: Name of the part: `unet`, `vae`, `text_encoder` or `motion_adapter`.
        part: Part of that name; its config defines the size of the network.
        dtype: Dtype of the loaded weights, whatever the dtype in the file.

    Raises:
        ConfigError: Tensors are missing, unexpected, or of another shape.
    """
    mapped = tensor_map.build(name, part).tensors
    network = _empty(name, part)
    # transformers before 5.6 puts `text_model.` before the names.
    inner = "text_model." if "text_model.final_layer_norm.weight" in network.state_dict() else ""
    own = {f"{inner}{each}": tensor for each, tensor in _tensors(mapped, dtype).items()}
    network.load_state_dict(own, strict=False, assign=True)
    return network.to(dtype)


def check_finite(network: Any, parts: Iterable[tuple[str, Component]]) -> None:
    """Check that all weights of a network are finite numbers, in one pass on its device.

    Only if one is not are the files read again, to find which file and tensor is the cause.

    Args:
        network: Loaded network, on its device.
        parts: Parts whose files its weights come from, by the config key that names them.

    Raises:
        ConfigError: A weight is NaN or infinite; the message names the file and the tensor.
    """
    # Tensors on the meta device have a shape, but no values.
    weights = [weight for weight in network.parameters() if weight.numel() and not weight.is_meta]
    largest = [torch.linalg.vector_norm(weight.detach(), math.inf).float() for weight in weights]
    if not largest or bool(torch.stack(largest).isfinite().all()):
        return
    for key, part in parts:
        for path in (part.folder / name for name in part.files if name.endswith(safetensors.SUFFIX)):
            found = _first_invalid(path)
            if found is not None:
                raise ConfigError(
                    f"{key}: {path}: tensor {found} has values that are NaN or infinite; the file is damaged: fetch "
                    "it again, or use another"
                )
    broken = next(name for name, weight in network.named_parameters() if not weight.isfinite().all())
    raise ConfigError(
        f"{type(network).__name__}: weight {broken} is too large for {network.dtype}; set model.dtype to bfloat16 or "
        "float32, or a LoRA's scale to a smaller value"
    )


def _first_invalid(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                tensor = file.get_tensor(name)
                # Eight-bit floats have no `isfinite` on all devices.
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    return str(name)
    except (OSError, SafetensorError) as err:
        raise safetensors.unreadable(path, err) from err
    return None


def _empty(name: str, part: Component) -> Any:
    """Return the network without memory for its weights, but with the buffers that it computes.

    Raises:
        ConfigError: The library refuses the config.
    """
    settings = part.settings
    try:
        with accelerate.init_empty_weights():
            if name == "text_encoder":
                return transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_settings(settings)))
            moves = settings.get("_class_name") == diffusers.UNetMotionModel.__name__
            return _KINDS["motion unet" if moves else name].from_config(settings)
    except Exception as err:  # a config of any content; the libraries raise exceptions of many types
        place = part.folder if part.config is None else part.config.folder
        raise ConfigError(
            f"{place / CONFIG}: the {name.replace('_', ' ')} cannot be built from it ({message_of(err)}); use the "
            "config of Stable Diffusion 1.5, or fetch the file again"
        ) from err


_KINDS: dict[str, Any] = {
    "unet": diffusers.UNet2DConditionModel,
    "motion unet": diffusers.UNetMotionModel,
    "vae": diffusers.AutoencoderKL,
    "motion_adapter": diffusers.MotionAdapter,
}


def _tensors(mapped: dict[str, Stored], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors, as copies: a tensor of the right dtype would remain a view of the file, which may change."""
    found, files = {}, {}
    with ExitStack() as stack:
        for name, stored in mapped.items():
            try:
                if stored.path not in files:
                    files[stored.path] = stack.enter_context(safe_open(stored.path, "pt"))
                tensor = files[stored.path].get_tensor(stored.name)
            except (OSError, SafetensorError) as err:
                raise safetensors.unreadable(stored.path, err) from err
            found[name] = tensor.to(dtype, copy=True).reshape(stored.shape)
    return found
