"""The command line: parse, call, print, exit code. Heavy imports wait until a command needs them.

Exit codes, for schedulers: 0 every request succeeded, or nothing to do · 1 a bug · 2 usage, config, manifest or store ·
3 finished, with more failed requests than `limits.max_failed`, or `verify` found a problem · 4 interrupted, start again
to resume · 75 another run holds the lease.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.status import Status

from pia_batch import errors

if TYPE_CHECKING:
    import pyarrow as pa

    from pia_batch.config import RunConfig
    from pia_batch.lease import Lease
    from pia_batch.planning import Retry
    from pia_batch.storage import Store
    from pia_batch.summary import Progress, RunSummary

EXIT_CODES: dict[type[errors.PiaBatchError], int] = {
    errors.ConfigError: 2,
    errors.ManifestError: 2,
    errors.StorageError: 2,
    errors.BrokenDeviceError: 2,
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
RunId = Annotated[str | None, typer.Option(help="names the results; made from the time by default")]
MaxFailed = Annotated[int | None, typer.Option(help="over limits.max_failed: more end with exit code 3")]
Output = Annotated[str, typer.Argument(help="the output's URI")]
OutputOrConfig = Annotated[str, typer.Argument(help="the output's URI, or the YAML config that names it")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output, and nothing else")]


@app.command()
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

    loaded = _load(config, _overrides(manifest, output, override) | _given({"limits.max_failed": max_failed}))
    _finish(_run(loaded, run_id=run_id, retry=Retry() if retry_failed else None))


@app.command()
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

    limits = _given({"limits.max_failed": max_failed, "limits.max_attempts": max_attempts})
    loaded = _load(config, _overrides(manifest, output, override) | limits)
    summary = _run(loaded, run_id=run_id, retry=Retry(frozenset(kinds) if kinds else None))
    if summary.rejected:
        out.print(
            f"{summary.rejected} rows were rejected for what the manifest says, and no retry helps: `pia-batch plan` "
            "tells why; correct them there, and they are new requests",
            soft_wrap=True,
        )
    _finish(summary)


@app.command()
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
    loaded = _load(None, {"manifest": str(tiny.SAMPLE), "output": str(output), **settings})
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

    loaded = _load(config, _overrides(manifest, output, override))
    made = planning.make(loaded, retry=planning.Retry() if retry_failed else None)
    finished = len(made.wanted) - made.num_pending - made.num_rejected
    out.print(
        f"manifest    {made.manifest.uri}  ({len(made.manifest.files)} {made.manifest.format} files)", soft_wrap=True
    )
    out.print(f"rows        {made.manifest.num_rows}")
    out.print(f"duplicates  {made.num_duplicates}")
    out.print(f"rejected    {made.num_rejected}")
    out.print(f"finished    {finished}")
    out.print(f"pending     {made.num_pending}")
    for name, engine_id in made.engine_ids.items():
        out.print(f"engine      {engine_id}  {name}")
    if made.is_mixed:
        _print_groups(made.groups)
    if made.num_rejected:
        _print_rejections(made.rejected)


@app.command()
def status(output: OutputOrConfig, as_json: AsJson = False) -> None:
    """What is finished below an output, and who works on it now. Needs the store alone, from any machine.

    Example: `pia-batch status s3://bucket/out`
    """
    from pia_batch import status

    told = status.status(_existing(output)[0])
    if as_json:
        _print_json(told)
        return
    out.print(f"succeeded  {told['succeeded']}")
    out.print(f"failed     {told['failed']}")
    for kind, count in told["failures"].items():
        out.print(f"  {kind}  {count}")
    if told["due_again"]:
        out.print(f"due again  {told['due_again']}  (taken back by `verify --repair`; the next run draws them)")
    begun = told["run"]
    if begun is None:
        out.print("last run   none")
    else:
        words = "" if begun["finished"] else f", {begun['pending']} to draw then, not finished"
        out.print(f"last run   {begun['run_id']}  started {begun['started_at']}{words}", soft_wrap=True)
    out.print(f"published  {told['published'] or 'nothing yet'}", soft_wrap=True)
    lease = told["lease"]
    if lease["state"] == "free":
        out.print("lease      free")
    else:
        since = f" since {lease['since']}" if lease["since"] else ""
        words = "renewed" if lease["state"] == "held" else "SILENT: the next run takes over; last renewed"
        out.print(
            f"lease      {lease['run_id']} on {lease['host']}{since}, {words} {lease['silent_s']:.0f} s ago",
            soft_wrap=True,
        )


@app.command()
def verify(
    output: OutputOrConfig,
    repair: Annotated[
        bool, typer.Option("--repair", help="delete what is damaged and have the next run draw it again")
    ] = False,
) -> None:
    """Read every animation again and compare it with its result: there, same bytes, decodes, right size and length.

    Exit code 3 if any is not, repaired or not. `--repair` is refused with 75 while a run works there.
    Example: `pia-batch verify s3://bucket/out --repair`
    """
    from pia_batch import animate, verification
    from pia_batch.journal import Journal

    store, ttl_s = _existing(output)
    record = Journal(store)
    with _held(store, "verify", ttl_s) if repair else nullcontext() as lease:
        outcomes = record.outcomes()
        total = int(outcomes.succeeded.sum())
        with _counting("animations read", total) as one_more:
            problems = list(verification.verify(record, outcomes, animate.check_animation, one_more))
        if lease is not None:
            verification.repair(record, outcomes, problems, lease.check)
    for kind, meaning in verification.PROBLEMS.items():
        found = [problem for problem in problems if problem.kind == kind]
        if found:
            out.print(f"\n{kind}  {len(found)}  {meaning}", style="bold")
        for problem in found:
            out.print(f"  {problem.request_id}: {problem.animation_uri}: {problem.what}", soft_wrap=True, markup=False)
    out.print(f"{total} animations verified, {len(problems)} with a problem")
    if problems:
        words = "they are due again: `pia-batch run` draws them" if repair else "`--repair` has them drawn again"
        out.print(f"{words}, and publishes new results", soft_wrap=True)
    raise typer.Exit(3 if problems else 0)


@app.command()
def gc(
    output: OutputOrConfig,
    older_than: Annotated[
        str, typer.Option(help="leave alone what was written since: a number with s, m, h or d, such as 12h")
    ] = "7d",
    delete: Annotated[
        bool, typer.Option("--delete", help="remove what is found; without it nothing is changed")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find what lies below an output and no result names: orphaned animations, unfinished files, old leases.

    Deletes only with `--delete`, and never while a run works there: that ends with exit code 75.
    Example: `pia-batch gc s3://bucket/out --older-than 30d --delete`
    """
    from pia_batch import garbage
    from pia_batch.journal import Journal

    store, ttl_s = _existing(output)
    before_s = time.time() - _seconds(older_than)
    counts = {sort: [0, 0] for sort in garbage.SORTS}

    def count(items: Iterable[garbage.Garbage]) -> None:
        with _counting("objects found") as one_more:
            for item in items:
                counts[item.sort][0] += 1
                counts[item.sort][1] += item.found.num_bytes
                one_more()
                if not as_json:
                    out.print(f"{item.sort:11}{item.found.num_bytes:>12}  {item.found.name}", soft_wrap=True)

    found = garbage.find(Journal(store), before_s)
    if delete:
        with _held(store, "gc", ttl_s) as lease:
            count(garbage.delete(store, found, lease.check))
    else:
        count(found)
    if as_json:
        told = {sort: {"objects": number, "bytes": size} for sort, (number, size) in counts.items()}
        _print_json({"output": store.uri, "older_than_s": _seconds(older_than), "deleted": delete, "garbage": told})
        return
    for sort, (number, size) in counts.items():
        out.print(f"{garbage.SORTS[sort]:40}{number:>9} objects {size / 1e6:>12.2f} MB")
    if not delete and any(number for number, _ in counts.values()):
        out.print("nothing was changed; `--delete` removes them")


