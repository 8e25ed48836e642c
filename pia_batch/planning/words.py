"""Words of textual inversions, and how many prompts of a manifest use them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import RunConfig
from pia_batch.manifest.key_prompts import joined_texts
from pia_batch.weights.resolve import resolve

Words = Mapping[str, Sequence[str]]
"""Words of the textual inversions of each model that has any, by the model's name."""

NO_WORDS: Words = {}


def words_of(config: RunConfig) -> Words:
    """Return the words of all models.

    Raises:
        ConfigError: A model cannot be found.
    """
    having = {name: model for name, model in config.all_models.items() if model.textual_inversions or model.loras}
    found = {name: resolve(model).words for name, model in having.items()}
    return {name: words for name, words in found.items() if words}


def key_of(model: str, word: str) -> str:
    """Return the key of a model's word in the counts."""
    return f"{model}\0{word}"


def count_words(requests: pa.Table, words: Words) -> Counter[str]:
    """Return the number of requests of each model with each of its words in the prompt or the negative prompt.

    Case is folded, as CLIP's tokenizer folds it, and a word counts inside of others, as the tokenizer finds it.

    Args:
        requests: Valid rows, as `validation.check` returns them.
        words: Words by model.
    """
    counts: Counter[str] = Counter()
    for model, own in words.items():
        rows = requests.filter(pc.equal(requests["model"], model))
        texts = [*(rows[name] for name in ("prompt", "negative_prompt")), *_joined_keys(rows)]
        for word in own:
            used = [pc.fill_null(pc.match_substring(text, word, ignore_case=True), False) for text in texts]
            counts[key_of(model, word)] += pc.sum(functools.reduce(pc.or_, used)).as_py() or 0
    return +counts


def _joined_keys(rows: pa.Table) -> Iterator[pa.Array]:
    """Yield the texts of each row's key prompts as one text a row, positive and then negative ones."""
    for name in ("prompts", "negative_prompts"):
        keys = rows[name].combine_chunks()
        if keys.null_count < len(keys):
            yield joined_texts(keys)
