"""Writer of the tables of performance.md that come from a machine with a GPU: `python docs/gpu_tables.py`.

They are made from docs/gpu.json, a copy of what jobs/benchmark_gpu.py wrote, and go between `<!-- measured: NAME -->`
and `<!-- end -->`. Without that file, or without a part's results in it, there is no table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

Parts = dict[str, Any]


def conditions(results: dict[str, Any]) -> list[str]:
    """Return a line with the device, the date and the versions, and a table of the parts."""
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items() if value)
    rows = ((name, part["status"], f"{part['seconds']:.0f}") for name, part in results["parts"].items())
    head = f"{results['device']}, {results['size']} size, {results['date'][:10]}; {versions}:"
    return [head, "", *_table(["part", "status", "seconds"], rows)]


def variants(results: dict[str, Any]) -> list[str]:
    """Return a table of the benchmark's variants; those of one part took turns."""
    rows = []
    for part in ("engine", "baselines", "presets"):
        for name, one in _measured(results, part).get("variants", {}).items():
            if one.get("turns"):
                rate, unet, psnr = one["clips_per_s"], one["unet_ms"], one.get("psnr_db")
                share = one["share_of_measured_matmul"]
                cells = (name, f"{rate:.3g}", f"{unet:.1f}", f"{share:.0%}", _gb(one["peak_bytes"]), _figure(psnr))
                rows.append((part, *cells))
    head = ["part", "variant", "clips/s", "UNet, ms", "of the matrix product", "peak, GB", "PSNR, dB"]
    return _table(head, rows)


def features(results: dict[str, Any]) -> list[str]:
    """Return a table of the agreement with float32, feature by feature."""
    measured = _measured(results, "features")
    rows = (
        (name, one.get("error") or _figure(one["psnr_db"]), str(one.get("largest_difference", "")))
        for name, one in measured.items()
    )
    return _table(["feature", "PSNR, dB", "largest difference of 255"], rows)


def profile(results: dict[str, Any]) -> list[str]:
    """Return a table of where the time of one step goes, by kind of kernel."""
    kinds = _measured(results, "profile").get("profile", {}).get("kinds", {})
    rows = ((kind, f"{one['ms']:.2f}", f"{one['above_floor_ms']:.2f}") for kind, one in kinds.items())
    return _table(["kernels", "ms", "above the floor, ms"], rows)


def chain(results: dict[str, Any]) -> list[str]:
    """Return a table of the whole runs, by speed preset."""
    rows = (
        (speed, str(one["succeeded"]), _figure(one["busy"], 3), _figure(one["clips_per_s_steady"], 3))
        for speed, one in _measured(results, "chain").items()
    )
    return _table(["speed", "requests that succeeded", "share of time generating", "clips/s"], rows)


def memory(results: dict[str, Any]) -> list[str]:
    """Return a table of the memory of each batch that was tried."""
    rows = (
        (f"{side} px", size, _gb(one.get("peak_bytes")) if one["fits"] else "does not fit")
        for side, found in _measured(results, "memory").items()
        for size, one in found["batches"].items()
    )
    return _table(["clips of 16 frames", "rows", "peak, GB"], rows)


def long_clips(results: dict[str, Any]) -> list[str]:
    """Return a table of the long clips."""
    rows = (
        (name, one.get("error") or f"{one['seconds']:.1f}", _gb(one.get("peak_bytes")))
        for name, one in _measured(results, "windows").items()
    )
    return _table(["clip", "seconds", "peak, GB"], rows)


def _measured(results: dict[str, Any], part: str) -> Parts:
    found: Parts = results["parts"].get(part, {}).get("measured", {})
    return found


def _gb(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.1f}"


def _figure(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _table(head: list[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a table; nothing if it has no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines] if lines else []


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "conditions": conditions,
    "variants": variants,
    "features": features,
    "profile": profile,
    "chain": chain,
    "memory": memory,
    "long clips": long_clips,
}
"""By the name in the page."""

_PLACE = re.compile(r"(<!-- measured: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(page: str, results: dict[str, Any] | None) -> str:
    """Return a page's text with every table as these results have it; None: without tables."""

    def table(place: re.Match[str]) -> str:
        lines = TABLES[place[2]](results) if results else []
        text = "\n".join(["", *lines, "", ""]) if lines else ""
        return f"{place[1]}{text}{place[3]}"

    return _PLACE.sub(table, page)


def main() -> None:
    """Rewrite the tables of performance.md."""
    file, path = HERE / "gpu.json", HERE / "performance.md"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    path.write_text(written(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
