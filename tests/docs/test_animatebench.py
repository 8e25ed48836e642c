"""The page on AnimateBench: its program makes the table of an evaluation, and its config is one of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from evaluated import publish_evaluation, publish_output, shifted
from walkthroughs import blocks

from pia_batch.config import RunConfig
from pia_batch.storage.object_store import Store

PAGE = "docs/animatebench.md"


def test_the_config_of_the_page_is_valid(tmp_path: Path) -> None:
    (tmp_path / "bench.yaml").write_text(blocks(PAGE, "yaml")[0])
    config = RunConfig.load(tmp_path / "bench.yaml", {})
    assert set(config.original_models) >= {"MoonFile", "film"}


@pytest.mark.slow
def test_the_program_of_the_page_prints_means_by_motion_scale(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "outputs" / "bench"))
    clips = {f"MoonFile-1-{k}": shifted(2, 16) for k in range(4)}
    publish_output(store, clips, columns={"motion_scale": [0, 0, 1, 1]})
    publish_evaluation(store, {"clip_i": [0.9, 0.8, 0.7, 0.5], "clip_t": [0.25, 0.35, 0.2, 0.3]}, "bench")
    (tmp_path / "table.py").write_text(blocks(PAGE, "python")[0])
    done = subprocess.run([sys.executable, "table.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "0  CLIP-I 0.8500  CLIP-T 0.3000  clips 2",
        "1  CLIP-I 0.6000  CLIP-T 0.2500  clips 2",
    ]