@app.command()
def report(
    output: Output,
    run_id: Annotated[str | None, typer.Option(help="a run with complete results; the newest by default")] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="a local file; _runs/RUN_ID/report.html of the output by default")
    ] = None,
    media_url: Annotated[str | None, typer.Option(help="the http address of the output folder, if it has one")] = None,
    embed: Annotated[
        bool | None,
        typer.Option(help="pictures that a browser cannot get, inside the page; by default in runs of up to 200"),
    ] = None,
    max_results: Annotated[int | None, typer.Option(min=2, help="more than this: failures and a fair sample")] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="of one device; the page tells a cost")] = None,
) -> None:
    """Make the page that shows a run: counts, failures, measures, and every animation beside its image.

    Example: `pia-batch report s3://bucket/out --price-per-hour 2.49`
    """
    from pia_batch import report
    from pia_batch.storage import Store

    options = report.Options(
        max_results=max_results or report.MAX_RESULTS, embed=embed, media_url=media_url, price_per_hour=price_per_hour
    )
    made = report.write(Store(output), run_id, options, out_file)
    shown = "" if made.num_shown == made.num_results else f", {made.num_shown} of them shown"
    out.print(f"{made.num_results} results{shown}, {made.num_bytes / 1e6:.2f} MB\nreport: {made.uri}", soft_wrap=True)


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


