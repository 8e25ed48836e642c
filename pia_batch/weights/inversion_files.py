"""Textual inversion files: finds the tensor with the vectors, by names and shapes, and its word. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from pia_batch.errors import ConfigError
from pia_batch.weights import model_kinds, tokenizer_files
from pia_batch.weights.components import Component

NAMELESS = ("emb_params", "string_to_param", "string_to_param.*", "*", "clip_l", "text_encoders_0")
"""Tensor names of the web UI's format and of pivotal tuning, which names the text encoder; none is the word."""


def vectors_of(shapes: Mapping[str, tuple[int, ...]], where: str) -> str:
    """Return the name of the tensor with the vectors.

    Args:
        shapes: Shapes by tensor name.
        where: Name of the file, for messages.

    Raises:
        ConfigError: There is none, or more than one.
    """
    held = [name for name in shapes if name not in model_kinds.INVERSION_SPARE]
    if len(held) != 1:
        raise ConfigError(
            f"{where} holds {', '.join(sorted(held)) or 'no tensors'}; a textual inversion for Stable Diffusion 1.5 "
            "holds one tensor (one for SDXL holds two)"
        )
    return held[0]


class Words:
    """Words of a model's textual inversions, none of which may be in the vocabulary of its tokenizer."""

    def __init__(self, tokenizer: Component) -> None:
        self._tokenizer = tokenizer
        self._taken: set[str] = set()
        self._folded: set[str] = set()
        self._ends: set[str] = set()
        """For each added token the name that a token of one more vector would have."""
        self.added: list[str] = []
        """Words in the order in which they were added."""

    def add(self, word: str, shape: tuple[int, ...], where: str, remedy: str) -> None:
        """Add a word, and one token more for each further vector, named as diffusers names them.

        Args:
            word: Word that stands for the vectors in a prompt.
            shape: Shape of the vectors, (tokens, features) or (features,).
            where: Name of the file, for messages.
            remedy: Remedy for a word that is taken, for messages.

        Raises:
            ConfigError: The word is blank, or a token is in the vocabulary or belongs to another textual inversion, or
                has a name with which one of the words would seem to have more vectors.
        """
        if not word.strip():
            raise ConfigError(f"{where} has a blank word {word!r}, which no prompt can name; {remedy}")
        if any(ord(each) < ord(" ") for each in word):
            raise ConfigError(f"{where} has the word {word!r} with control characters, which no prompt has; {remedy}")
        if not self._taken:
            self._taken = tokenizer_files.vocabulary(self._tokenizer)
            self._ends = {self._end(token) for token in tokenizer_files.added(self._tokenizer)}
        longest = tokenizer_files.longest_prompt(self._tokenizer)
        if len(shape) > 1 and shape[0] > longest:
            raise ConfigError(
                f"{where} has {shape[0]} vectors, but a prompt has at most {longest} tokens; use one with fewer vectors"
            )
        tokens = [word, *(f"{word}_{k}" for k in range(1, shape[0] if len(shape) > 1 else 1))]
        taken = next((token for token in tokens if token in self._taken or token.lower() in self._folded), None)
        if taken is not None:
            raise ConfigError(
                f"{where} has the word {word!r}, but {taken!r} is already in the vocabulary of the tokenizer, or "
                f"stands for another textual inversion; {remedy}"
            )
        following = f"{word}_{len(tokens)}"
        after = following if following in self._taken else next((each for each in tokens if each in self._ends), None)
        if after is not None:
            raise ConfigError(
                f"{where} has the word {word!r}, but the token {after!r} would be one more vector of the textual "
                f"inversion {after.rpartition('_')[0]!r}, as tokens of several vectors are named; {remedy}"
            )
        self._taken.update(tokens)
        self._ends.add(following)
        self._folded.update(token.lower() for token in tokens)
        self.added.append(word)

    def _end(self, token: str) -> str:
        return next(name for k in itertools.count(1) if (name := f"{token}_{k}") not in self._taken)
