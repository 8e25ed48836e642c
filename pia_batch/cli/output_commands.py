"""Commands `status`, `verify`, `gc` and `report`, which need only the store of an output."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from pia_batch import errors
from pia_batch.cli.console import counting, out, print_json
from pia_batch.cli.options import AsJson, Output, OutputOrConfig, existing, held, seconds_of

if TYPE_CHECKING:
    from pia_batch.journal.garbage_collection import Garbage
    from pia_batch.report import Report, ReportOptions
    from pia_batch.storage.object_store import Store


def status(
    output: OutputOrConfig,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until interrupted.")] = False,
    every: Annotated[str, typer.Option(help="With --watch: interval, a number with s, m or h.")] = "10s",
) -> None:
    """Show how much of an output is finished, and which run works on it. Needs only the store, from any machine.

    Examples: `pia-batch status s3://bucket/out`, `pia-batch status s3://bucket/out --watch`
    """
    from pia_batch.cli import view
    from pia_batch.journal.status import read_status

    store, every_s = existing(output)[0], seconds_of(every, "--every")
    shown = Live(console=out, auto_refresh=False) if watch and out.is_terminal and not as_json else nullcontext()
    before: tuple[float, int] | None = None
    with shown as screen:
        while True:
            payload, now = read_status(store), time.monotonic()
            done = payload["succeeded"] + payload["failed"]
            pace = (done - before[1]) / (now - before[0]) if before else None
            before = now, done
            if as_json:
                print_json(payload if pace is None else payload | {"requests_per_second": round(pace, 3)})
            elif screen is not None:
                screen.update(view.overview(payload, pace), refresh=True)
            elif out.is_terminal:
                out.print(view.overview(payload, pace))
            else:
                out.print(view.status_text(payload, pace), soft_wrap=True)
            if not watch or out.is_abandoned:
                return
            time.sleep(every_s)


def verify(
    output: OutputOrConfig,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete damaged animations, so that the next run generates them again.")
    ] = False,
) -> None:
    """Read every animation and poster and compare it with its result: existence, bytes, decoding, size and length.

    `metadata.parquet` and `README.md` are compared with the newest results, and written again by `--repair`.
    Exit code 3 if any differs, repaired or not. `--repair` is refused with exit code 75 while a run works there.
    Example: `pia-batch verify s3://bucket/out --repair`
    """
    from pia_batch.journal.log import Journal
    from pia_batch.journal.results import find_dataset_difference, restore_dataset
    from pia_batch.journal.verify import PROBLEMS, find_problems
    from pia_batch.journal.verify import repair as repair_animations
    from pia_batch.media import posters, quality

    store, ttl_s = existing(output)
    record = Journal(store)
    with held(store, "verify", ttl_s) if repair else nullcontext() as lease:
        outcomes = record.outcomes()
        total = int(outcomes.succeeded.sum())
        with counting("animations read", total) as one_more:
            problems = list(find_problems(record, outcomes, quality.check_animation, posters.check_poster, one_more))
        difference = find_dataset_difference(store)
        if lease is not None:
            repair_animations(record, outcomes, problems, lease.check)
            lease.check()
            restore_dataset(record)
    for kind, meaning in PROBLEMS.items():
        found = [problem for problem in problems if problem.kind == kind]
        if found:
            out.print(f"\n{kind}  {len(found)}  {meaning}", style="bold")
        for problem in found:
            out.print(f"  {problem.request_id}: {problem.uri}: {problem.detail}", soft_wrap=True, markup=False)
    out.print(f"{total} animations verified, {len(problems)} with a problem")
    if problems:
        words = "their requests need regeneration: " if repair else "after `--repair`, "
        out.print(f"{words}`pia-batch run` generates them again and publishes new results", soft_wrap=True)
    if difference:
        words = "written again" if repair else "`--repair` writes the dataset again"
        out.print(f"{difference}: {words}", soft_wrap=True, markup=False)
    raise typer.Exit(3 if problems or difference else 0)


def gc(
    output: OutputOrConfig,
    older_than: Annotated[
        str, typer.Option(help="Keep objects newer than this: a number with s, m, h or d, such as 12h.")
    ] = "7d",
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the objects that are found; default: change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List objects of an output that no result names: orphaned animations, unfinished files, old leases.

    Deletes only with `--delete`, and never while a run works there (exit code 75).
    Example: `pia-batch gc s3://bucket/out --older-than 30d --delete`
    """
    from pia_batch.journal.garbage_collection import GARBAGE_KINDS, delete_garbage, find_garbage, make_room
    from pia_batch.journal.log import Journal

    store, ttl_s = existing(output)
    before_s = time.time() - seconds_of(older_than, "--older-than")
    counts = {kind: [0, 0] for kind in GARBAGE_KINDS}

    def count(items: Iterable[Garbage]) -> None:
        with counting("objects found") as one_more:
            for item in items:
                counts[item.kind][0] += 1
                counts[item.kind][1] += item.info.num_bytes
                one_more()
                if not as_json:
                    out.print(f"{item.kind:11}{item.info.num_bytes:>12}  {item.info.name}", soft_wrap=True)

    found = find_garbage(Journal(store), before_s)
    if delete:
        with held(store, "gc", ttl_s, lambda: count(make_room(store, found))) as lease:
            count(delete_garbage(store, found, lease.check))
    else:
        count(found)
    if as_json:
        payload = {kind: {"objects": number, "bytes": size} for kind, (number, size) in counts.items()}
        print_json(
            {
                "output": store.uri,
                "older_than_s": seconds_of(older_than, "--older-than"),
                "deleted": delete,
                "garbage": payload,
            }
        )
        return
    width = max(map(len, GARBAGE_KINDS.values()))
    for kind, (number, size) in counts.items():
        out.print(f"{GARBAGE_KINDS[kind]:{width}}{number:>9} objects {size / 1e6:>12.2f} MB", soft_wrap=True)
    if not delete and any(number for number, _ in counts.values()):
        out.print("nothing was changed; `--delete` deletes them")


