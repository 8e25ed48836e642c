"""The figures of docs/engine-design.md that a program counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "jobs"))

import count_work  # noqa: E402


def told() -> dict[str, list[str]]:
    """The cells of each row of the page's tables, by its first one."""
    page = (ROOT / "docs/engine-design.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in rows}


@pytest.mark.long
def test_the_page_says_what_the_program_counts(capsys: pytest.CaptureFixture[str]) -> None:
    count_work.main()

    counted = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if line[:1] == "│"]
    assert len(counted) == 6 + 6
    page = told()
    for name, *cells in counted:
        assert page[name.strip()] == [cell.strip() for cell in cells], name


def test_a_storage_counts_once_and_while_it_lives() -> None:
    layer = nn.Linear(8, 8, bias=False, device="meta", dtype=torch.half)

    with torch.no_grad(), count_work.Allocated(layer) as allocated:
        kept = torch.empty(1024, device="meta", dtype=torch.half)
        for _ in range(3):
            torch.empty(512, device="meta", dtype=torch.half).view(2, 256)
        layer(kept.view(-1, 8))

    assert allocated.peak == 2 * 1024 + 2 * 1024
