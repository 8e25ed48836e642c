"""Prompt templates: columns in braces, struct fields, lists, and errors that name the nearest column."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pia_batch.datasets.templates import Template, as_texts, find, values_of
from pia_batch.errors import ConfigError

TABLE = pa.table(
    {
        "caption": [" a cat ", None, "", "d{o}g"],
        "style": ["ink", "oil", "ink", "oil"],
        "meta": [{"tags": ["a", "b"], "year": 1999}, {"tags": [], "year": 2000}, {"tags": None, "year": None}, None],
        "a.b": [1, 2, 3, 4],
        "score": [0.5, 1.0, 2.0, None],
        "image": [b"x"] * 4,
    }
)


def filled(text: str) -> list[str | None]:
    def texts(path: str) -> pa.Array:
        found = as_texts(values_of(TABLE, find(TABLE.schema, path, "--prompt")))
        assert found is not None
        return found

    prompts: list[str | None] = Template(text, "--prompt").fill(len(TABLE), texts).to_pylist()
    return prompts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{caption}, cinematic, {style}", ["a cat, cinematic, ink", None, None, "d{o}g, cinematic, oil"]),
        ("{meta.tags}", ["a, b", None, None, None]),
        ("of {meta.year}", ["of 1999", "of 2000", None, None]),
        ("{a.b}", ["1", "2", "3", "4"]),
        ("{{literal}} {style}{style}", ["{literal} inkink", "{literal} oiloil"] * 2),
        ("no column", ["no column"] * 4),
        ("{score}", ["0.5", "1", "2", None]),
    ],
)
def test_a_template_is_filled_row_by_row(text: str, expected: list[str | None]) -> None:
    assert filled(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{captoin}", ["no column 'captoin'", "did you mean 'caption'", "style"]),
        ("{meta.tgas}", ["no column 'meta.tgas'", "did you mean 'meta.tags'"]),
        ("{caption", ["write a column as {NAME}", "--prompt"]),
        ("{}", ["write columns as {NAME}"]),
        ("{caption!r}", ["without a format"]),
        ("{score:.2f}", ["without a format"]),
        ("{caption[0]}", ["without a format"]),
    ],
)
def test_an_error_names_the_option_and_the_remedy(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        filled(text)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_columns_without_text_have_none() -> None:
    assert as_texts(TABLE["image"].combine_chunks()) is None
    assert as_texts(TABLE["meta"].combine_chunks()) is None
