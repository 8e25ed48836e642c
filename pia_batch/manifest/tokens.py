"""Lower bounds of the number of tokens of prompts, computed without a model's tokenizer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.keys import text_bytes

MAX_TOKENS = 77
"""Number of tokens that CLIP's text encoder reads, its two markers included; longer prompts are cut."""

_MARKERS = 2

_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}\p{Z}\p{C}]+"
"""Words that CLIP's tokenizer splits a text into before it looks them up: each becomes one token or more. A letter and
its marks count as one, because the tokenizer composes them first.

Source: openai/CLIP `simple_tokenizer.py`."""

_MAX_WORDS = MAX_TOKENS - _MARKERS

_AT_ONCE = 4096
"""Number of prompts that are processed together: more of them do not fit a processor's cache, at twice the cost."""


def are_truncated(prompts: pa.StringArray) -> pa.Array:
    """Return for each prompt if it certainly has more than MAX_TOKENS tokens; bool, of the same length.

    Args:
        prompts: Texts without nulls, none longer than 16 kB.
    """
    blocks = [_are_truncated(prompts.slice(start, _AT_ONCE)) for start in range(0, len(prompts), _AT_ONCE)]
    return pa.array(np.concatenate([np.empty(0, bool), *blocks]))


def least_tokens(prompts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a lower bound of the tokens of each prompt, markers included; int32."""
    return pc.add(pc.count_substring_regex(prompts, _WORDS), pa.scalar(_MARKERS, pa.int32()))


def _are_truncated(prompts: pa.StringArray) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(prompts), dtype=bool)
    # Each word takes at least one byte. Exact counting is slow, and is done only where the bounds differ.
    rows = np.flatnonzero(np.asarray(pc.binary_length(prompts)) > _MAX_WORDS)
    long = prompts if len(rows) == len(prompts) else prompts.take(pa.array(rows))
    most = _most_words(long)
    rows, long, most = rows[most > _MAX_WORDS], long.filter(pa.array(most > _MAX_WORDS)), most[most > _MAX_WORDS]
    certain = most - _surplus(long) > _MAX_WORDS
    found[rows[certain]] = True
    found[rows[~certain]] = np.asarray(least_tokens(long.filter(pa.array(~certain)))) > MAX_TOKENS
    return found


def _most_words(prompts: pa.StringArray) -> npt.NDArray[np.int16]:
    """Return an upper bound of the words that `least_tokens` counts, at a tenth of its cost. No prompt is empty."""
    kinds = _translated(prompts, _KINDS)
    begun = kinds.copy()
    begun[1:] ^= kinds[1:] & kinds[:-1] & (_LETTER | _SIGN)  # a byte that continues a run does not begin a word
    starts = _starts(prompts)
    begun[starts] = kinds[starts]
    counts: npt.NDArray[np.int16] = np.add.reduceat(begun != 0, starts, dtype=np.int16)
    return counts


def _surplus(prompts: pa.StringArray) -> npt.NDArray[np.int16]:
    """Return the number of words by which `_most_words` may be too large. No prompt is empty."""
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
"""First byte that begins a character outside ASCII; bytes from 0x80 up to it continue one."""


def _kind(byte: int) -> int:
    """Return the kind of word that a byte may begin: letters, signs, or a digit or non-ASCII character alone."""
    text = chr(byte)
    if not text.isascii():
        return _ALONE if byte >= _FIRST_OF_SEVERAL else 0
    if not text.isprintable() or text == " ":
        return 0
    return _LETTER if text.isalpha() else _ALONE if text.isdigit() else _SIGN


def _doubt(byte: int) -> int:
    """Return by how much a byte may lower the count: `'s` is one word, and so are letters of any script in a row."""
    return 2 if byte >= _FIRST_OF_SEVERAL else int(chr(byte) == "'")


_KINDS, _DOUBTS = (bytes(map(of, range(256))) for of in (_kind, _doubt))
