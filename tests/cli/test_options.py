"""Options that several commands share, as they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.cli.options import names_in
from pia_batch.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("prompt", ("prompt",)),
        ("prompt, seed ", ("prompt", "seed")),
        ('"a,b",c', ("a,b", "c")),
        ('" a ", "b"', (" a ", "b")),
        ('""', ("",)),
        ('"say ""x"""', ('say "x"',)),
        ('5" plate', ('5" plate',)),
        ('"a"b', ('"a"b',)),
        ("a\nb", ("a\nb",)),
        ("cafe\u0301,caf\u00e9", ("cafe\u0301", "caf\u00e9")),
    ],
)
def test_columns_of_every_name_can_be_listed(text: str, names: tuple[str, ...]) -> None:
    assert names_in(text, "--columns") == names


@given(st.lists(st.text(max_size=8), min_size=1, max_size=4))
def test_a_name_in_quotes_is_taken_letter_by_letter(names: list[str]) -> None:
    text = ",".join('"' + name.replace('"', '""') + '"' for name in names)

    assert names_in(text, "--columns") == tuple(names)


@pytest.mark.parametrize("text", ["", ",", "a,,b", "a, ", " "])
def test_a_list_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--pair-by: invalid value .*in double quotes"):
        names_in(text, "--pair-by")
