"""The command line: parse, call, print, exit code. Heavy imports wait until a command needs them.

Exit codes, for schedulers: 0 every request succeeded, or nothing to do · 1 a bug · 2 usage, config, manifest or store ·
3 finished, with more failed requests than `limits.max_failed` · 4 interrupted, start again to resume · 75 another run
holds the lease.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

from pia_batch import errors

if TYPE_CHECKING:
    import pyarrow as pa

    from pia_batch.config import RunConfig
    from pia_batch.summary import Progress, RunSummary

EXIT_CODES: dict[type[errors.PiaBatchError], int] = {
    errors.ConfigError: 2,
    errors.ManifestError: 2,
    errors.StorageError: 2,
    errors.InterruptedRunError: 4,
    errors.LeaseHeldError: 75,
}
LOG_EVERY_S = 10.0
"""Seconds between progress lines where standard error is no terminal."""

app = typer.Typer(
    help="Animate datasets of images and prompts with PIA on Ray Data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ConfigPath = Annotated[Path | None, typer.Argument(help="a YAML config; see README.md for every key")]
ManifestUri = Annotated[str | None, typer.Option("--manifest", help="the manifest's URI, over the config's")]
OutputUri = Annotated[str | None, typer.Option("--output", help="the output's URI, over the config's")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value over the config; may be repeated")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="draw again what failed before")]
Output = Annotated[str, typer.Argument(help="the output's URI")]


@app.command()
def run(
    config: ConfigPath = None,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    override: Overrides = None,
    retry_failed: RetryFailed = False,
    run_id: Annotated[str | None, typer.Option(help="names the results; made from the time by default")] = None,
    max_failed: Annotated[int | None, typer.Option(help="over limits.max_failed: more end with exit code 3")] = None,
) -> None:
    """Animate what is not finished yet, and publish the results.

    Example: `pia-batch run nightly.yaml --output s3://bucket/out --set placement.max_actors=8`
    """
    overrides = _overrides(manifest, output, override) | (
        {"limits.max_failed": max_failed} if max_failed is not None else {}
    )
    loaded = _load(config, overrides)
    _finish(_run(loaded, run_id=run_id, retry_failed=retry_failed))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="a folder; what is finished in it is not made again")] = Path(
        "outputs/demo"
    ),
) -> None:
    """Animate twelve sample requests with the embedded model, on the CPU, with no download.

    Example: `pia-batch demo --output /tmp/demo`
    """
    from pia_batch import tiny
    from pia_batch.journal import Journal
    from pia_batch.storage import Store

    settings = {"defaults.format": "gif", "placement.max_restarts": 0}
    loaded = _load(None, {"manifest": str(tiny.SAMPLE), "output": str(output), **settings})
    summary = _run(loaded)
    journal = Journal(Store(loaded.output))
    rows = [row for part in journal.winning_rows(journal.outcomes()) for row in part.to_pylist()]
    for row in sorted(rows, key=lambda row: str(row["request_id"])):
        place = str(row["animation_uri"] or row["error"]).replace(journal.store.uri, str(output))
        out.print(f"{row['request_id']:24}  {row['prompt']:28}  {place}", soft_wrap=True, markup=False)
    out.print(f"\nanimations: {output}/animations/\nresults:    {output}/results/{summary.run_id}/", soft_wrap=True)
    _finish(summary)


@app.command()
def plan(
    config: ConfigPath = None,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    override: Overrides = None,
    retry_failed: RetryFailed = False,
) -> None:
    """Check the manifest and tell what a run would do. Writes nothing, and needs neither a GPU nor a cluster.

    Example: `pia-batch plan --manifest requests.parquet --output outputs/first`
    """
    from pia_batch import planning

    made = planning.make(_load(config, _overrides(manifest, output, override)), retry_failed=retry_failed)
    finished = len(made.wanted) - made.num_pending - made.num_rejected
    out.print(
        f"manifest    {made.manifest.uri}  ({len(made.manifest.files)} {made.manifest.format} files)", soft_wrap=True
    )
    out.print(f"rows        {made.manifest.num_rows}")
    out.print(f"duplicates  {made.num_duplicates}")
    out.print(f"rejected    {made.num_rejected}")
    out.print(f"finished    {finished}")
    out.print(f"pending     {made.num_pending}")
    out.print(f"engine      {made.engine_id}")
    if made.num_rejected:
        _print_rejections(made.rejected)


@app.command()
def status(output: Output) -> None:
    """What is finished below an output, from any machine, also while a run goes on.

    Example: `pia-batch status s3://bucket/out`
    """
    from pia_batch import lease
    from pia_batch.journal import Journal, latest
    from pia_batch.storage import Store

    store = Store(output)
    outcomes = Journal(store).outcomes()
    out.print(f"succeeded  {int(outcomes.succeeded.sum())}")
    out.print(f"failed     {outcomes.failures.total()}")
    for kind, count in outcomes.failures.most_common():
        out.print(f"  {kind}  {count}")
    newest = latest(store)
    published = store.uri_of(f"results/{newest['run_id']}") if newest else "nothing yet"
    out.print(f"published  {published}", soft_wrap=True)
    _, holder = lease.newest(store)
    free = holder is None or holder["released"]
    out.print(f"lease      {'free' if free or holder is None else holder['run_id'] + ' on ' + holder['host']}")


@app.command()
def verify(output: Output) -> None:
    """Read every animation again and compare it with its result: there, same bytes, decodes, right size and length.

    Exit code 3 if any is not. Example: `pia-batch verify s3://bucket/out`
    """
    from pia_batch import journal, stages
    from pia_batch.storage import Store

    record = journal.Journal(Store(output))
    outcomes = record.outcomes()
    problems = 0
    for problem in journal.verify(record, outcomes, stages.check_animation):
        problems += 1
        out.print(f"{problem.request_id}: {problem.animation_uri}: {problem.what}", soft_wrap=True, markup=False)
    out.print(f"{int(outcomes.succeeded.sum())} animations verified, {problems} with a problem")
    raise typer.Exit(3 if problems else 0)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code; `arguments` instead of those of the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("pia_batch").setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    try:
        app(arguments)
    except errors.PiaBatchError as problem:
        err.print(f"pia-batch: {problem}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(next((code for kind, code in EXIT_CODES.items() if isinstance(problem, kind)), 1))


def _load(path: Path | None, overrides: dict[str, Any]) -> RunConfig:
    from pia_batch.config import RunConfig

    return RunConfig.load(path, overrides)


def _overrides(manifest: str | None, output: str | None, settings: list[str] | None) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals:
            raise errors.ConfigError(f"--set {setting}: expected section.key=value")
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise errors.ConfigError(f"--set {setting}: {text!r} is no value in YAML") from None
    flags = {"manifest": manifest, "output": output}
    return overrides | {name: value for name, value in flags.items() if value is not None}


def _run(config: RunConfig, *, run_id: str | None = None, retry_failed: bool = False) -> RunSummary:
    from pia_batch import pipeline

    with _stopping() as stop, _shown_progress() as show:
        return pipeline.run(config, run_id=run_id, retry_failed=retry_failed, on_progress=show, stop=stop)


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


def _print_rejections(rejected: pa.Table, per_kind: int = 3) -> None:
    kinds = sorted(set(rejected["error_kind"].to_pylist()))
    for kind in kinds:
        texts = [
            text
            for name, text in zip(*(rejected[c].to_pylist() for c in ("error_kind", "error")), strict=True)
            if name == kind
        ]
        out.print(f"\n{kind}  {len(texts)}", style="bold")
        for text in texts[:per_kind]:
            out.print(f"  {text}", markup=False, soft_wrap=True)


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


@contextmanager
def _shown_progress() -> Iterator[Any]:
    """A callback for `pipeline.run`: a live bar on a terminal, a line now and then elsewhere."""
    if not err.is_terminal:
        yield _log_progress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=err) as bar:
        task = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            left = progress.seconds_left
            words = f"{progress.failed} failed  {progress.clips_per_second:.2f} clips/s"
            words += "" if left is None else f"  {left:.0f} s left"
            bar.update(task, total=progress.total, completed=progress.done, description=words)

        yield show


def _log_progress() -> Any:  # a callback
    last = -LOG_EVERY_S
    log = logging.getLogger("pia_batch.progress")

    def show(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_EVERY_S or progress.done == progress.total:
            last = time.monotonic()
            left = "unknown" if progress.seconds_left is None else f"{progress.seconds_left:.0f}"
            log.info(
                "progress done=%d failed=%d total=%d clips_per_second=%.2f seconds_left=%s",
                *(progress.done, progress.failed, progress.total, progress.clips_per_second, left),
            )

    return show


if __name__ == "__main__":
    main()
