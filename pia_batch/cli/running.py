"""`run`, `retry` and `demo`: what draws animations."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pia_batch.cli.console import err, out, shown_progress
from pia_batch.cli.options import (
    ConfigPath,
    ManifestUri,
    MaxFailed,
    OutputUri,
    Overrides,
    RetryFailed,
    RunId,
    given,
    load,
    overrides,
)

if TYPE_CHECKING:
    from pia_batch.config import RunConfig
    from pia_batch.planning import Retry
    from pia_batch.summary import RunSummary


def run(
    config: ConfigPath = None,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    override: Overrides = None,
    retry_failed: RetryFailed = False,
    run_id: RunId = None,
    max_failed: MaxFailed = None,
) -> None:
    """Animate what is not finished yet, and publish the results.

    Example: `pia-batch run nightly.yaml --output s3://bucket/out --set placement.max_actors=8`
    """
    from pia_batch.planning import Retry

    loaded = load(config, overrides(manifest, output, override) | given({"limits.max_failed": max_failed}))
    _finish(_run(loaded, run_id=run_id, retry=Retry() if retry_failed else None))


def retry(
    config: ConfigPath = None,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="only what failed with this error kind; may be repeated")
    ] = None,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    override: Overrides = None,
    run_id: RunId = None,
    max_failed: MaxFailed = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="over limits.max_attempts: how often a request may kill its worker")
    ] = None,
) -> None:
    """Draw again what failed before, and publish the results. What was never begun is drawn too, as by `run`.

    Exit codes as those of `run`. Example: `pia-batch retry nightly.yaml --kind image_unavailable --kind timeout`
    """
    from pia_batch.planning import Retry

    limits = given({"limits.max_failed": max_failed, "limits.max_attempts": max_attempts})
    loaded = load(config, overrides(manifest, output, override) | limits)
    summary = _run(loaded, run_id=run_id, retry=Retry(frozenset(kinds) if kinds else None))
    if summary.rejected:
        out.print(
            f"{summary.rejected} rows were rejected for what the manifest says, and no retry helps: `pia-batch plan` "
            "tells why; correct them there, and they are new requests",
            soft_wrap=True,
        )
    _finish(summary)


def demo(
    output: Annotated[Path, typer.Option(help="a folder; what is finished in it is not made again")] = Path(
        "outputs/demo"
    ),
) -> None:
    """Animate twelve sample requests with the embedded model, on the CPU, with no download.

    Example: `pia-batch demo --output /tmp/demo`
    """
    import pyarrow.dataset as ds

    from pia_batch import tiny
    from pia_batch.storage import Store

    settings = {"defaults.format": "gif"}
    loaded = load(None, {"manifest": str(tiny.SAMPLE), "output": str(output), **settings})
    summary = _run(loaded)
    results = ds.dataset(output / "results" / summary.run_id).to_table(
        ["request_id", "prompt", "animation_uri", "error"]
    )
    for row in results.sort_by("request_id").to_pylist():
        place = str(row["animation_uri"] or row["error"]).replace(Store(loaded.output).uri, str(output))
        out.print(f"{row['request_id']:24}  {row['prompt']:28}  {place}", soft_wrap=True, markup=False)
    out.print(f"\nanimations: {output}/animations/\nresults:    {output}/results/{summary.run_id}/", soft_wrap=True)
    out.print(f"report:     {output}/_runs/{summary.run_id}/report.html", soft_wrap=True)
    _finish(summary)


def _run(config: RunConfig, *, run_id: str | None = None, retry: Retry | None = None) -> RunSummary:
    from pia_batch import pipeline

    with _stopping() as stop, shown_progress() as show:
        return pipeline.run(config, run_id=run_id, retry=retry, on_progress=show, stop=stop)


def _finish(summary: RunSummary) -> None:
    """Print what came out, and leave with its exit code."""
    out.print(
        f"{summary.requests} requests: {summary.succeeded} succeeded, {summary.failed} failed; "
        f"{summary.computed} computed in this run, {summary.duplicates} duplicate rows, {summary.seconds:.1f} s",
        soft_wrap=True,
    )
    for kind, count in summary.failures.items():
        out.print(f"  {kind}  {count}")
    out.print(f"results: {summary.results_uri}", soft_wrap=True)
    raise typer.Exit(summary.exit_code)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one ends the process at once."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        err.print(f"{signal.Signals(number).name}: committing what is in flight; once more to leave at once")
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
