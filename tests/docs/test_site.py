"""The site of the documentation: Sphinx builds it without a warning, and its index lists every page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pia_batch

ROOT = Path(__file__).parents[2]
INDEX = (ROOT / "docs/index.md").read_text(encoding="utf-8")


def test_the_index_lists_every_page_once() -> None:
    listed = [(ROOT / "docs" / link).resolve() for link in re.findall(r"^- \[[^]]+\]\(([^)]+)\)$", INDEX, re.MULTILINE)]
    pages = {path for path in (ROOT / "docs").rglob("*.md") if path.name != "index.md"}
    assert len(listed) == len(set(listed))
    assert pages - set(listed) == set(), "add these to docs/index.md"
    assert all(path.is_file() for path in listed)


def test_the_site_names_every_public_name() -> None:
    api = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in set(pia_batch.__all__) - {"__version__"}:
        assert f":: pia_batch.{name}\n" in api, name


@pytest.mark.long
@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", "docs"]

    done = subprocess.run(
        [*command, "-d", tmp_path / "trees", ".", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site/docs/index.html").read_text(encoding="utf-8")
    captions = re.findall(r'caption-text">([^<]+)<', home)
    assert captions == re.findall(r"^## (.+)$", INDEX, re.MULTILINE)
    assert "docs/index.html" in (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'id="pia_batch.PiaEngine.animate"' in (tmp_path / "site/docs/api.html").read_text(encoding="utf-8")
