"""What makes a model one's own: LoRAs, textual inversions and FreeU, laid over networks that were just loaded.

The result draws what the stock pipeline draws after `load_lora_weights`, `set_adapters`, `fuse_lora`,
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
from pia_batch.weights.components import Component

TOKENIZER = "tokenizer"

_NAMELESS = ("emb_params", "string_to_param", "string_to_param.*", "*")
"""What files converted from the web UI's call their tensor, in place of a word."""


@dataclass(frozen=True, slots=True)
class Inversion:
    """A textual inversion's file.

    Attributes:
        part: the file.
        word: what stands for it in a prompt.
        vectors: (tokens, features).
    """

    part: Component
    word: str
    vectors: torch.Tensor

    @property
    def tokens(self) -> list[str]:
        """The tokens of the vectors, named as diffusers names them."""
        return [self.word, *(f"{self.word}_{k}" for k in range(1, len(self.vectors)))]


@dataclass(frozen=True, slots=True)
class Adapters:
    """All that personalises one model, read and not yet applied.

    Parts must be the model's own when `apply_to_...` gets them: they are changed in place.
    """

    loras: tuple[Lora, ...]
    inversions: tuple[Inversion, ...]
    freeu: FreeUConfig | None
    fuse: bool

    def recipe(self, part: str) -> list[Any]:
        """What is done to a part, such as `unet`: equal for adapters that change it equally, empty for none."""
        steps: list[Any] = [[lora.part, lora.scale, self.fuse] for lora in self.loras if lora.touches(part)]
        if part in (TOKENIZER, TEXT_ENCODER):
            steps += [[inversion.part, inversion.word] for inversion in self.inversions]
        if part == UNET and self.freeu is not None:
            steps.append(self.freeu.model_dump())
        return steps

    @property
    def touch_motion(self) -> bool:
        """Whether the UNet's motion modules are changed, too."""
        return any(lora.touches(UNET, "motion_modules") for lora in self.loras)

    def apply_to_tokenizer(self, tokenizer: Any) -> None:
        """Add the words of the textual inversions.

        Raises:
            ConfigError: a word is in the vocabulary already.
        """
        for inversion in self.inversions:
            known = tokenizer.get_vocab()
            taken = [token for token in inversion.tokens if token in known]
            if taken:
                raise ConfigError(
                    f"{inversion.part.path}: {taken[0]!r} is in the tokenizer's vocabulary already; set another "
                    "`token` in model.textual_inversions"
                )
            # A word of several vectors is looked for in the prompt as it is written; lower-casing, which tokens
            # undergo by default, would hide it, and only the first vector would be read.
            literal = len(inversion.vectors) > 1
            tokenizer.add_tokens([AddedToken(token, normalized=not literal) for token in inversion.tokens])

    def apply_to_text_encoder(self, text_encoder: Any, tokenizer: Any) -> None:
        """Add the vectors of the textual inversions, then the LoRAs. `tokenizer` has the words.

        Raises:
            ConfigError: vectors or LoRAs of another shape than this text encoder's.
        """
        self._embed(text_encoder, tokenizer)
        loras.apply(self.loras, TEXT_ENCODER, text_encoder, fuse=self.fuse)

    def apply_to_unet(self, unet: Any) -> None:
        """Lay the LoRAs over a `UNetMotionModel`, and switch on FreeU.

        Raises:
            ConfigError: a LoRA of another shape than this UNet's.
        """
        loras.apply(self.loras, UNET, unet, fuse=self.fuse)
        if self.freeu is not None:
            unet.enable_freeu(**self.freeu.model_dump())

    def _embed(self, text_encoder: Any, tokenizer: Any) -> None:
        size = text_encoder.get_input_embeddings().weight.shape[1]
        for inversion in self.inversions:
            if inversion.vectors.shape[1] != size:
                raise ConfigError(
                    f"{inversion.part.path}: its vectors have {inversion.vectors.shape[1]} numbers and the text "
                    f"encoder's {size}; it was made for another family of models"
                )
        if self.inversions:
            rows = max(len(tokenizer), text_encoder.get_input_embeddings().num_embeddings)
            text_encoder.resize_token_embeddings(rows, mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight.data
        for inversion in self.inversions:
            table[tokenizer.convert_tokens_to_ids(inversion.tokens)] = inversion.vectors.to(table)


def read(model: ModelConfig, lora_files: Sequence[Component], inversion_files: Sequence[Component]) -> Adapters:
    """The adapters that `model` names, from the files that they were resolved to, in the config's order.

    Raises:
        ConfigError: a file that cannot be read, or is not what it is said to be.
    """
    return Adapters(
        tuple(loras.read(part, config) for part, config in zip(lora_files, model.loras, strict=True)),
        tuple(_inversion(part, each) for part, each in zip(inversion_files, model.textual_inversions, strict=True)),
        model.freeu,
        model.fuse_loras,
    )


def traces(network: Any) -> dict[str, Any]:
    """What adapters have left on a network beside its weights: scales of LoRAs, and FreeU. JSON."""
    left: dict[str, Any] = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            left[name] = [module.scaling, module.active_adapters, module.disable_adapters, module.merged_adapters]
        if getattr(module, "s1", None) is not None:
            left[name] = [module.s1, module.s2, module.b1, module.b2]
    return left


def _inversion(part: Component, config: TextualInversionConfig) -> Inversion:
    path = part.path
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as err:
        raise ConfigError(f"cannot read {path}: {err}") from err
    if len(tensors) != 1:
        raise ConfigError(
            f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}; a textual inversion for Stable Diffusion 1.5 "
            "holds one tensor (one for SDXL holds two)"
        )
    name, vectors = next(iter(tensors.items()))
    if config.token is None and name in _NAMELESS:
        raise ConfigError(f"{path} does not say which word it is for; set `token` in model.textual_inversions")
    if vectors.ndim not in (1, 2) or vectors.numel() == 0:
        raise ConfigError(f"{path} holds a tensor of shape {tuple(vectors.shape)}, not tokens x features")
    return Inversion(part, config.token or name, vectors.view(-1, vectors.shape[-1]))