def _existing(output: str) -> tuple[Store, float]:
    """The store of an output that something was written to, and how many seconds a lease on it lasts.

    Args:
        output: its URI, or the path of a config that names it.
    """
    from pia_batch.config import LimitsConfig
    from pia_batch.storage import Store
    from pia_batch.uris import redacted_uri

    ttl_s = LimitsConfig().lease_ttl_s
    if output.endswith((".yaml", ".yml")):
        loaded = _load(Path(output), {})
        output, ttl_s = loaded.output, loaded.limits.lease_ttl_s
    store = Store(output)
    if not any(True for prefix in ("_journal/", "_runs/", "_lease/") for _ in store.list(prefix)):
        raise errors.ConfigError(f"no run has ever written to {redacted_uri(store.uri)}; correct the URI of the output")
    return store, ttl_s


@contextmanager
def _held(store: Store, command: str, ttl_s: float) -> Iterator[Lease]:
    """The lease of an output, so that no run goes on or begins meanwhile.

    Raises:
        LeaseHeldError: a run works there.
    """
    from pia_batch.lease import Lease

    with Lease(store, f"{command}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}", ttl_s) as lease:
        yield lease


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text)
    if match is None:
        raise errors.ConfigError(f"--older-than {text}: expected a number with s, m, h or d, such as 12h or 7d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _print_json(told: dict[str, Any]) -> None:
    out.print(json.dumps(told, indent=2, ensure_ascii=False), soft_wrap=True, markup=False)


@contextmanager
def _counting(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A callback for each of many things: a live count on a terminal, a line now and then elsewhere."""
    done, last = 0, time.monotonic()
    log = logging.getLogger("pia_batch.progress")
    with Status("", console=err) if err.is_terminal else nullcontext() as shown:

        def one_more() -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last < (0.2 if shown else LOG_EVERY_S):
                return
            last = time.monotonic()
            words = f"{done}{f' of {total}' if total is not None else ''} {what}"
            if shown:
                shown.update(words)
            else:
                log.info("progress %s", words)

        yield one_more


def _given(overrides: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if value is not None}


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


def _run(config: RunConfig, *, run_id: str | None = None, retry: Retry | None = None) -> RunSummary:
    from pia_batch import pipeline

    with _stopping() as stop, _shown_progress() as show:
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


def _print_groups(groups: pa.Table) -> None:
    """What is drawn together, the largest groups first."""
    shown = 10
    for group in groups.sort_by([("num_rows", "descending")]).slice(0, shown).to_pylist():
        size = f"up to {group['long_side']} px" if group["size"] == "auto" else f"{group['width']} x {group['height']}"
        told = f"{group['num_rows']} rows: {group['model']}, {group['num_frames']} frames, {size}"
        out.print(f"together    {told}", soft_wrap=True, markup=False)
    if len(groups) > shown:
        out.print(f"            and {len(groups) - shown} more kinds of rows")


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
