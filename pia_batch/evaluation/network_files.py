"""Files of the networks that measure: finds CLIP and DINO, fetches them, and identifies them. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pia_batch.errors import ConfigError
from pia_batch.weights import components
from pia_batch.weights.components import CONFIG, MODEL, Component
from pia_batch.weights.fetching import Hub, HuggingFaceHub, locate

Role = Literal["clip", "dino"]

PREPROCESSOR = "preprocessor_config.json"
_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_KINDS: dict[Role, tuple[str, ...]] = {"clip": ("clip",), "dino": ("vit", "dinov2", "dinov2_with_registers")}
"""Values of `model_type` in a network's config, by role."""

_EXPECTED: dict[Role, str] = {
    "clip": "a CLIPModel, with its text and its image tower, such as openai/clip-vit-large-patch14",
    "dino": "a ViTModel or a Dinov2Model, such as facebook/dinov2-base",
}


@dataclass(frozen=True)
class NetworkSource:
    """Name of a network, as the operator gave it.

    Attributes:
        role: Purpose of the network.
        name: Folder, `owner/name` on the hub, or URI of an object store.
        revision: Hub commit, tag or branch; None: the main branch.
    """

    role: Role
    name: str
    revision: str | None = None


@dataclass(frozen=True)
class NetworkFiles:
    """Files of one network on this machine.

    Attributes:
        source: Origin of the files.
        weights: Config and weights.
        others: Preprocessor and tokenizer, as far as they exist.
    """

    source: NetworkSource
    weights: Component
    others: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Folder with all files."""
        return self.weights.folder

    def identity(self) -> dict[str, Any]:
        """Return the identity: equal for equal weights, preprocessing and vocabulary, wherever they are stored."""
        others = {name: components.sha256_of(self.folder / name) for name in self.others}
        return {"weights": self.weights.identity(), "others": others}

    def pinned(self) -> NetworkSource:
        """Return the source at the commit that was found, so that every node of a cluster uses the same one."""
        return NetworkSource(self.source.role, self.source.name, self.weights.commit or self.source.revision)


def find(source: NetworkSource, hub: Hub | None = None) -> NetworkFiles:
    """Find the files of a network, and fetch what is not on this machine.

    Args:
        source: Name and revision.
        hub: Hub for hub ids; None: that of Hugging Face.

    Raises:
        ConfigError: There is no such network, it is of another kind, or a file is missing, pickled or truncated.
        StorageError: An object store refused or did not answer.
    """
    flag = f"--{source.role}"
    location, file = locate(source.name, source.revision, flag, hub or HuggingFaceHub())
    if file is not None:
        msg = f"{flag}: {source.name} is a file; name the folder that has it, with its {CONFIG}"
        raise ConfigError(msg)
    wanted = (*_TOKENIZER, PREPROCESSOR) if source.role == "clip" else (PREPROCESSOR,)
    fetched = location.fetch([*components.patterns("", None), *wanted])
    if (fetched.root / CONFIG).is_file():
        kind = components.read_json(fetched.root / CONFIG).get("model_type")
        if kind not in _KINDS[source.role]:
            msg = (
                f"{flag}: {source.name} is of another kind (got model_type {kind!r}, expected {_EXPECTED[source.role]})"
            )
            raise ConfigError(msg)
    weights = components.weighted(fetched, "", MODEL, None)
    others = tuple(name for name in sorted(wanted) if (fetched.root / name).is_file())
    if source.role == "clip" and "tokenizer.json" not in others and not {"vocab.json", "merges.txt"} <= set(others):
        msg = (
            f"{flag}: {source.name} has no tokenizer.json, nor vocab.json and merges.txt, which clip_t needs; add them"
        )
        raise ConfigError(msg)
    return NetworkFiles(source, weights, others)
