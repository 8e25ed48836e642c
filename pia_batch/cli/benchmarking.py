"""`bench`: the engine and its peers side by side on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from pia_batch.cli.console import err, out, print_json
from pia_batch.cli.options import AsJson


def bench(
    size: Annotated[
        Literal["full", "tiny"], typer.Option(help="full: SD 1.5 with random weights; tiny: the embedded model")
    ] = "full",
    rounds: Annotated[int, typer.Option(min=1, help="how often each contestant takes its turn")] = 3,
    batches: Annotated[str, typer.Option(help="batch sizes of the engine, separated by commas")] = "1,2,4",
    device: Annotated[str, typer.Option(help="such as cuda:0; by default a GPU if there is one")] = "",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="the pipeline compiled, and the engine")
    ] = True,
    to: Annotated[Path | None, typer.Option("--to", help="also write the numbers to this JSON file")] = None,
    as_json: AsJson = False,
) -> None:
    """Clips a second of the engine, and of what one would use without it, interleaved on one device. No download.

    Examples: `pia-batch bench --to bench.json`, `pia-batch bench --size tiny --no-compile`
    """
    from pia_batch.config import EncodingConfig
    from pia_batch.engine import benchmark
    from pia_batch.video import encode

    try:
        sizes = tuple(int(each) for each in batches.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"{batches!r} is no list of positive numbers, such as 1,2,4", param_hint="--batches")
    options = benchmark.Options(size, rounds, sizes, device or None, compiled)
    err.print(f"pia-batch: {size} network, {rounds} rounds; the first one is not counted")
    told = benchmark.run(options, lambda frames: encode(frames, "mp4", 8, EncodingConfig()))
    if to is not None:
        to.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(told)
    else:
        out.print(_table(told))


def _table(told: dict[str, Any]) -> Table:
    table = Table("contestant", title=f"{told['device']}, {told['dtype']}, {told['tflop_per_clip']:.3g} TFLOP a clip")
    for head in ("clips/s", "UNet ms", "of matmul", "of datasheet", "peak GB", "compile s", "PSNR dB"):
        table.add_column(head, justify="right")
    for name, one in told["contestants"].items():
        least, most = one["clips_per_s_range"]
        table.add_row(
            name,
            f"{one['clips_per_s']:.3g} ({least:.3g}-{most:.3g})",
            f"{one['unet_ms']:.1f}",
            f"{one['share_of_measured_matmul']:.0%}",
            _or_dash(one["share_of_datasheet"], "{:.0%}"),
            _or_dash(one["peak_bytes"] and one["peak_bytes"] / 1e9, "{:.1f}"),
            _or_dash(one["compile_s"], "{:.0f}"),
            f"{one['psnr_db']:.1f}",
        )
    return table


def _or_dash(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)
