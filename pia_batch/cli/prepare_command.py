"""Command `prepare`, which makes a manifest of a dataset."""

from __future__ import annotations

import signal
from dataclasses import asdict
from typing import Annotated, Any

import typer

from pia_batch import errors
from pia_batch.cli.console import counting, err, out, print_json
from pia_batch.cli.options import AsJson
from pia_batch.cli.signals import first_signal


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of images, WebDataset shards, img2dataset's output, Parquet, JSONL or CSV files, a Lance, "
            "Delta or Iceberg table (its folder, or iceberg://CATALOG/NAMESPACE.TABLE), or "
            "hf://datasets/NAME[@REVISION]."
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="DEST", help="Folder of the manifest; empty, or not there yet.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="folder, webdataset, img2dataset, parquet, jsonl, csv, lance, delta, iceberg or animatebench; "
            "default: by contents."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Template of the prompt over columns, such as '{caption}, cinematic, {style}'.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Template of the negative prompt.")] = None,
    on_missing: Annotated[
        str,
        typer.Option(help="Rows in which a column of a template is null or blank: fail (exit code 2), drop or empty."),
    ] = "fail",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="Take a manifest's column from this one, or from a field of a struct; repeatable.",
        ),
    ] = None,
    request_id_from: Annotated[
        str | None,
        typer.Option(help="column, content or location; default: a column if there is one, else what suits the kind."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,...", help="One request for each value of a setting; repeatable: the product."
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option(help='Keep rows of this condition: \'width >= 512 and style in ("ink", "oil")\'.')
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Keep the first rows only, before variations.")] = None,
    sample: Annotated[
        str | None, typer.Option(help="Keep this share of the rows, such as 1% or 0.01; always the same ones.")
    ] = None,
    shuffle: Annotated[int | None, typer.Option(metavar="SEED", help="Put the rows in a random order.")] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Add image_width and image_height, and reject images that cannot be read."),
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(
            help="bytes: fetch images that the source names by URI; uris: name those of a folder by URI; default: as "
            "the source has them."
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX",
            help="Further place that --images bytes and --probe may read, such as https://images.example.com/; "
            "repeatable. The source's own folder or bucket is always allowed.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Keep a column of JSON or CSV as text; repeatable.")
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(help="Version of a Lance or Delta table, or snapshot of an Iceberg table; default: newest."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; default: RAY_ADDRESS, or a Ray on this machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a Parquet manifest of a dataset, for `pia-batch run --manifest DEST`.

    Runs on Ray Data. Start it again after any interruption, with the same options: it continues, and the manifest
    has the same bytes.

    Example: `pia-batch prepare photos/ --to manifest/ --prompt '{caption}, cinematic' --vary seed=1,2,3`
    """
    from pia_batch.datasets.prepare import prepare as run_prepare

    options = {
        "kind": kind,
        "version": version,
        "images": images,
        "allow": tuple(allow or ()),
        "columns": _columns(column or []),
        "text": tuple(text or ()),
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "on_missing": on_missing,
        "request_id_from": request_id_from,
        "vary": tuple(vary or ()),
        "where": where,
        "limit": limit,
        "sample": _share(sample),
        "shuffle": shuffle,
        "probe": probe,
    }
    with first_signal(_print_signal) as stop, counting("pieces of the source prepared") as one_more:
        shown = 0

        def progress(done: int, _all: int) -> None:
            nonlocal shown
            for _ in range(done - shown):
                one_more()
            shown = max(shown, done)

        summary = run_prepare(source, to, address=address, stop=stop, on_progress=progress, **options)
    if as_json:
        print_json(asdict(summary) | {"counts": dict(summary.counts)})
        return
    _print(summary)


def _print(summary: Any) -> None:
    counts = dict(summary.counts)
    read = counts.pop("read", 0)
    others = "".join(f", {count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()) if count)
    out.print(f"source      {summary.kind}: {read} rows{others}", soft_wrap=True, markup=False)
    out.print(f"manifest    {summary.manifest}", soft_wrap=True, markup=False)
    out.print(f"requests    {summary.requests} in {summary.files} files, {summary.num_bytes / 1e6:.2f} MB")
    if summary.rejects_uri:
        out.print(f"rejects     {summary.rejects_uri}", soft_wrap=True, markup=False, style="yellow")
    for note in summary.notes:
        out.print(f"note        {note}", soft_wrap=True, markup=False, style="yellow")


def _columns(columns: list[str]) -> dict[str, str]:
    """Return the sources of `--column NAME=SOURCE` by name."""
    found: dict[str, str] = {}
    for column in columns:
        name, equals, source = column.partition("=")
        if not equals or not name or not source:
            raise errors.ConfigError(f"--column {column}: expected NAME=SOURCE, such as prompt=caption")
        if name in found:
            raise errors.ConfigError(f"--column {name}: given twice; leave one out")
        found[name] = source
    return found


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise errors.ConfigError(f"--sample {text}: expected a share such as 1% or 0.01") from None


def _print_signal(number: int) -> None:
    err.print(f"{signal.Signals(number).name}: finishing pieces in work; send the signal again to exit at once")
