"""Files of a CLIP tokenizer: its vocabulary, and checks that it is complete and fits a text encoder. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pia_batch.errors import ConfigError
from pia_batch.weights import components, networks
from pia_batch.weights.components import Component
from pia_batch.weights.fetching import FetchedFolder

_VOCAB, _MERGES, _WHOLE, _CONFIG = "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"
_NAMES = (_WHOLE, _VOCAB, _MERGES, _CONFIG, "special_tokens_map.json")
_ALSO_READ = ("added_tokens.json",)

_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
_WORD_END = "</w>"
_POSITIONS, _VOCABULARY = 77, 49408
"""Defaults of `max_position_embeddings` and `vocab_size`. Source: transformers, `CLIPTextConfig`."""

_MIN_TOKENS = 3
"""Smallest usable length of a prompt: its beginning, one token and its end."""


def find(source: FetchedFolder) -> Component:
    """Return the part `tokenizer`.

    Raises:
        ConfigError: It has no vocabulary, or a file of it is damaged, cut short or not what its name says.
    """
    found = components.plain(source, "tokenizer", _NAMES)
    if _WHOLE not in found.files and not {_VOCAB, _MERGES} <= set(found.files):
        raise ConfigError(f"{source.named} has no vocabulary in tokenizer/; it is not a complete checkpoint")
    held = {
        name: components.read_json(found.folder / name)
        for name in (*found.files, *_ALSO_READ)
        if name.endswith(".json") and (found.folder / name).is_file()
    }
    named = str(held.get(_CONFIG, {}).get("tokenizer_class") or _CLASSES[0])
    if named not in _CLASSES:
        raise ConfigError(
            f"{found.folder / _CONFIG}: this is a {named}, but the tokenizer must be a {_CLASSES[0]}; use the one of "
            "Stable Diffusion 1.5"
        )
    if _VOCAB in held:
        _check_ids(held[_VOCAB], found.folder / _VOCAB)
    if _MERGES in found.files:
        _check_merges(found.folder / _MERGES, held.get(_VOCAB, {}))
    if _WHOLE in held:
        model = _object(held[_WHOLE].get("model"))
        if model.get("type", "BPE") != "BPE":
            raise ConfigError(f"{found.folder / _WHOLE} is a {model['type']} tokenizer, not that of CLIP, which is BPE")
        _check_ids(_object(model.get("vocab")), found.folder / _WHOLE)
    return found


def check_fit(tokenizer: Component, text_encoder: Component) -> None:
    """Check that a text encoder has a row for each token, and a position for each place in a prompt.

    Raises:
        ConfigError: It has not; with these files, every prompt would fail.
    """
    settings = networks.text_settings(text_encoder.settings)
    rows, positions = settings.get("vocab_size", _VOCABULARY), settings.get("max_position_embeddings", _POSITIONS)
    ids = _ids(tokenizer)
    largest = max(ids.values(), default=0)
    if largest >= rows:
        raise ConfigError(
            f"{tokenizer.folder} has tokens up to number {largest}, but the text encoder in {text_encoder.folder} has "
            f"{rows} embeddings; use tokenizer and text encoder of one checkpoint"
        )
    config = components.read_json(tokenizer.folder / _CONFIG) if _CONFIG in tokenizer.files else {}
    length = config.get("model_max_length")
    if not isinstance(length, int) or not _MIN_TOKENS <= length <= positions:
        raise ConfigError(
            f"{tokenizer.folder / _CONFIG}: invalid model_max_length (got {length}, expected {_MIN_TOKENS} to "
            f"{positions}, the positions of the text encoder); correct it, or fetch the file again"
        )
    for key, usual in _SPECIAL.items():
        token = config.get(key) or usual
        text = str(token.get("content") if isinstance(token, dict) else token)
        if text not in ids:
            raise ConfigError(
                f"{tokenizer.folder} has no token {text!r} in its vocabulary, which is its {key}; use the tokenizer of "
                "Stable Diffusion 1.5"
            )


def longest_prompt(tokenizer: Component) -> int:
    """Return the largest number of tokens of a prompt, without those of its beginning and end; `check_fit` is first."""
    length: int = components.read_json(tokenizer.folder / _CONFIG)["model_max_length"]
    return length - 2


def vocabulary(tokenizer: Component) -> set[str]:
    """Return all tokens of a tokenizer, from its files."""
    return set(_ids(tokenizer))


def _ids(tokenizer: Component) -> dict[str, int]:
    """Return the numbers of all tokens."""
    found: dict[str, int] = {}
    for name in (*tokenizer.files, *_ALSO_READ):
        if not name.endswith(".json") or not (tokenizer.folder / name).is_file():
            continue
        content = components.read_json(tokenizer.folder / name)
        if name in (_VOCAB, *_ALSO_READ):
            found |= _numbers(content.items())
        if name == _WHOLE:
            found |= _numbers(_object(_object(content.get("model")).get("vocab")).items())
            added = [_object(one) for one in content.get("added_tokens") or ()]
            found |= _numbers((one.get("content"), one.get("id")) for one in added)
        if name == _CONFIG:
            added_tokens = _object(content.get("added_tokens_decoder")).items()
            found |= _numbers((_object(one).get("content"), number) for number, one in added_tokens)
    return found


def _numbers(pairs: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    """Return tokens with their numbers, which some files have as text; what has no number is left out."""
    return {str(token): int(number) for token, number in pairs if str(number).isdecimal()}


def _check_ids(vocab: dict[str, Any], path: Path) -> None:
    if not vocab:
        raise ConfigError(f"{path} holds no tokens; it is not a vocabulary: fetch the file again")
    wrong = next((token for token, number in vocab.items() if type(number) is not int or number < 0), None)
    if wrong is not None:
        raise ConfigError(f"{path}: token {wrong!r} has no number (got {vocab[wrong]!r}); fetch the file again")


def _check_merges(path: Path, vocab: dict[str, int]) -> None:
    """Check that every token of several characters is made by a merge, so that a file that was cut short is found.

    Raises:
        ConfigError: A line is not a merge, or merges are missing. Prompts would then have other tokens.
    """
    made = set()
    for number, line in enumerate(components.read_text(path).removesuffix("\n").split("\n"), 1):
        if line.startswith("#version"):
            continue
        parts = line.removesuffix("\r").split(" ")
        if len(parts) != 2 or not all(parts):  # noqa: PLR2004 - a pair
            raise ConfigError(
                f"{path}, line {number}: not two tokens with one space ({line[:40]!r}); fetch the file again"
            )
        made.add("".join(parts))
    first_special = min((vocab[token] for token in _SPECIAL.values() if token in vocab), default=len(vocab))
    missing = [
        token
        for token, number in vocab.items()
        if number < first_special and len(token.removesuffix(_WORD_END)) > 1 and token not in made
    ]
    if missing:
        raise ConfigError(
            f"{path} has no merge for {len(missing)} tokens of {_VOCAB}, such as {missing[0]!r}: it was cut short, or "
            "is of another tokenizer; fetch both files again"
        )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
