"""Commands `run`, `retry` and `demo`, which generate animations."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pia_batch import errors
from pia_batch.cli.console import err, out, print_json, shown_progress
from pia_batch.cli.flags import RunFlags, with_flags
from pia_batch.cli.options import RetryFailed, given, load
from pia_batch.cli.signals import first_signal

if TYPE_CHECKING:
    from pia_batch.config import RunConfig
    from pia_batch.config.templates import RunDate
    from pia_batch.planning.plan import Retry
    from pia_batch.schema.run_record import RunRecord, RunSummary


@with_flags
def run(flags: RunFlags, *, retry_failed: RetryFailed = False) -> None:
    """Animate the requests that are not finished, and publish the results.

    Example: `pia-batch run nightly.yaml --output s3://bucket/out --run-date 2026-11-22 --deadline 06:00`
    """
    from pia_batch.planning.plan import Retry

    _start(flags, flags.load({}), Retry() if retry_failed else None)


@with_flags
def retry(
    flags: RunFlags,
    *,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Only requests that failed with this error kind; repeatable.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Only requests whose ids a Parquet, CSV or JSONL table has.")
    ] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Attempts for a request that kills its worker; overrides limits.max_attempts.")
    ] = None,
) -> None:
    """Process failed requests again, and publish the results. Pending requests are processed too, as by `run`.

    The exit codes are those of `run`. Example: `pia-batch retry nightly.yaml --kind image_unavailable --kind timeout`
    """
    from pia_batch.manifest import id_tables
    from pia_batch.planning.plan import Retry

    loaded = flags.load(given({"limits.max_attempts": max_attempts}))
    ids = None if only is None else id_tables.read(only)
    _start(flags, loaded, Retry(frozenset(kinds) if kinds else None, ids))


def demo(
    output: Annotated[Path, typer.Option(help="Folder; finished animations in it are kept.")] = Path("outputs/demo"),
) -> None:
    """Animate sixteen sample requests with the embedded model, on the CPU, with no download.

    Example: `pia-batch demo --output /tmp/demo`
    """
    import pyarrow.dataset as ds

    from pia_batch import tiny
    from pia_batch.journal.layout import ANIMATIONS, report_name, results_folder

    loaded = load(None, {"manifest": str(tiny.SAMPLE), "output": str(output), "defaults.format": "gif"})
    with _running() as run_one:
        summary = run_one(loaded)
    results = ds.dataset(output / results_folder(summary.run_id)).to_table(["request_id", "animation_uri", "error"])
    rows = results.sort_by("request_id").to_pylist()
    width = max(len(row["request_id"]) for row in rows)
    out.print(f"animations in {output}/{ANIMATIONS}:", soft_wrap=True)
    for row in rows:
        place = "/".join(row["animation_uri"].split("/")[-2:]) if row["animation_uri"] else row["error"]
        out.print(f"  {row['request_id']:{width}}  {place}", soft_wrap=True, markup=False)
    out.print(f"report: {output}/{report_name(summary.run_id)}", soft_wrap=True)
    _print(summary)
    raise typer.Exit(summary.exit_code)


def _start(flags: RunFlags, config: RunConfig, again: Retry | None) -> None:
    """Run the config, or each of its dates, and exit with the code of the run or of all runs."""
    records: list[RunRecord] = []
    if flags.backfill is not None:
        code = _backfill(flags, config, again, records)
        if flags.as_json:
            print_json({"exit_code": code, "runs": [record.payload() for record in records]})
        raise typer.Exit(code)
    try:
        with _running(as_json=flags.as_json, retry=again, on_end=records.append) as run_one:
            summary = run_one(config)
    finally:
        if flags.as_json and records:
            print_json(records[0].payload())
    if not flags.as_json:
        _print(summary, again)
    raise typer.Exit(summary.exit_code)


def _backfill(flags: RunFlags, config: RunConfig, again: Retry | None, records: list[RunRecord]) -> int:
    from pia_batch.driver.backfill import backfill

    if flags.run_date is not None:
        raise errors.ConfigError("--run-date, --backfill: mutually exclusive; give one of them")

    def report(date: RunDate, outcome: RunSummary | errors.PiaBatchError) -> None:
        if isinstance(outcome, errors.PiaBatchError):
            err.print(f"pia-batch: {date}: {outcome}", style="bold red", markup=False, soft_wrap=True)
        elif not flags.as_json:
            out.print(f"\n{date}", style="bold")
            _print(outcome, again)

    dates = config.templates.dates(flags.backfill or "", datetime.now(UTC))
    with _running(as_json=flags.as_json, retry=again, on_end=records.append) as run_one:
        return backfill(config, dates, run_one, report)


@contextmanager
def _running(*, as_json: bool = False, **options: Any) -> Iterator[Callable[[RunConfig], RunSummary]]:
    """Yield a function that runs one config after the other; the first SIGINT or SIGTERM stops all of them."""
    from pia_batch.pipeline.heavy_imports import garbage_collection_paused

    with garbage_collection_paused():
        from pia_batch.driver import run as driver_run

    with first_signal(_print_signal) as stop:

        def run_one(config: RunConfig) -> RunSummary:
            if stop.is_set():
                raise errors.InterruptedRunError("stopped between two runs; start again to continue")
            with shown_progress(as_json=as_json) as show:
                return driver_run.run(config, on_progress=show, stop=stop, **options)

        yield run_one


def _print(summary: RunSummary, again: Retry | None = None) -> None:
    """Print the outcome of a run, and what can be done about requests that failed."""
    if again is not None and summary.rejected:
        out.print(
            f"{summary.rejected} rows were rejected because of their values, and no retry helps: `pia-batch plan` "
            "lists the reasons; correct them in the manifest, and they are new requests",
            soft_wrap=True,
        )
    out.print(
        f"{summary.requests} requests: {summary.succeeded} succeeded, {summary.failed} failed; "
        f"{summary.computed} computed in this run, {summary.duplicates} duplicate rows, {summary.seconds:.1f} s",
        soft_wrap=True,
    )
    for kind, count in summary.failures.items():
        out.print(f"  {kind}  {count}")
    if again is None and summary.failed > summary.rejected:
        out.print(
            "the column error of the results says why; once that is fixed, `pia-batch retry` with the same options "
            "processes them again",
            soft_wrap=True,
        )
    if summary.cost is not None and summary.computed:
        out.print(f"cost: {summary.cost:,.2f} ({summary.gpu_hours:.3g} hours)", soft_wrap=True)
    if summary.message:
        out.print(f"stopped: {summary.message}", soft_wrap=True, markup=False)
    if summary.results_uri:
        out.print(f"results: {summary.results_uri}", soft_wrap=True)


def _print_signal(number: int) -> None:
    err.print(f"{signal.Signals(number).name}: committing requests in flight; send the signal again to exit at once")
