"""Command `bench`, which compares the engine with its baselines on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from pia_batch.cli.console import err, out, print_json
from pia_batch.cli.options import AsJson
from pia_batch.errors import ConfigError
from pia_batch.storage import local_disk

_COLUMNS = ("turns", "clips/s", "least-most", "UNet ms", "of matmul", "of sheet", "peak GB", "compile s", "PSNR dB")


def bench(
    size: Annotated[
        Literal["full", "tiny"],
        typer.Option(help="Model: full (SD 1.5 with random weights) or tiny (the embedded model)."),
    ] = "full",
    rounds: Annotated[int, typer.Option(min=1, help="Number of turns of each variant.")] = 3,
    batches: Annotated[str, typer.Option(help="Batch sizes of the engine, separated by commas.")] = "1,2,4",
    only: Annotated[
        str, typer.Option(help="Variants to measure, in the order of their turns, such as d,b,c.")
    ] = "a,b,c,d,e",
    side: Annotated[int | None, typer.Option(min=8, help="Width and height in pixels; default: 512, tiny 64.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, max=32, help="Frames per clip; default: 16, tiny 8.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps; default: 25, tiny 8.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Start no turn that would end after this many minutes; default: no limit."),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cuda:0; default: a GPU if there is one.")] = "",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the engine, and measure the compiled pipeline too.")
    ] = True,
    compile_mode: Annotated[
        Literal["default", "max-autotune-no-cudagraphs"],
        typer.Option(help="Mode of Inductor, for all compiled variants."),
    ] = "default",
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile the engine's step by kind of kernel too.")
    ] = False,
    to: Annotated[Path | None, typer.Option("--to", help="Add the results to this JSON file too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure clips per second of the engine and of the alternatives to it, in turns on one device. No download.

    `--to` is written after each turn and keeps earlier results under the same conditions, so that `--only` can split a
    long benchmark into several commands. Exit code 1 if no variant could be measured.

    Examples: `pia-batch bench --to bench.json`, `pia-batch bench --size tiny --no-compile`,
    `pia-batch bench --only d --batches 4 --profile --minutes 8 --to bench.json`
    """
    sizes, letters, side_px = _numbers(batches), _letters(only), _multiple_of_eight(side)
    from pia_batch.config import EncodingConfig
    from pia_batch.engine.benchmark import runner
    from pia_batch.media.codecs import encode

    options = runner.BenchmarkOptions(
        size=size,
        rounds=rounds,
        batches=sizes,
        device=device or None,
        compiles=compiled,
        only=letters,
        side_px=side_px,
        frames=frames,
        steps=steps,
        minutes=minutes,
        profiles=profile,
        mode=compile_mode,
    )
    if to is not None and (obstacle := local_disk.find_obstacle(to.absolute().parent)):
        raise ConfigError(f"--to: {obstacle}")
    known = _known(to, runner.conditions(options))

    def report(record: dict[str, Any], line: str) -> None:
        err.print(f"pia-batch: {line}", markup=False)
        if to is not None:
            local_disk.write_file(to, (json.dumps(runner.merged(known, record), indent=2) + "\n").encode(), "--to")

    measured = runner.run(options, lambda frames: encode(frames, "mp4", 8, EncodingConfig()), report)
    record = runner.merged(known, measured)
    if as_json:
        print_json(record)
    else:
        _show(record)
    if not any(one["turns"] for one in measured["variants"].values()):
        raise typer.Exit(1)


def _show(record: dict[str, Any]) -> None:
    out.print(_table(record))
    for name, one in record["variants"].items():
        for field in ("error", "not_compiled"):
            if field in one:
                out.print(f"{name}: {field.replace('_', ' ')}: {one[field]}", markup=False, soft_wrap=True)
    if "error" in record.get("profile", {}):
        out.print(f"profile: error: {record['profile']['error']}", markup=False, soft_wrap=True)
    elif "profile" in record:
        out.print(_profile_table(record["profile"]))


def _numbers(batches: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(each) for each in batches.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(
            f"got {batches!r}, expected positive integers separated by commas, such as 1,2,4", param_hint="--batches"
        )
    return sizes


def _letters(only: str) -> str:
    letters = only.split(",")
    if not set(letters) <= set("abcde"):
        raise typer.BadParameter(
            f"got {only!r}, expected letters from a to e separated by commas, such as d,b,c", param_hint="--only"
        )
    return "".join(letters)


def _multiple_of_eight(side: int | None) -> int | None:
    if side is not None and side % 8:
        raise typer.BadParameter(
            f"got {side}, expected a multiple of 8: the VAE reduces an image by that factor", param_hint="--side"
        )
    return side


def _known(to: Path | None, conditions: dict[str, Any]) -> dict[str, Any]:
    """Return the results in the file, or an empty dict if there is no file.

    Raises:
        BadParameter: The file is of another kind, or was measured under other conditions.
    """
    if to is None or not to.exists():
        return {}
    try:
        known = json.loads(to.read_text(encoding="utf-8"))
        differing = [name for name, value in conditions.items() if known["conditions"][name] != value]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise typer.BadParameter(f"{to} was not written by this command; name another file", param_hint="--to") from err
    if differing:
        name = differing[0]
        raise typer.BadParameter(
            f"{to} was measured with another {name} (got {conditions[name]}, expected {known['conditions'][name]}); "
            "name another file",
            param_hint="--to",
        )
    return dict(known)


def _table(record: dict[str, Any]) -> Table:
    shape = "{device}, {dtype}, {side_px} px, {frames} frames, {steps} steps".format_map(record["conditions"])
    table = Table(title=f"{shape}, {record['tflop_per_clip']:.3g} TFLOP a clip")
    table.add_column("variant", no_wrap=True)
    for head in _COLUMNS:
        table.add_column(head, justify="right", no_wrap=True)
    for name, one in record["variants"].items():
        least, most = one.get("clips_per_s_range") or (None, None)
        peak = one.get("peak_bytes")
        table.add_row(
            name,
            str(one["turns"]),
            _or_dash(one.get("clips_per_s"), "{:.3g}"),
            "-" if least is None else f"{least:.3g}-{most:.3g}",
            _or_dash(one.get("unet_ms"), "{:.1f}"),
            _or_dash(one.get("share_of_measured_matmul"), "{:.0%}"),
            _or_dash(one.get("share_of_datasheet"), "{:.0%}"),
            _or_dash(peak and peak / 1e9, "{:.1f}"),
            _or_dash(one.get("compile_s"), "{:.0f}"),
            _or_dash(one.get("psnr_db"), "{:.1f}"),
        )
    return table


def _profile_table(record: dict[str, Any]) -> Table:
    table = Table(title=f"{record['what']}: {record['window_ms']:.1f} ms")
    table.add_column("kind", no_wrap=True)
    for head in ("ms", "share", "floor ms", "above the floor"):
        table.add_column(head, justify="right", no_wrap=True)
    for kind, one in record["kinds"].items():
        table.add_row(
            kind,
            f"{one['ms']:.1f}",
            f"{one['share']:.1%}",
            f"{one['floor_ms']:.1f}",
            f"{one['above_floor_ms']:.1f}",
        )
    gaps = record["gaps_ms"]
    table.add_row("gaps", f"{gaps:.1f}", f"{gaps / record['window_ms']:.1%}", "0.0", f"{gaps:.1f}")
    return table


def _or_dash(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)
