from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pia_batch.manifest.tokens import MAX_TOKENS, _most_words, _surplus, are_truncated, least_tokens
from pia_batch.weights import sd15

TEXTS = st.text(min_size=1, max_size=60) | st.text(
    alphabet="aB1'sSltTvVe.,!? -é中🐱\n\x85\u0301\u3000\u200b½²ﬀẞ\u017f\x7f_", min_size=1, max_size=60
)


def test_prompts_of_certainly_too_many_tokens_are_found() -> None:
    enough, more = MAX_TOKENS - 2, MAX_TOKENS - 1
    prompts = {
        "short": False,
        "a " * enough: False,
        "a " * more: True,
        "1" * enough: False,
        "1" * more: True,
        "word" * more: False,  # one word: into how many tokens it is cut only the vocabulary says
        "中文" * more: False,
        "中 " * more: True,
        "it's " * 37: False,
        "it's " * 38: True,
        "(" * more: False,
    }

    assert are_truncated(pa.array(list(prompts))).to_pylist() == list(prompts.values())
    assert are_truncated(pa.array([], pa.string())).to_pylist() == []


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5), st.integers(1, 40))
def test_the_cheap_bounds_enclose_what_is_counted(texts: list[str], times: int) -> None:
    prompts = pa.array(["before", "", *texts, *(text * times for text in texts)])
    prompts = prompts.slice(2)  # what lies in the buffer before it must not count
    counted = [least - 2 for least in least_tokens(prompts).to_pylist()]

    most, surplus = _most_words(prompts).tolist(), _surplus(prompts).tolist()

    assert all(high - doubt <= words <= high for high, doubt, words in zip(most, surplus, counted, strict=True))
    assert are_truncated(prompts).to_pylist() == [words + 2 > MAX_TOKENS for words in counted]


@pytest.mark.parametrize(
    ("text", "most", "surplus"),
    [
        ("a red, red cat", 5, 0),
        ("it's 1999", 7, 1),
        ("(((masterpiece:1.2)))", 7, 0),
        ("naïve 中文", 5, 6),
        ("  \n", 0, 0),
    ],
)
def test_the_cheap_bounds_are_near_for_english(text: str, most: int, surplus: int) -> None:
    prompts = pa.array([text, text])

    assert (_most_words(prompts).tolist(), _surplus(prompts).tolist()) == ([most] * 2, [surplus] * 2)


def test_the_bound_of_tokens_never_exceeds_what_the_tokenizer_of_the_model_counts() -> None:
    from transformers import CLIPTokenizer  # noqa: PLC0415 - takes a second

    tokenizer = CLIPTokenizer.from_pretrained(sd15.PATH / "tokenizer")

    @settings(max_examples=150, deadline=None)
    @given(st.just("") | TEXTS)
    def holds(text: str) -> None:
        assert least_tokens(pa.array([text]))[0].as_py() <= len(tokenizer(text)["input_ids"])

    holds()
    exact = "a photograph of a cat, 35mm, it's 4 o'clock"
    assert least_tokens(pa.array([exact]))[0].as_py() == len(tokenizer(exact)["input_ids"])
