"""Command `export`, which writes the animations of an output in a format that others read."""

from __future__ import annotations

from typing import Annotated

import typer

from pia_batch.cli.console import counting, err, out, print_json
from pia_batch.cli.options import AsJson, OutputOrConfig, existing, names_in
from pia_batch.cli.signals import first_signal


def export(
    output: OutputOrConfig,
    to: Annotated[str, typer.Option("--to", help="URI of the destination: an empty folder or prefix.")],
    format_name: Annotated[
        str,
        typer.Option("--format", help="One of webdataset, parquet, lance, delta, huggingface, folder."),
    ],
    where: Annotated[
        str | None, typer.Option(help='Condition on the results, such as "motion > 2"; default: all that succeeded.')
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns to write, with commas between them; default: all.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option(help="Largest size of a file: a number of animations, or bytes such as 500MB.")
    ] = "500MB",
    transcode: Annotated[
        str | None, typer.Option(help="Write all animations as mp4, gif, webp or webm; default: as they are.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Parquet, CSV or JSONL table whose column request_id names the requests; default: all."),
    ] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="Run to export; default: the newest results.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; default: RAY_ADDRESS, or a Ray on this machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the animations of an output as WebDataset, Parquet, Lance, Delta, a Hugging Face dataset or plain files.

    A killed export is continued by the same command, and gives the same files; `_SUCCESS.json` is written last.
    Example: `pia-batch export s3://bucket/out --to s3://bucket/shards --format webdataset --where "motion > 2"`
    """
    from pia_batch.datasets import export as exporting

    store, _ = existing(output)
    shown: int | None = None
    with first_signal(_print_signal) as stop, counting("shards written") as one_more:

        def show(done: int, _: int) -> None:
            nonlocal shown
            if shown is not None and done > shown:
                one_more()
            shown = done

        summary = exporting.export(
            store.uri,
            to,
            format_name,
            where=where,
            columns=None if columns is None else names_in(columns, "--columns"),
            shard_size=shard_size,
            transcode=transcode,
            only=only,
            run_id=run_id,
            ray_address=address,
            on_shard=show,
            stop=stop,
        )
    if as_json:
        print_json(summary.payload())
        return
    out.print(
        f"{summary.rows} animations of run {summary.run_id}, {summary.num_bytes / 1e6:.2f} MB in {summary.shards} "
        f"shards, {summary.written} of them written now\n{summary.format}: {summary.uri}",
        soft_wrap=True,
        markup=False,
    )
    if summary.unknown:
        out.print(f"{summary.unknown} ids of --only have no animation in it", soft_wrap=True)


def _print_signal(_: int) -> None:
    err.print("stopping; start the export again to continue, or send the signal again to exit at once")
