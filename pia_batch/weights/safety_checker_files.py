"""Files of a safety checker: its network, and the settings by which images are made its input."""

from __future__ import annotations

from dataclasses import dataclass

from pia_batch.config import SafetyConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import components
from pia_batch.weights.components import CONFIG, MODEL, Component
from pia_batch.weights.fetching import Hub, HuggingFaceHub, locate

_KEY = "safety.checker"
_PREPROCESSOR = "preprocessor_config.json"
_NETWORK, _EXTRACTOR = "safety_checker", "feature_extractor"
_CLASS = "StableDiffusionSafetyChecker"
_TENSORS = ("concept_embeds", "special_care_embeds", "concept_embeds_weights", "special_care_embeds_weights")


@dataclass(frozen=True)
class SafetyCheckerFiles:
    """Parts of a safety checker, on this machine.

    Attributes:
        network: Folder of the StableDiffusionSafetyChecker.
        preprocessor: Folder of `preprocessor_config.json`.
    """

    network: Component
    preprocessor: Component


def resolve(safety: SafetyConfig, hub: Hub | None = None) -> SafetyCheckerFiles | None:
    """Find the safety checker that `safety` names; fetch the files that are not on this machine. None: it names none.

    Two layouts are read: a folder or repository of the checker alone, such as CompVis/stable-diffusion-safety-checker,
    and a checkpoint of Stable Diffusion with the folders `safety_checker` and `feature_extractor`.

    Args:
        safety: Section `safety` of the config.
        hub: Hub that resolves hub ids. None: the Hugging Face hub.

    Raises:
        ConfigError: A file is missing or pickled, or the network is another one.
        StorageError: An object store refused or did not answer.
    """
    if safety.checker is None:
        return None
    location, file = locate(safety.checker, safety.checker_revision, _KEY, hub or HuggingFaceHub())
    if file is not None:
        raise ConfigError(f"{_KEY}: {safety.checker} is a file; name the folder with {CONFIG} and {_PREPROCESSOR}")
    names = location.names()
    inside = f"{_NETWORK}/{CONFIG}" in names
    network, extractor = (_NETWORK, _EXTRACTOR) if inside else ("", "")
    settings = f"{extractor}/{_PREPROCESSOR}" if inside else _PREPROCESSOR
    source = location.fetch([*components.patterns(f"{network}/" if inside else "", None), settings])
    found = components.weighted(source, network, MODEL, None)
    architectures = found.settings.get("architectures") or [_CLASS]
    if _CLASS not in architectures:
        raise ConfigError(
            f"{_KEY}: {found.folder / CONFIG} is a {architectures[0]}, not a {_CLASS}; use one such as "
            "CompVis/stable-diffusion-safety-checker"
        )
    shapes = components.header(found).shapes
    missing = [name for name in _TENSORS if name not in shapes]
    if missing:
        raise ConfigError(f"{_KEY}: {found.folder} has no tensor {missing[0]!r}; use a complete {_CLASS}")
    if not (source.root / settings).is_file():
        raise ConfigError(f"{_KEY}: {source.named} has no {settings}; copy it there from where the checker is from")
    components.read_json(source.root / settings)
    return SafetyCheckerFiles(found, components.plain(source, extractor, (_PREPROCESSOR,)))
