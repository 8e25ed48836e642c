"""Pages are easy to take in: no paragraph is a wall of text, and no table waits for its figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAX_WORDS = 60
"""Largest number of words in a paragraph or an item of a list: about four lines."""

PAGES = [
    path
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("jobs/**/*.md")))
    if path.name != "CHANGELOG.md"  # a list to look things up
]


def paragraphs(text: str) -> Iterator[str]:
    """Yield every paragraph and every item of a list; no code, no tables, no headings."""
    text = re.sub(r"^```.*?^```|<!--.*?-->|^[|#].*?$", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?=\s*(?:[-*]|\d+\.) )", "\n\n", text, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        if block := block.strip():
            yield block


def num_words(paragraph: str) -> int:
    """Count what is read: the target of a link is not."""
    return len(re.sub(r"\]\([^)]*\)", "]", paragraph).split())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_paragraph_is_longer_than_about_four_lines(page: Path) -> None:
    found = [block for block in paragraphs(page.read_text(encoding="utf-8")) if num_words(block) > MAX_WORDS]
    assert not found, f"split these, of more than {MAX_WORDS} words:\n\n" + "\n\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_row_of_a_table_waits_for_its_figures(page: Path) -> None:
    rows = re.findall(r"^\|.*\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in rows if re.search(r"(?:\| +){3}\|", row)] == []


def test_paragraphs_and_items_are_counted_each_for_itself() -> None:
    text = "# Title\nOne two\nthree [four](five six).\n\n- a b\n- c\n  d\n\n  e\n\n"
    text += "| f | g |\n| --- | --- |\nh\n```bash\ni\n```\nj k\n"
    assert [num_words(block) for block in paragraphs(text)] == [4, 3, 3, 1, 1, 2]
