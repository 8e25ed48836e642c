"""docs/tutorial.md, word by word: every block in its order, in one shell, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pytest

TUTORIAL = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")


def script() -> str:
    """The tutorial's blocks as one script; a Python block is the file that its first line names."""
    steps = ["set -eu"]
    for language, block in re.findall(r"```(\w+)\n(.*?)```", TUTORIAL, re.DOTALL):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", block)
            assert name, block
            block = f"cat > {name[1]} <<'PYTHON'\n{block}PYTHON\n"  # noqa: PLW2901
        steps.append(block.replace("source .venv/bin/activate\n", ""))
    return "\n".join(steps)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_tutorial_can_be_followed(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(tmp_path),  # Ray puts its token there
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }

    done = subprocess.run(
        ["bash"],
        input=script(),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    first = tmp_path / "first"
    assert {path.suffix for path in first.glob("out/animations/*/*")} == {".mp4", ".webp", ".gif"}
    for day in (20, 21, 22):
        (night,) = [path for path in first.glob(f"nights/2026-11-{day}/results/*") if path.is_dir()]
        assert ds.dataset(night).to_table(["status"])["status"].to_pylist() == ["succeeded"] * 3
    assert len(list(first.glob("out/animations/*/*"))) == 3 * 3
