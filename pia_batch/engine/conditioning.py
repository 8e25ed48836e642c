"""Conditioning of a clip besides its motion: cached prompt embeddings and image posteriors.

Does not depend on timesteps or noise levels. Every value is computed for one row alone, so that a cached value does not
depend on the batch in which it was first used.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image

from pia_batch.engine import lora_scales
from pia_batch.engine.lora_scales import Scales
from pia_batch.engine.prompt_travel import Text, Travel, cosine_of, mixes, part_of
from pia_batch.errors import NonFiniteError
from pia_batch.schema.key_prompts import KeyPrompt
from pia_batch.schema.settings import Interpolation

MAX_PROMPTS = 256
"""Number of cached prompt embeddings, 0.24 MB each in float32 for Stable Diffusion 1.5."""

MAX_IMAGES = 32
"""Number of cached image posteriors, 0.13 MB each in float32 at 512 x 512, 64 times as much at 4096 x 4096."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """Cache of the `capacity` most recently used values of a function of a key."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key, compute: Callable[[], Value]) -> Value:
        """Return the value of `key`; compute it if it is not cached."""
        if key not in self._values:
            self._values[key] = compute()
            if len(self._values) > self._capacity:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


def pixel_digest(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    """Return (width, height) and a 128-bit hash, equal for images of equal size and pixels."""
    return image.size, hashlib.blake2b(image.tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Embedding of a text, or of several that a clip has one after the other, as the UNet reads it.

    Attributes:
        embedding: Tensor (1, tokens, features), in the text encoder's dtype, on its device; or a mixture of such
            tensors for each frame.
        num_tokens: Number of tokens before truncation, start and end markers included; of several texts the largest.
        truncated: True if `num_tokens` exceeds the number that the text encoder reads.
        is_finite: True if the embedding holds neither NaN nor infinity.
    """

    embedding: Text
    num_tokens: int
    truncated: bool
    is_finite: bool

    def of_frames(self, frames: Sequence[int]) -> Prompt:
        """Return the prompt of these frames of the clip, for a part of it."""
        return dataclasses.replace(self, embedding=part_of(self.embedding, frames))


class _LongWords:
    """Words of textual inversions of several vectors, which stand in a prompt for a token of each vector.

    diffusers replaces one word after the other, in no fixed order, so that a word inside another one damages it. Here
    all are replaced in one pass, the longest first, as the tokenizer finds them.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_encoder
        # The tokenizer finds these only as they are written, although CLIP folds case. Others it finds in any case, but
        # their tokens are added only where the case is the same, as in diffusers.
        literal = {
            str(token)
            for token in tokenizer.added_tokens_decoder.values()
            if not token.normalized and not token.special
        }
        long = {word for word in added if f"{word}_1" in added}
        self._tokens = {word: " ".join(_chain(word, added)) for word in literal | long} if long else {}
        self._by_folded: dict[str, str] = {}
        for word in literal:
            self._by_folded.setdefault(word.lower(), word)
        longest_first = sorted(self._tokens, key=len, reverse=True)
        patterns = (f"(?i:{re.escape(word)})" if word in literal else re.escape(word) for word in longest_first)
        self._pattern = re.compile("|".join(patterns))

    def expanded(self, text: str) -> str:
        """Return the text with the tokens of all vectors in the place of each word."""
        return self._pattern.sub(lambda match: self._tokens_of(match[0]), text) if self._tokens else text

    def _tokens_of(self, found: str) -> str:
        word = found if found in self._tokens else self._by_folded.get(found.lower(), found)
        return self._tokens.get(word, found)


def _chain(word: str, added: Container[str]) -> list[str]:
    """Return the names of a word's tokens, as diffusers names them."""
    further = itertools.takewhile(added.__contains__, (f"{word}_{k}" for k in itertools.count(1)))
    return [word, *further]


class PromptEncoder:
    """Encoder of prompts to CLIP embeddings, cached by text and `clip_skip`."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._words = _LongWords(tokenizer)
        self._recent: LruCache[tuple[str, int | None, Scales | None], Prompt] = LruCache(MAX_PROMPTS)

    def encode(self, text: str, clip_skip: int | None = None, scales: Scales | None = None) -> Prompt:
        """Return the prompt's embedding, from the layer that `clip_skip` leaves as the last one.

        Args:
            text: The prompt.
            clip_skip: Number of last layers that are skipped; None: none.
            scales: Scales of the model's LoRAs; None: those of the config.
        """

        def compute() -> Prompt:
            with lora_scales.applied(getattr(self._text_encoder, "network", self._text_encoder), scales):
                return self._encode(text, clip_skip)

        return self._recent.get((text, clip_skip, scales), compute)

    def encode_keys(
        self,
        keys: Sequence[KeyPrompt],
        num_frames: int,
        clip_skip: int | None = None,
        *,
        interpolation: Interpolation = "linear",
        hold: float = 0.0,
        wraps: bool = False,
        scales: Scales | None = None,
    ) -> Prompt:
        """Return the embedding of each frame; with a single key prompt, that of its text.

        Args:
            keys: Texts by frame; the first one is at frame 0.
            num_frames: Number of frames of the clip.
            clip_skip: Number of last layers of the text encoder that are skipped.
            interpolation: Mixture between two texts.
            hold: Share of the frames after a text, 0 to 1, that keep it.
            wraps: True if the last text is followed by the first one, as in loops.
            scales: Scales of the model's LoRAs; None: those of the config.
        """
        each = [self.encode(text, clip_skip, scales) for _, text in keys]
        if len(each) == 1:
            return each[0]
        texts = tuple(prompt.embedding for prompt in each if isinstance(prompt.embedding, torch.Tensor))
        is_finite = all(prompt.is_finite for prompt in each)
        places = mixes(
            [frame for frame, _ in keys],
            num_frames,
            interpolation=interpolation if is_finite else "linear",
            hold=hold,
            wraps=wraps,
            cosine=cosine_of(texts),
        )
        return Prompt(
            Travel(texts, places),
            max(prompt.num_tokens for prompt in each),
            truncated=any(prompt.truncated for prompt in each),
            is_finite=is_finite,
        )

    def _encode(self, text: str, clip_skip: int | None) -> Prompt:
        limit = self._tokenizer.model_max_length
        text = self._words.expanded(text)
        num_tokens = len(self._tokenizer(text, verbose=False).input_ids)
        padded = self._tokenizer(text, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        embedding = self._embed(padded, clip_skip)
        is_finite = bool(torch.isfinite(embedding).all())
        return Prompt(embedding, num_tokens, truncated=num_tokens > limit, is_finite=is_finite)

    def _embed(self, padded: Any, clip_skip: int | None) -> torch.Tensor:
        encoder = self._text_encoder
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = padded.attention_mask.to(encoder.device)
        ids = padded.input_ids.to(encoder.device)
        output = encoder(ids, attention_mask=mask, output_hidden_states=clip_skip is not None)
        if clip_skip is None:
            embedding = output.last_hidden_state
        else:
            # Up to transformers 4 the layers were in `text_model`. PIAPipeline still reads them there and fails with 5.
            layers = getattr(encoder, "text_model", encoder)
            embedding = layers.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
        result: torch.Tensor = embedding.to(encoder.dtype)
        return result


@dataclass(frozen=True, slots=True)
class Posterior:
    """VAE encoding of an image: a normal distribution for each latent.

    Attributes:
        mean: Tensor (1, 4, h, w) at the image's own size, without the VAE's scaling factor.
        std: Standard deviations, in the shape of `mean`.
    """

    mean: torch.Tensor
    std: torch.Tensor

    @property
    def is_finite(self) -> bool:
        """True if the posterior holds neither NaN nor infinity."""
        return bool((torch.isfinite(self.mean) & torch.isfinite(self.std)).all())

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Return one sample, (1, 4, h, w), from the generator's next numbers."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


class ImageEncoder:
    """Encoder of images to VAE posteriors, cached by pixels. Sampling is left to the row, which owns a generator."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._recent: LruCache[tuple[tuple[int, int], bytes], Posterior] = LruCache(MAX_IMAGES)

    def encode(self, image: Image.Image) -> Posterior:
        """Return the posterior of an RGB image, at the image's own size.

        Raises:
            NonFiniteError: The posterior holds NaN or infinity. In half precision: after a second try in float32.
        """
        return self._recent.get(pixel_digest(image), lambda: self._encode(np.asarray(image)))

    def _encode(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Posterior:
        scaled = torch.from_numpy(pixels.astype(np.float32) / 255.0) * 2.0 - 1.0
        # Add the batch axis, then move channels first: the strides decide which convolution kernel runs, and so the
        # last digits.
        batch = scaled[None].permute(0, 3, 1, 2)
        posterior = _posterior(self._vae, batch)
        if self._vae.dtype != torch.float32 and not posterior.is_finite:
            # Half precision can overflow here as in the decoder. This is rare, so the copy is not kept.
            exact = _posterior(copy.deepcopy(self._vae).float(), batch)
            posterior = Posterior(exact.mean.to(self._vae.dtype), exact.std.to(self._vae.dtype))
        if not posterior.is_finite:
            raise NonFiniteError("the VAE's latents of the image hold NaN or infinity, in float32 too")
        return posterior


def _posterior(vae: Any, batch: torch.Tensor) -> Posterior:
    distribution = vae.encode(batch.to(vae.device, vae.dtype)).latent_dist
    return Posterior(distribution.mean, distribution.std)
