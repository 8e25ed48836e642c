"""File of an upscaler: found, recognised by its header, and identified by its hash."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from pia_batch.config import RunConfig, UpscaleConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import safetensors
from pia_batch.weights.components import sha256_of
from pia_batch.weights.fetching import Hub, HuggingFaceHub, locate
from pia_batch.weights.upscaler_headers import UnknownUpscalerError, UpscalerNetwork, recognise

_KEY = "upscale.model"


@dataclass(frozen=True)
class UpscalerFile:
    """An upscaler on this machine.

    Attributes:
        path: Its safetensors file.
        network: The network, by the file's header.
        sha256: Hash of the file, 64 hexadecimal digits.
    """

    path: Path
    network: UpscalerNetwork
    sha256: str


def resolve(upscale: UpscaleConfig, hub: Hub | None = None) -> UpscalerFile | None:
    """Find the upscaler that `upscale` names; fetch it if it is not on this machine. None: it names none.

    Args:
        upscale: Section `upscale` of the config.
        hub: Hub that resolves hub ids. None: the Hugging Face hub.

    Raises:
        ConfigError: There is no such file, or it is a pickle, damaged, another one than `sha256` says, or no upscaler
            that is supported; or `scale` is beyond that of the network.
        StorageError: An object store refused or did not answer.
    """
    if upscale.model is None:
        return None
    location, file = locate(upscale.model, upscale.revision, _KEY, hub or HuggingFaceHub())
    name = file or _only_file(upscale.model, location.names())
    path = location.fetch([name]).root / name
    if not path.is_file():
        raise ConfigError(f"{_KEY}: {upscale.model} does not exist; correct the name, or copy the file there")
    header = safetensors.read(path)
    try:
        network = recognise(header.shapes)
    except UnknownUpscalerError as err:
        raise ConfigError(f"{_KEY}: {path} is no upscaler that is supported: {err}; use another one") from None
    strange = sorted(set(header.dtypes.values()) - {"F32", "F16", "BF16", "I64"})
    if strange:
        raise ConfigError(f"{_KEY}: {path} has tensors of type {strange[0]}; convert them to F32, F16 or BF16")
    sha256 = sha256_of(path)
    if upscale.sha256 not in (None, sha256):
        raise ConfigError(
            f"upscale.sha256: {path} is another file (got {sha256}, expected {upscale.sha256}); give every node the "
            "same one, or pin a hub commit by `upscale.revision`"
        )
    if (upscale.scale or 1) > network.scale:
        raise ConfigError(
            f"upscale.scale: out of range (got {upscale.scale}, expected at most {network.scale}, the factor of "
            f"{path}); reduce it, or use a network with a larger factor"
        )
    return UpscalerFile(path, network, sha256)


def with_upscaler(config: RunConfig) -> RunConfig:
    """Return `config` with the hash and the factor of its upscaler, by which workers check their own file.

    Raises:
        ConfigError: `resolve` raises it, or spandrel is not installed.
        StorageError: An object store refused or did not answer.
    """
    found = resolve(config.upscale)
    if found is None:
        return config
    require_spandrel()
    known = {"sha256": found.sha256, "scale": config.upscale.scale or found.network.scale}
    return config.model_copy(update={"upscale": config.upscale.model_copy(update=known)})


def require_spandrel() -> None:
    """Check that spandrel is installed.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("spandrel") is None:
        raise ConfigError(
            f"{_KEY}: needs spandrel, which is not installed; install `pia-batch[upscale]` here and on every node"
        )


def _only_file(named: str, names: list[str]) -> str:
    """Return the one safetensors file of a folder or repository."""
    found = [name for name in names if "/" not in name and name.lower().endswith(safetensors.SUFFIX)]
    if len(found) == 1:
        return found[0]
    pickles = [name for name in names if name.lower().endswith(safetensors.PICKLED)]
    if found:
        problem = f"has {len(found)} safetensors files ({', '.join(sorted(found)[:3])}); name one of them"
    elif pickles:
        problem = (
            f"has no safetensors file, only {pickles[0]}; pickled weights are refused, because opening them runs their "
            "code: convert them to safetensors"
        )
    else:
        problem = "has no safetensors file; name one"
    raise ConfigError(f"{_KEY}: {named} {problem}")
