"""Configs as editors, programs and other languages write them: read as what they say, or refused by their line."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.config import RunConfig, yaml_text
from pia_batch.config.layers import read_yaml
from pia_batch.errors import ConfigError

TREE = {"manifest": "m.parquet", "defaults": {"negative_prompt": "😀 é"}}
TEXT = 'manifest: m.parquet\ndefaults:\n  negative_prompt: "😀 é"\n'


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF8 * 2 + TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        f"---\n{TEXT}...\n".encode(),
        json.dumps(TREE).encode(),  # with the character outside of the first plane as two escapes
        json.dumps(TREE, indent=2, ensure_ascii=False).encode(),
        b"manifest: m.parquet\ndefaults:\n  <<: {negative_prompt: x}\n" + b'  negative_prompt: "\\U0001F600 \\xe9"\n',
    ],
)
def test_a_config_is_read_in_each_form_that_programs_write(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data)

    assert read_yaml(path) == TREE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("utf-16"), "text in UTF-16; it must be YAML in UTF-8"),
        (TEXT.encode("utf-16-le"), "text in UTF-16; it must be YAML in UTF-8"),
        (TEXT.encode("utf-32"), "text in UTF-32; it must be YAML in UTF-8"),
        (b"a: caf\xe9\n", "it must be YAML in UTF-8"),
        (b"a:\n\tb: 1\n", "line 2, column 1: found character '\\t' that cannot start any token; write spaces in place"),
        (b"a: 1\na: 2\n", "line 2, column 1: the key 'a' is in line 1 already"),
        (b'a: 1\nb: "\\ud83d"\n', "line 2, column 4: an escape such as \\ud83d is half of a surrogate pair"),
        (
            b"a: 2026-13-45\n",
            "line 1, column 4: '2026-13-45' is no valid timestamp (month must be in 1..12)",
        ),
        (b"a: 2026-11-22T99:00:00Z\n", "line 1, column 4: '2026-11-22T99:00:00Z' is no valid timestamp (hour must be"),
        (
            b"a: [1, " + b"9" * 5000 + b"]\n",
            "line 1, column 8: a whole number of 5000 digits, and at most 100",
        ),
        (b"a: 0x" + b"f" * 5000, "line 1, column 4: a whole number of 5002 digits, and at most 100 are read"),
        (b"a: !!int x\n", "line 1, column 4: 'x' is no valid int (invalid literal"),
        (b"a: !!int ''\n", "line 1, column 4: '' is no valid int"),
        (b"a: !!bool x\n", "line 1, column 4: 'x' is no valid bool"),
        (b"a: !env X\n", "line 1, column 4: could not determine a constructor for the tag '!env'"),
    ],
)
def test_a_config_that_is_not_read_is_refused_with_its_line_and_a_remedy(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data)

    with pytest.raises(ConfigError) as refused:
        read_yaml(path)

    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_text_that_yaml_reads_as_a_date_is_shown_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("manifest: m.parquet\noutput: out\nrun_id: 2026-11-22\n")

    with pytest.raises(
        ConfigError, match=r"run_id: must be a text \(got 2026-11-22\); in YAML, write such a text in quotes"
    ):
        RunConfig.load(path)


@given(
    st.recursive(
        st.text() | st.integers(-(2**63), 2**64) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_as_every_program_writes_it_is_read_as_its_values(value: Any) -> None:
    assert yaml_text.parse(json.dumps(value)) == value
