"""Words that no prompt may hold: how they are read, compared and reported."""

import gzip
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError
from pia_batch.manifest import blocklist
from pia_batch.manifest.blocklist import blocked, with_blocklist
from pia_batch.manifest.validation import check
from pia_batch.planning.plan import make_plan


def config(**safety: Any) -> RunConfig:
    paths = {"manifest": "requests.parquet", "output": "out"}
    return RunConfig.load(None, paths | {f"safety.{name}": value for name, value in safety.items()})


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a gun on a table", "gun"),
        ("GUN", "gun"),
        ("a (gun:1.3), cinematic", "gun"),
        ("gun-fight", "gun"),
        ("the gun\u2019s smoke", "gun"),
        ("a \uff47\uff55\uff4e", "gun"),  # full-width letters
        ("STRASSE am Abend", "Straße"),
        ("die straße", "STRASSE"),
        ("Стрельба", "стрельба"),
        ("ce\u0301sar", "c\u00e9sar"),  # a mark of its own, and one letter with it
        ("naked   LUNCH", "naked lunch"),
        ("naked, lunch", "naked lunch"),
        ("18+", "18"),
    ],
)
def test_a_whole_word_is_found_whatever_its_case_and_form(prompt: str, word: str) -> None:
    assert blocked(pa.array(["a red kite", prompt, None]), (word,)).to_pylist() == [None, word, None]


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a gunner's hat", "gun"),
        ("begun", "gun"),
        ("gun_metal grey", "gunmetal"),
        ("naked at lunch", "naked lunch"),
        ("lunch naked", "naked lunch"),
        ("1800", "18"),
        ("стрельбами", "стрельба"),
    ],
)
def test_a_part_of_a_word_is_not_the_word(prompt: str, word: str) -> None:
    assert blocked(pa.array([prompt]), (word,)).to_pylist() == [None]


LETTERS = st.text(st.sampled_from("abAB\u00e9\u00df\u0130\u0131 \uff47-,.1"), max_size=12)


def words(text: str) -> list[str]:
    """Words of a text, one character after the other."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(each if unicodedata.category(each)[0] in "LMN" else " " for each in folded).split()


@settings(max_examples=300)
@given(st.lists(st.none() | LETTERS, max_size=4), st.lists(LETTERS.filter(words), max_size=4))
def test_a_prompt_is_blocked_if_the_words_of_an_entry_stand_in_it_in_a_row(
    prompts: list[str | None], entries: list[str]
) -> None:
    found = blocked(pa.array(prompts, pa.string()), tuple(entries)).to_pylist()

    for prompt, entry in zip(prompts, found, strict=True):
        text = f" {' '.join(words(prompt or ''))} "
        held = [each for each in entries if f" {' '.join(words(each))} " in text]
        assert entry in held if held else entry is None


def test_a_row_with_a_blocked_word_is_rejected_by_its_name_and_a_negative_prompt_may_hold_it() -> None:
    table = requests_table(3, prompt=["a red kite", "a Gun", "a boat"], negative_prompt=["gun", None, "gun"])

    found = check(table, config(blocked_words=["gun", "knife"]), {"default": "e" * 32})

    (rejected,) = found.rejected.to_pylist()
    assert (rejected["row"], rejected["error_kind"]) == (1, "blocked_prompt")
    assert "column 'prompt'" in rejected["error"]
    assert "'gun'" in rejected["error"]


def test_a_blocklist_changes_no_key() -> None:
    engines, table = {"default": "e" * 32}, requests_table(3)

    assert check(table, config(blocked_words=["gun"]), engines).keys.tobytes() == (
        check(table, config(), engines).keys.tobytes()
    )


def test_a_plan_reads_the_file_and_a_longer_file_scans_the_manifest_again(tmp_path: Path) -> None:
    pq.write_table(requests_table(3, prompt=["a gun", "a Knife", "a boat"]), tmp_path / "requests.parquet")
    words_file = tmp_path / "words.txt"
    run = RunConfig.load(
        None,
        {
            "manifest": str(tmp_path / "requests.parquet"),
            "output": str(tmp_path / "out"),
            "safety.blocklist": str(words_file),
            "safety.blocked_words": ["fire arm"],
        },
    )
    words_file.write_bytes("\ufeff# weapons\r\n\r\ngun\r\n".encode())
    plan = make_plan(run)
    assert plan.config.safety.blocked_words == ("fire arm", "gun")
    assert plan.rejected["error_kind"].to_pylist() == ["blocked_prompt"]
    plan.save_scan()

    words_file.write_text("gun\nknife\n")

    assert len(make_plan(run).rejected) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"g\xfcn", "no UTF-8 text"),
        *[
            ("gun\nknife\n".encode(f"utf-16{end}"), "is text in UTF-16, and would block nothing")
            for end in ("", "-le", "-be")
        ],
        ("gun".encode("utf-32-be"), "is text in UTF-32"),
        (b"gun\nkni\0fe", "is not text"),
        (b'["gun", "knife"]', "is JSON, and would block nothing; save it as UTF-8 text, one word a line"),
        (b'\n{"words": ["gun"]}', "is JSON"),
        (b"<!DOCTYPE html><html>Sign in", "is HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (b"PK\x03\x04\x14\0", "is a zip archive or an Excel workbook"),
        (gzip.compress(b"gun\n", mtime=0), "is compressed with gzip"),
        (b"gun\n---\n", "line 2: '---' has neither letters nor digits"),
    ],
)
def test_a_blocklist_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match=problem) as refused:
        with_blocklist(config(blocklist=str(path)))

    assert "safety.blocklist" in str(refused.value)


def test_a_blocked_word_without_a_letter_is_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match=r"safety\.blocked_words.*letters or digits"):
        config(blocked_words=["gun", "--"])


def test_a_blocklist_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(b"gun\n" * (blocklist.MAX_BLOCKLIST_BYTES // 4))
    assert with_blocklist(config(blocklist=str(path))).safety.blocked_words == ("gun",)

    path.write_bytes(b"gun\n" * (blocklist.MAX_BLOCKLIST_BYTES // 4) + b"\n")
    with pytest.raises(ConfigError, match="larger than"):
        with_blocklist(config(blocklist=str(path)))
