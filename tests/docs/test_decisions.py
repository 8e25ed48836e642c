"""Decision records: one short page each, in one form, with links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "docs/decisions").glob("*.md"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_has_context_decision_and_consequences_in_one_short_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert parts[:2] == ["Context", "Decision"]
    assert "Consequences" in parts
    assert set(parts) <= {"Context", "Decision", "Consequences", "Figures", "Tried and left out", "Where it binds"}
    assert len(text.splitlines()) <= 60
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), link
