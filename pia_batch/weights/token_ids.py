"""Numbers of a tokenizer's tokens, as transformers assigns them from the files' contents. No torch.

Tokens that are not in the vocabulary get the next free numbers, in the order of the numbers that the files give them.
Sources: transformers 5.24 `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`,
huggingface/tokenizers `AddedVocabulary.add_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

VOCAB, WHOLE, CONFIG = "vocab.json", "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"

DECODER = "added_tokens_decoder"
"""Key of tokenizer_config.json with the added tokens; transformers reads SPECIAL and ADDED only if it is absent."""

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
NAMED = {
    "bos_token": _BEGIN,
    "eos_token": _END,
    "unk_token": _END,
    "sep_token": None,
    "pad_token": _END,
    "cls_token": None,
    "mask_token": None,
}
"""Special tokens in the order in which they are added, with those of CLIP's tokenizer if no file names them."""

Contents = Mapping[str, Mapping[str, Any]]
"""Contents of a tokenizer's JSON files, by file name."""


def assigned(files: Contents) -> dict[str, int]:
    """Return the number of each token."""
    found = vocabulary(files)
    following = len(found)
    for token in added(files):
        number = found.setdefault(token, following)
        following = max(following, number + 1)
    return found


def vocabulary(files: Contents) -> dict[str, int]:
    """Return the tokens of the vocabulary itself, without added ones, with their numbers."""
    vocab = object_in(files[WHOLE].get("model")).get("vocab") if WHOLE in files else files.get(VOCAB)
    return dict(object_in(vocab))


def added(files: Contents) -> Iterator[str]:
    """Yield the tokens that are added to the vocabulary, in their order; some may be in it."""
    config = files.get(CONFIG, {})
    if DECODER in config:
        by_number = {int(number): text_of(token) for number, token in object_in(config[DECODER]).items()}
    else:
        by_number = {number: token for token, number in files.get(ADDED, {}).items()}
        entries = files.get(WHOLE, {}).get("added_tokens") or ()
        by_number |= {entry["id"]: text_of(entry) for entry in map(object_in, entries) if "id" in entry}
    settings = _settings(files)
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    tokens = [by_number[number] for number in sorted(by_number)]
    tokens += [text_of(token) for token in special(files).values()]
    tokens += [text_of(token) for token in extra] if isinstance(extra, list) else []
    yield from (token for token in tokens if token)


def depends_on_added(files: Contents) -> bool:
    """Return True if ADDED changes the tokens of a prompt.

    It does not if another file has the same tokens, or if they are special tokens of the vocabulary.
    """
    others = {name: content for name, content in files.items() if name != ADDED}
    return assigned(files) != assigned(others) or set(added(files)) != set(added(others))


def special(files: Contents) -> dict[str, Any]:
    """Return the special tokens by key, as the files have them; None for null."""
    found: dict[str, Any] = NAMED | {key: value for key, value in _settings(files).items() if key.endswith("_token")}
    extra = object_in(_settings(files).get("extra_special_tokens"))
    return found | {key: value for key, value in extra.items() if key not in found}


def text_of(token: Any) -> str | None:
    """Return the text of a token, which is a text or an object with it; None if it is neither."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _settings(files: Contents) -> dict[str, Any]:
    config = dict(files.get(CONFIG, {}))
    return config if DECODER in config else config | dict(files.get(SPECIAL, {}))


def object_in(value: Any) -> dict[str, Any]:
    """Return a JSON value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}
