"""The program that compares an export with a bare Ray Data script runs, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "jobs" / "benchmark_export.py"


@pytest.mark.long
@pytest.mark.slow
def test_both_sides_are_measured_in_turns(tmp_path: Path) -> None:
    arguments = ["--rows", "50", "--bytes", "1000", "--rounds", "1", "--json", str(tmp_path / "figures.json")]
    subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        check=True,
        capture_output=True,
        env=os.environ | {"RAY_ADDRESS": "local"},
    )

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["turns"]) == {"bare", "export"}
    assert all(turn["seconds"] > 0 and turn["peak_mb"] > 0 for turns in figures["turns"].values() for turn in turns)
    assert figures["ratio"] > 0