def report(
    output: Output,
    run_id: Annotated[str | None, typer.Option(help="Run with complete results; default: the newest.")] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Local file; default: _runs/RUN_ID/report.html of the output.")
    ] = None,
    media_url: Annotated[str | None, typer.Option(help="HTTP address of the output folder, if it has one.")] = None,
    embed: Annotated[
        bool | None,
        typer.Option(help="Put images that a browser cannot load into the page; default: in runs of up to 200."),
    ] = None,
    max_results: Annotated[
        int | None, typer.Option(min=2, help="For larger runs, show failures and a fair sample.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="Only requests whose ids a Parquet, CSV or JSONL table has."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price per device-hour; adds the cost to the page.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="Complete evaluation whose measures the page shows; default: the newest of the run."),
    ] = None,
    comparison: Annotated[
        list[str] | None,
        typer.Option(metavar="PAGE", help="File or HTTP address of a page of `compare` to link to; repeatable."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Write the page of a running run repeatedly until the run ends.")
    ] = False,
    every: Annotated[str, typer.Option(help="With --live: interval, a number with s, m or h.")] = "30s",
) -> None:
    """Write a page about a run: counts, failures, measures, and every animation next to its image.

    Examples: `pia-batch report s3://bucket/out --price-per-hour 2.49`, `pia-batch report s3://bucket/out --live`
    """
    from pia_batch import report
    from pia_batch.evaluation.page_measures import measured
    from pia_batch.manifest import id_tables
    from pia_batch.storage.object_store import Store

    for name, given in (("--only", only), ("--evaluation", evaluation)):
        if live and given is not None:
            raise errors.ConfigError(f"--live, {name}: mutually exclusive; give one of them")
    store = Store(output)
    options = report.ReportOptions(
        max_results=max_results or report.MAX_RESULTS,
        embed=embed,
        media_url=media_url,
        only=None if only is None else id_tables.read(only),
        price_per_hour=price_per_hour,
        measured=None if live else measured(store, evaluation, run_id),
        comparisons=tuple(comparison or ()),
    )
    if live:
        _follow(store, run_id, seconds_of(every, "--every"), options, out_file)
    else:
        _print_report(report.write(store, run_id, options, out_file))


def _follow(store: Store, run_id: str | None, every_s: float, options: ReportOptions, path: Path | None) -> None:
    """Write the page of a run repeatedly, until it has published or no run holds the lease."""
    from pia_batch import report
    from pia_batch.journal.results import is_published
    from pia_batch.journal.status import read_last_run, read_lease_state
    from pia_batch.storage.uris import redacted_uri

    begun = read_last_run(store)
    if begun is None:
        raise errors.ConfigError(f"no run has ever written to {redacted_uri(store.uri)}; correct the URI of the output")
    for made in report.follow(store, run_id or begun["run_id"], every_s, options, path):
        _print_report(made)
        if read_lease_state(store)["state"] == "held":
            time.sleep(every_s)
        elif not is_published(store, made.run_id):
            out.print("the run has ended without publishing; continue it with `pia-batch run`, then start this again")
            return


def _print_report(made: Report) -> None:
    shown = "" if made.num_shown == made.num_results else f", {made.num_shown} of them shown"
    out.print(f"{made.num_results} results{shown}, {made.num_bytes / 1e6:.2f} MB\nreport: {made.uri}", soft_wrap=True)
