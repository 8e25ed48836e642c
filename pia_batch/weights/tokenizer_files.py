"""Files of a CLIP tokenizer: its vocabulary, and checks that it is complete and fits a text encoder. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pia_batch.errors import ConfigError
from pia_batch.weights import components, networks, token_ids
from pia_batch.weights.components import Component
from pia_batch.weights.fetching import FetchedFolder
from pia_batch.weights.token_ids import ADDED, CONFIG, DECODER, SPECIAL, VOCAB, WHOLE, object_in

_MERGES = "merges.txt"
_NAMES = (WHOLE, VOCAB, _MERGES, CONFIG, SPECIAL)

_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_MARKS = ("<|startoftext|>", "<|endoftext|>")
_NEEDED = ("bos_token", "eos_token", "pad_token")
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
    if WHOLE not in found.files and not {VOCAB, _MERGES} <= set(found.files):
        raise ConfigError(f"{source.named} has no vocabulary in tokenizer/; it is not a complete checkpoint")
    held = _contents(found)
    if DECODER not in held.get(CONFIG, {}) and (found.folder / ADDED).is_file():
        held[ADDED] = components.read_json(found.folder / ADDED)
    named = str(held.get(CONFIG, {}).get("tokenizer_class") or _CLASSES[0])
    if named not in _CLASSES:
        raise ConfigError(
            f"{found.folder / CONFIG}: this is a {named}, but the tokenizer must be a {_CLASSES[0]}; use the one of "
            "Stable Diffusion 1.5"
        )
    if VOCAB in held:
        _check_ids(held[VOCAB], found.folder / VOCAB)
    if _MERGES in found.files:
        _check_merges(found.folder / _MERGES, held.get(VOCAB, {}))
    if WHOLE in held:
        model = object_in(held[WHOLE].get("model"))
        if model.get("type", "BPE") != "BPE":
            raise ConfigError(f"{found.folder / WHOLE} is a {model['type']} tokenizer, not that of CLIP, which is BPE")
        _check_ids(object_in(model.get("vocab")), found.folder / WHOLE)
    _check_added(held, found.folder)
    if ADDED in held and token_ids.depends_on_added(held):
        # Only then, so that models whose prompts have the same tokens without it keep their identity.
        return dataclasses.replace(found, files=tuple(sorted((*found.files, ADDED))))
    return found


def check_fit(tokenizer: Component, text_encoder: Component) -> None:
    """Check that a text encoder has a row for each token, and a position for each place in a prompt.

    Raises:
        ConfigError: It has not; with these files, every prompt would fail.
    """
    settings = networks.text_settings(text_encoder.settings)
    rows, positions = settings.get("vocab_size", _VOCABULARY), settings.get("max_position_embeddings", _POSITIONS)
    held = _contents(tokenizer)
    _check_special(held, tokenizer.folder)
    ids = token_ids.assigned(held)
    largest = max(ids, key=lambda token: ids[token])
    if ids[largest] >= rows:
        raise ConfigError(
            f"{tokenizer.folder} has tokens up to number {ids[largest]} ({largest!r}), but the text encoder in "
            f"{text_encoder.folder} has {rows} embeddings; use tokenizer and text encoder of one checkpoint"
        )
    length = held.get(CONFIG, {}).get("model_max_length")
    if not isinstance(length, int) or not _MIN_TOKENS <= length <= positions:
        raise ConfigError(
            f"{tokenizer.folder / CONFIG}: invalid model_max_length (got {length}, expected {_MIN_TOKENS} to "
            f"{positions}, the positions of the text encoder); correct it, or fetch the file again"
        )


def _check_special(held: token_ids.Contents, folder: Path) -> None:
    """Check that every special token is a text, and that a prompt's beginning and end are in the vocabulary."""
    named = token_ids.special(held)
    for key in token_ids.NAMED:
        token = named[key]
        if token is None and key not in _NEEDED:
            continue
        is_typed = not isinstance(token, dict) or token.get("__type") == "AddedToken" or key in held.get(SPECIAL, {})
        if token_ids.text_of(token) is None or not is_typed:
            raise ConfigError(
                f"{folder}: invalid {key} (got {json.dumps(token)}, expected a text); use the tokenizer of Stable "
                "Diffusion 1.5"
            )
    known = token_ids.vocabulary(held)
    for key in ("bos_token", "eos_token"):
        text = token_ids.text_of(named[key])
        if text not in known:
            raise ConfigError(
                f"{folder} has no token {text!r} in its vocabulary, which is its {key}; use the tokenizer of Stable "
                "Diffusion 1.5"
            )


def longest_prompt(tokenizer: Component) -> int:
    """Return the largest number of tokens of a prompt, without those of its beginning and end; `check_fit` is first."""
    length: int = components.read_json(tokenizer.folder / CONFIG)["model_max_length"]
    return length - 2


def vocabulary(tokenizer: Component) -> set[str]:
    """Return all tokens of a tokenizer, from its files."""
    return set(token_ids.assigned(_contents(tokenizer)))


def added(tokenizer: Component) -> set[str]:
    """Return the tokens that a tokenizer's files add to its vocabulary, special ones included."""
    return set(token_ids.added(_contents(tokenizer)))


def _contents(tokenizer: Component) -> dict[str, dict[str, Any]]:
    return {name: components.read_json(tokenizer.folder / name) for name in tokenizer.files if name.endswith(".json")}


def _check_added(held: token_ids.Contents, folder: Path) -> None:
    """Check that all added tokens have numbers.

    Raises:
        ConfigError: One has none, or the config's added tokens are no objects by number.
    """
    _check_numbers(held.get(ADDED, {}), folder / ADDED)
    entries = held.get(WHOLE, {}).get("added_tokens") or []
    listed = entries if isinstance(entries, list) else [entries]
    _check_numbers({str(object_in(one).get("content")): object_in(one).get("id") for one in listed}, folder / WHOLE)
    decoder = held.get(CONFIG, {}).get(DECODER, {})
    wrong = (
        "it is no object"
        if not isinstance(decoder, dict)
        else next((f"{key!r} is no number of a token" for key, one in decoder.items() if not _is_added(key, one)), None)
    )
    if wrong is not None:
        raise ConfigError(f"{folder / CONFIG}: invalid {DECODER} ({wrong}); fetch the file again")


def _is_added(number: str, token: Any) -> bool:
    return number.isdecimal() and isinstance(token, dict)


def _check_ids(vocab: dict[str, Any], path: Path) -> None:
    if not vocab:
        raise ConfigError(f"{path} holds no tokens; it is not a vocabulary: fetch the file again")
    _check_numbers(vocab, path)


def _check_numbers(vocab: Mapping[str, Any], path: Path) -> None:
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
    first_special = min((vocab[token] for token in _MARKS if token in vocab), default=len(vocab))
    missing = [
        token
        for token, number in vocab.items()
        if number < first_special and len(token.removesuffix(_WORD_END)) > 1 and token not in made
    ]
    if missing:
        raise ConfigError(
            f"{path} has no merge for {len(missing)} tokens of {VOCAB}, such as {missing[0]!r}: it was cut short, or "
            "is of another tokenizer; fetch both files again"
        )
