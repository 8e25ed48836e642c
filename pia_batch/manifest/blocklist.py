"""Blocklist: words and phrases that no prompt may hold, compared by whole words whatever their case."""

from __future__ import annotations

import functools
import json
import unicodedata
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import RunConfig
from pia_batch.config.safety import is_word
from pia_batch.errors import ConfigError, PiaBatchError, message_of, problem_of
from pia_batch.storage import file_kinds, filesystems
from pia_batch.storage.uris import redacted_uri

MAX_BLOCKLIST_BYTES = 4 * 2**20
"""Size of the largest blocklist, in bytes: some 400,000 words."""

_NO_LETTER = r"[^\pL\pM\pN]+"
"""Everything between two words: neither letters, nor the marks on them, nor digits."""


def with_blocklist(config: RunConfig) -> RunConfig:
    """Return `config` with the words of `safety.blocklist` among `safety.blocked_words`: workers may lack the file.

    Raises:
        ConfigError: The file cannot be read, is no UTF-8 text, or is larger than MAX_BLOCKLIST_BYTES.
    """
    if config.safety.blocklist is None:
        return config
    words = dict.fromkeys((*config.safety.blocked_words, *_read(config.safety.blocklist)))
    return config.model_copy(update={"safety": config.safety.model_copy(update={"blocked_words": tuple(words)})})


def _read(uri: str) -> list[str]:
    """Return the words of a file, one a line, without comments and empty lines."""
    place = f"safety.blocklist {redacted_uri(uri)}"
    try:
        filesystem, path = filesystems.arrow_filesystem(uri)
        with filesystem.open_input_stream(path, compression=None) as stream:
            data = stream.read(MAX_BLOCKLIST_BYTES + 1)
    except PiaBatchError:
        raise
    except Exception as err:  # noqa: BLE001 - every file system has its own classes for what goes wrong
        remedy = filesystems.reading_remedy(uri, err) or "give the URI of a text file with one word a line"
        raise ConfigError(f"cannot read {place}: {problem_of(err)}; {remedy}") from None
    if len(data) > MAX_BLOCKLIST_BYTES:
        msg = f"{place} is larger than {MAX_BLOCKLIST_BYTES} bytes; give a text file with one word a line"
        raise ConfigError(msg)
    what = _other_format(bytes(data))
    if what is not None:
        msg = f"{place} is {what}, and would block nothing; save it as UTF-8 text, one word a line"
        raise ConfigError(msg)
    try:
        lines = bytes(data).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as err:
        msg = f"{place} is no UTF-8 text: {message_of(err)}; save it as UTF-8, one word a line"
        raise ConfigError(msg) from None
    words = []
    for number, word in enumerate((line.strip() for line in lines), 1):
        if not word or word.startswith("#"):
            continue
        if not is_word(word):
            msg = f"{place}, line {number}: {word!r} has neither letters nor digits; remove the line"
            raise ConfigError(msg)
        words.append(word)
    return words


def _other_format(data: bytes) -> str | None:
    """Return the format of a file that is no text with one word a line, in words; None for such text."""
    head = data[: file_kinds.HEAD_BYTES]
    kind, wide = file_kinds.identify(head), file_kinds.wide_encoding(head)
    if kind is not None:
        return kind.what
    if wide is not None:
        return f"text in {wide}"
    if b"\0" in data:
        return "not text"
    with suppress(ValueError, RecursionError):
        return "JSON" if isinstance(json.loads(data), list | dict) else None
    return None


def blocked(prompts: pa.Array, blocked_words: tuple[str, ...]) -> pa.Array:
    """Return the blocked word or phrase that each prompt holds, the first of them; null where there is none.

    Both are normalised alike before they are compared: to NFKC, so that full-width letters and ligatures are the
    plain ones, and by full case folding, so that `STRASSE` is `straße`.

    Args:
        prompts: String column; nulls hold no word.
        blocked_words: Words and phrases. The words of a phrase stand next to each other in a prompt, whatever is
            between them.
    """
    if not blocked_words or prompts.null_count == len(prompts):
        return pa.nulls(len(prompts), pa.string())
    single, phrases = _split(blocked_words)
    words = pc.split_pattern_regex(_folded(prompts), _NO_LETTER)
    at = pc.index_in(pc.list_flatten(words), value_set=pa.array(list(single), pa.string()))
    hits = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
    rows, first = np.unique(pc.list_parent_indices(words).to_numpy()[hits], return_index=True)
    found = np.full(len(prompts), -1)
    found[rows] = at.take(pa.array(hits[first])).to_numpy()
    named = pa.array(list(single.values()), pa.string()).take(pa.array(found, mask=found < 0))
    if phrases:
        texts = pc.binary_join_element_wise(" ", pc.binary_join(words, " "), " ", "")
        for phrase, shown in phrases.items():
            holds = pc.fill_null(pc.match_substring(texts, f" {phrase} "), False)
            named = pc.if_else(pc.and_(holds, pc.is_null(named)), shown, named)
    return named


@functools.lru_cache(4)
def _split(blocked_words: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Return single words and phrases apart: as they are compared, and as they were written."""
    normal = {" ".join(_words_of(word)): word for word in reversed(blocked_words)}
    single = {word: shown for word, shown in normal.items() if " " not in word}
    return single, {phrase: shown for phrase, shown in normal.items() if " " in phrase}


def _words_of(text: str) -> list[str]:
    words: list[str] = pc.split_pattern_regex(_folded(pa.array([text])), _NO_LETTER)[0].as_py()
    return [word for word in words if word]


def _folded(texts: pa.Array) -> pa.Array:
    """Return texts in NFKC and with full case folding. Arrow folds ASCII; the few other texts go through Python."""
    plain = pc.fill_null(pc.string_is_ascii(texts), True)
    lower = pc.ascii_lower(texts)
    if pc.all(plain).as_py():
        return lower
    others = [
        unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        for text in texts.filter(pc.invert(plain)).to_pylist()
    ]
    return pc.replace_with_mask(lower, pc.invert(plain), pa.array(others, pa.string()))
