"""Tables of performance.md from a GPU's results: made of their JSON, and absent without it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WRITER = runpy.run_path(str(ROOT / "docs" / "gpu_tables.py"))

VARIANT = {
    "turns": 3,
    "clips_per_s": 0.512,
    "unet_ms": 70.25,
    "share_of_measured_matmul": 0.61,
    "peak_bytes": 9_400_000_000,
    "psnr_db": 52.34,
}
RESULTS: dict[str, Any] = {
    "device": "NVIDIA L4",
    "size": "full",
    "date": "2026-11-29T02:00:00+00:00",
    "versions": {"torch": "2.11.0", "cuda": None},
    "parts": {
        "features": {
            "status": "failed",
            "seconds": 60.4,
            "measured": {"loop": {"psnr_db": 51.5, "largest_difference": 3}, "eta": {"error": "no kernel"}},
        },
        "engine": {"status": "done", "seconds": 1.0, "measured": {"variants": {"d: engine, 4 rows": VARIANT}}},
        "profile": {
            "status": "done",
            "seconds": 1.0,
            "measured": {"profile": {"kinds": {"matmul": {"ms": 20.0, "above_floor_ms": 7.0}}}},
        },
        "chain": {
            "status": "done",
            "seconds": 1.0,
            "measured": {"exact": {"succeeded": 64, "busy": 0.98, "clips_per_s_steady": 0.5}},
        },
        "memory": {
            "status": "stopped",
            "seconds": 1.0,
            "measured": {"512": {"batches": {"1": {"fits": True, "peak_bytes": 5e9}, "2": {"fits": False}}}},
        },
        "windows": {"status": "skipped", "seconds": 0.0},
    },
}
PAGE = "\n".join(f"<!-- measured: {name} -->\n<!-- end -->\n" for name in WRITER["TABLES"])


def test_every_table_is_made_of_what_its_part_measured() -> None:
    page = WRITER["written"](PAGE, RESULTS)

    assert "NVIDIA L4, full size, 2026-11-29; torch 2.11.0:\n\n| part | status | seconds |\n| --- |" in page
    for row in (
        "| features | failed | 60 |",
        "| engine | d: engine, 4 rows | 0.512 | 70.2 | 61% | 9.4 | 52.34 |",
        "| loop | 51.5 | 3 |",
        "| eta | no kernel |  |",
        "| matmul | 20.00 | 7.00 |",
        "| exact | 64 | 0.98 | 0.5 |",
        "| 512 px | 1 | 5.0 |",
        "| 512 px | 2 | does not fit |",
    ):
        assert row in page
    assert page.endswith("<!-- measured: long clips -->\n<!-- end -->\n"), "a part without results has no table"
    assert WRITER["written"](page, RESULTS) == page
    assert WRITER["written"](page, None) == PAGE


def test_the_page_has_every_table_as_the_results_have_it() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    file = ROOT / "docs" / "gpu.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    assert WRITER["written"](page, results) == page, "run `python docs/gpu_tables.py`"
    assert all(f"<!-- measured: {name} -->" in page for name in WRITER["TABLES"])
