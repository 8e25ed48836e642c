"""Adapters of a model: LoRAs, textual inversions and FreeU, applied to networks that were just loaded.

The result generates the same clips as the stock pipeline after `load_lora_weights`, `set_adapters`, `fuse_lora`,
`load_textual_inversion` and `enable_freeu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from tokenizers import AddedToken

from pia_batch.config import FreeUConfig, ModelConfig, TextualInversionConfig
from pia_batch.engine import loras
from pia_batch.engine.loras import TEXT_ENCODER, UNET, Lora
from pia_batch.errors import ConfigError
from pia_batch.weights import inversion_files
from pia_batch.weights.components import Component
from pia_batch.weights.safetensors import unreadable

TOKENIZER = "tokenizer"


@dataclass(frozen=True, slots=True)
class TextualInversion:
    """Textual inversion, read from its file.

    Attributes:
        part: The file.
        word: Word that stands for it in a prompt.
        vectors: Embeddings, (tokens, features).
    """

    part: Component
    word: str
    vectors: torch.Tensor

    @property
    def tokens(self) -> list[str]:
        """Names of the vectors' tokens, as diffusers names them."""
        return [self.word, *(f"{self.word}_{k}" for k in range(1, len(self.vectors)))]


@dataclass(frozen=True, slots=True)
class Adapters:
    """Adapters of one model, read and not yet applied.

    The `apply_to_...` methods change parts in place, so the parts must belong to this model alone.
    """

    loras: tuple[Lora, ...]
    inversions: tuple[TextualInversion, ...]
    freeu: FreeUConfig | None
    fuse: bool

    def recipe(self, part: str) -> list[Any]:
        """Return a description of the changes to a part such as `unet`: equal for equal changes, empty for none."""
        steps: list[Any] = [[lora.part, lora.scale, self.fuse] for lora in self.loras if lora.touches(part)]
        if part in (TOKENIZER, TEXT_ENCODER):
            steps += [[inversion.part, inversion.word] for inversion in self.inversions]
        if part == UNET and self.freeu is not None:
            steps.append(self.freeu.model_dump())
        return steps

    @property
    def touch_motion(self) -> bool:
        """True if the adapters change the UNet's motion modules, too."""
        return any(lora.touches(UNET, "motion_modules") for lora in self.loras)

    def apply_to_tokenizer(self, tokenizer: Any) -> None:
        """Add the words of the textual inversions.

        Raises:
            ConfigError: A word is already in the vocabulary.
        """
        long = [inversion.word.lower() for inversion in self.inversions if len(inversion.vectors) > 1]
        for inversion in self.inversions:
            known = tokenizer.get_vocab()
            taken = [token for token in inversion.tokens if token in known]
            if taken:
                raise ConfigError(
                    f"{inversion.part.path}: {taken[0]!r} is already in the tokenizer's vocabulary; set another "
                    "`token` in model.textual_inversions"
                )
            # diffusers searches the prompt for a word of several vectors as it is written. Added tokens are lower-cased
            # by default; then the word would not be found, and only the first vector would be used. The tokenizer finds
            # literal words first, so that a word with one of them inside must be literal, too.
            literal = any(word in inversion.word.lower() for word in long)
            tokenizer.add_tokens([AddedToken(token, normalized=not literal) for token in inversion.tokens])

    def apply_to_text_encoder(self, text_encoder: Any, tokenizer: Any) -> None:
        """Apply the LoRAs, then add the vectors of the textual inversions, which no LoRA changes.

        Args:
            text_encoder: CLIP text encoder, changed in place.
            tokenizer: Tokenizer that already has the words of the textual inversions.

        Raises:
            ConfigError: Vectors or LoRAs have other shapes than this text encoder.
        """
        loras.apply(self.loras, TEXT_ENCODER, text_encoder, fuse=self.fuse)
        self._embed(text_encoder, tokenizer)

    def apply_to_unet(self, unet: Any) -> None:
        """Apply the LoRAs to a `UNetMotionModel`, in place, and enable FreeU.

        Raises:
            ConfigError: A LoRA has other shapes than this UNet.
        """
        loras.apply(self.loras, UNET, unet, fuse=self.fuse)
        if self.freeu is not None:
            unet.enable_freeu(**self.freeu.model_dump())

    def _embed(self, text_encoder: Any, tokenizer: Any) -> None:
        size = text_encoder.get_input_embeddings().weight.shape[1]
        for inversion in self.inversions:
            if inversion.vectors.shape[1] != size:
                raise ConfigError(
                    f"{inversion.part.path}: its vectors have {inversion.vectors.shape[1]} dimensions, those of the "
                    f"text encoder {size}; it was made for another family of models"
                )
        if self.inversions:
            rows = max(len(tokenizer), text_encoder.get_input_embeddings().num_embeddings)
            text_encoder.resize_token_embeddings(rows, mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight.data
        for inversion in self.inversions:
            table[tokenizer.convert_tokens_to_ids(inversion.tokens)] = inversion.vectors.to(table)


def read(model: ModelConfig, lora_parts: Sequence[Component], inversion_parts: Sequence[Component]) -> Adapters:
    """Read the adapters that `model` names from their resolved files, in the config's order.

    Raises:
        ConfigError: A file cannot be read, or is not a file of the expected kind.
    """
    found = tuple(loras.read(part, config) for part, config in zip(lora_parts, model.loras, strict=True))
    bundled = [TextualInversion(lora.part, word, held) for lora in found for word, held in lora.embeddings.items()]
    own = [_inversion(part, each) for part, each in zip(inversion_parts, model.textual_inversions, strict=True)]
    return Adapters(
        found,
        (*own, *bundled),
        model.freeu,
        model.fuse_loras,
    )


def adapter_settings(network: Any) -> dict[str, Any]:
    """Return the adapter settings of a network that are not in its weights: LoRA scales and FreeU. JSON values."""
    left: dict[str, Any] = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            left[name] = [module.scaling, module.active_adapters, module.disable_adapters, module.merged_adapters]
        if getattr(module, "s1", None) is not None:
            left[name] = [module.s1, module.s2, module.b1, module.b2]
    return left


def _inversion(part: Component, config: TextualInversionConfig) -> TextualInversion:
    path = part.path
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as err:
        raise unreadable(path, err) from err
    name = inversion_files.vectors_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, str(path))
    if config.token is None and name in inversion_files.NAMELESS:
        raise ConfigError(f"{path} does not name its word; set `token` in model.textual_inversions")
    vectors = tensors[name]
    if vectors.ndim not in (1, 2) or vectors.numel() == 0:
        raise ConfigError(f"{path}: invalid shape {tuple(vectors.shape)}, expected (tokens, features)")
    if not bool(torch.isfinite(vectors.float()).all()):
        raise ConfigError(f"{path}: {name!r} holds NaN or infinity; the file is damaged, or its training failed")
    return TextualInversion(part, config.token or name, vectors.view(-1, vectors.shape[-1]))
