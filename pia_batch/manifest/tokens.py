"""How many tokens a prompt has at least, told without the tokenizer of a model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.keys import text_bytes

MAX_TOKENS = 77
"""What CLIP's text encoder reads, its two markers included; of a longer prompt the end is lost."""

_MARKERS = 2

_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}\p{Z}\p{C}]+"
"""What CLIP's tokenizer cuts a text into before it looks into its vocabulary: each becomes one token or more. Marks and
the letters that they stand on count as one, as it puts them together first.

Source: openai/CLIP `simple_tokenizer.py`."""

_MAX_WORDS = MAX_TOKENS - _MARKERS

_AT_ONCE = 4096
"""Prompts whose bytes are looked at together: more of them fall out of a processor's cache, at twice the price."""


def are_truncated(prompts: pa.StringArray) -> pa.Array:
    """Which prompts have certainly more than MAX_TOKENS tokens; bool, of the same length.

    Args:
        prompts: no nulls, none of them longer than 16 kB.
    """
    blocks = [_are_truncated(prompts.slice(start, _AT_ONCE)) for start in range(0, len(prompts), _AT_ONCE)]
    return pa.array(np.concatenate([np.empty(0, bool), *blocks]))


def least_tokens(prompts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A lower bound of the tokens of each prompt, markers included. int32."""
    return pc.add(pc.count_substring_regex(prompts, _WORDS), pa.scalar(_MARKERS, pa.int32()))


def _are_truncated(prompts: pa.StringArray) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(prompts), dtype=bool)
    # Each word takes a byte at least; and to count exactly is so slow that it is done only where the bounds differ.
    rows = np.flatnonzero(np.asarray(pc.binary_length(prompts)) > _MAX_WORDS)
    long = prompts if len(rows) == len(prompts) else prompts.take(pa.array(rows))
    most = _most_words(long)
    rows, long, most = rows[most > _MAX_WORDS], long.filter(pa.array(most > _MAX_WORDS)), most[most > _MAX_WORDS]
    certain = most - _surplus(long) > _MAX_WORDS
    found[rows[certain]] = True
    found[rows[~certain]] = np.asarray(least_tokens(long.filter(pa.array(~certain)))) > MAX_TOKENS
    return found


def _most_words(prompts: pa.StringArray) -> npt.NDArray[np.int16]:
    """As many words as `least_tokens` counts, or more, at a tenth of its price. None of the prompts is empty."""
    kinds = _translated(prompts, _KINDS)
    begun = kinds.copy()
    begun[1:] ^= kinds[1:] & kinds[:-1] & (_LETTER | _SIGN)  # what goes on begins no word
    starts = _starts(prompts)
    begun[starts] = kinds[starts]
    counts: npt.NDArray[np.int16] = np.add.reduceat(begun != 0, starts, dtype=np.int16)
    return counts


def _surplus(prompts: pa.StringArray) -> npt.NDArray[np.int16]:
    """How many of `_most_words` may be none. None of the prompts is empty."""
    counts: npt.NDArray[np.int16] = np.add.reduceat(_translated(prompts, _DOUBTS), _starts(prompts), dtype=np.int16)
    return counts


def _translated(prompts: pa.StringArray, table: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text_bytes(prompts).tobytes().translate(table), np.uint8)


def _starts(prompts: pa.StringArray) -> npt.NDArray[np.int64]:
    lengths = np.asarray(pc.binary_length(prompts), np.int64)
    starts: npt.NDArray[np.int64] = np.cumsum(lengths) - lengths
    return starts


_LETTER, _SIGN, _ALONE = 1, 2, 4

_FIRST_OF_SEVERAL = 0xC0
"""Bytes from here on begin a character that is no ASCII; those below, from 0x80, continue one."""


def _kind(byte: int) -> int:
    """What a byte of UTF-8 may begin: a run of letters or signs; or a digit or foreign character, each for itself."""
    text = chr(byte)
    if not text.isascii():
        return _ALONE if byte >= _FIRST_OF_SEVERAL else 0
    if not text.isprintable() or text == " ":
        return 0
    return _LETTER if text.isalpha() else _ALONE if text.isdigit() else _SIGN


def _doubt(byte: int) -> int:
    """How many words fewer there may be: `'s` is one, and so are a letter of any script and those around it."""
    return 2 if byte >= _FIRST_OF_SEVERAL else int(chr(byte) == "'")


_KINDS, _DOUBTS = (bytes(map(of, range(256))) for of in (_kind, _doubt))
