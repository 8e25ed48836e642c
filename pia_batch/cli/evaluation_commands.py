"""Commands `evaluate`, `select` and `compare`, about animations that exist."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.status import Status
from rich.table import Table

from pia_batch import errors
from pia_batch.cli.console import LOG_EVERY_S, err, out, print_json
from pia_batch.cli.options import AsJson, Output, OutputOrConfig, Overrides, load, names_in, overrides
from pia_batch.cli.signals import first_signal
from pia_batch.storage import local_disk

if TYPE_CHECKING:
    from pia_batch.config import PlacementConfig
    from pia_batch.evaluation.job import EvaluationProgress
    from pia_batch.evaluation.publication import Evaluation

_PLACEMENT = "placement."


def evaluate(
    output: OutputOrConfig,
    run_id: Annotated[str | None, typer.Option(help="Run with complete results; default: the newest.")] = None,
    evaluation_id: Annotated[
        str | None, typer.Option("--id", help="Name of the evaluation; default: made from what it measures.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIPModel: a folder, owner/name on the hub, or a URI. Adds clip_i, clip_t, ….")
    ] = None,
    clip_revision: Annotated[str | None, typer.Option(help="Hub commit, tag or branch of --clip.")] = None,
    dino: Annotated[
        str | None, typer.Option(help="ViT of DINO, as --clip. Adds dino_subject_consistency and dino_i2v.")
    ] = None,
    dino_revision: Annotated[str | None, typer.Option(help="Hub commit, tag or branch of --dino.")] = None,
    flow: Annotated[
        bool, typer.Option("--flow/--no-flow", help="Measure what needs optical flow, most of the work.")
    ] = True,
    clip_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time limit for each clip; one that exceeds it is a failed row.")
    ] = 300.0,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure every animation of a run, and publish one row for each request. Continues where it was stopped.

    Workers are placed by the section `placement` of a config, or `--set placement.KEY=VALUE`, as engines of a run are.
    Example: `pia-batch evaluate s3://bucket/out --clip openai/clip-vit-large-patch14 --set placement.num_gpus=1`
    """
    from pia_batch.evaluation.job import evaluate as evaluate_output

    uri, placement = _placed(output, override)
    with _shown(as_json=as_json) as show, _interruptible():
        found = evaluate_output(
            uri,
            run_id=run_id,
            evaluation_id=evaluation_id,
            clip=clip,
            clip_revision=clip_revision,
            dino=dino,
            dino_revision=dino_revision,
            flow=flow,
            clip_timeout_s=clip_timeout,
            placement=placement,
            on_progress=show,
        )
    if as_json:
        print_json(found.summary | {"uri": found.uri})
    else:
        _print_evaluation(found)


def select(
    output: Output,
    evaluation: Annotated[str | None, typer.Option(help="Complete evaluation; default: the newest.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Score, such as 'clip_t + 0.5 * clip_i'; the highest are selected.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Condition, such as 'flicker > 0.97 and motion > 1'.")] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="COLUMNS", help="Select from each group of equal values; separate by commas.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Number selected of each group; default: 1 with --group-by, else all.")
    ] = None,
    out_uri: Annotated[
        str, typer.Option("--out", help="File or URI of the table, .parquet or .csv.")
    ] = "selected.parquet",
    as_json: AsJson = False,
) -> None:
    """Select requests by their measures, and write a table of their ids for --only of export, report and retry.

    Conditions name measures of the evaluation and columns of the results, those carried from the manifest included.
    Example: `pia-batch select s3://bucket/out --group-by base_id --by "clip_t + 0.5 * clip_i" --where "flicker > 0.97"`
    """
    from pia_batch.evaluation import selection
    from pia_batch.schema.expressions import RowFilter, RowNumber

    choice = selection.Choice(
        None if by is None else RowNumber(by),
        None if where is None else RowFilter(where),
        names_in(group_by, "--group-by") if group_by else (),
        top,
    )
    found = selection.select(output, choice, evaluation)
    uri = selection.write(found, out_uri)
    if as_json:
        print_json(
            {
                "evaluation_id": found.evaluation.evaluation_id,
                "run_id": found.evaluation.run_id,
                "requests": found.num_requests,
                "accepted": found.num_accepted,
                "unscored": found.num_unscored,
                "groups": found.num_groups,
                "selected": len(found.table),
                "table": uri,
            }
        )
        return
    unscored = f", {found.num_unscored} of them without a score" if found.num_unscored else ""
    groups = f" from {found.num_groups} groups" if group_by else ""
    out.print(
        f"{found.num_requests} requests, {found.num_accepted} accepted{unscored}; {len(found.table)} selected{groups}\n"
        f"table: {uri}",
        soft_wrap=True,
        markup=False,
    )


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="URI of the first output.")],
    b: Annotated[str, typer.Argument(metavar="B", help="URI of the second output, or of the same one.")],
    run_a: Annotated[str | None, typer.Option(help="Run of A; default: the newest.")] = None,
    run_b: Annotated[str | None, typer.Option(help="Run of B; default: the newest.")] = None,
    evaluation_a: Annotated[str | None, typer.Option(help="Evaluation of A; default: the newest of its run.")] = None,
    evaluation_b: Annotated[str | None, typer.Option(help="Evaluation of B; default: the newest of its run.")] = None,
    pair_by: Annotated[
        str, typer.Option(metavar="COLUMNS", help="Columns that the requests of a pair have in common.")
    ] = "request_id",
    by: Annotated[
        str | None, typer.Option(metavar="COLUMNS", help="Also compare in each group of equal values, such as model.")
    ] = None,
    name_a: Annotated[str | None, typer.Option(help="Name of A on the page; default: its run.")] = None,
    name_b: Annotated[str | None, typer.Option(help="Name of B on the page; default: its run.")] = None,
    max_pairs: Annotated[int, typer.Option(min=1, help="Pairs on the page: those with the largest change.")] = 60,
    out_file: Annotated[Path, typer.Option("--out", help="Local file of the page.")] = Path("compare.html"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare two outputs, or two runs: differences of their measures with intervals, and a page with the pairs.

    Compares what both evaluations measure, and columns of the results such as motion and gpu_seconds.
    Example: `pia-batch compare outputs/exact outputs/fast --by model --out fast.html`
    """
    from pia_batch.evaluation import comparison, comparison_page

    keys, groups = names_in(pair_by, "--pair-by"), names_in(by, "--by") if by else ()
    side_a = comparison.open_side(a, run_a, evaluation_a, keys, groups)
    side_b = comparison.open_side(b, run_b, evaluation_b, keys, groups)
    found = comparison.compare(side_a, side_b, keys, groups, seed)
    title = (name_a or side_a.results.run_id, name_b or side_b.results.run_id)
    page = comparison_page.render(found, title, max_pairs).encode()
    local_disk.write_file(out_file, page, "--out")
    if as_json:
        print_json(found.record() | {"page": out_file.absolute().as_uri()})
        return
    for group, intervals in found.groups.items():
        heading = group if len(found.groups) > 1 else None
        table = Table(title=heading, title_justify="left", box=None, pad_edge=False)
        for head in ("measure", "A", "B", "B - A", "95 % interval", "pairs"):
            table.add_column(head, justify="left" if head == "measure" else "right", no_wrap=True)
        for name, each in intervals.items():
            numbers = (_number(each.mean_a), _number(each.mean_b), _number(each.difference))
            table.add_row(name, *numbers, f"{_number(each.low)} to {_number(each.high)}", str(each.count))
        out.print(table)
    out.print(f"page: {out_file.absolute().as_uri()} ({len(page) / 1e6:.1f} MB)", soft_wrap=True, markup=False)


def _placed(output: str, settings: list[str] | None) -> tuple[str, PlacementConfig]:
    """Return the URI of the output, and the placement of the workers."""
    given = overrides(None, None, settings)
    if other := next((key for key in given if not key.startswith(_PLACEMENT)), None):
        raise errors.ConfigError(f"--set {other}: only keys of {_PLACEMENT}* place the workers of an evaluation")
    if output.endswith((".yaml", ".yml")):
        config = load(Path(output), given).filled()
        return config.output, config.placement
    return output, load(None, {"manifest": "-", "output": output} | given).placement


@contextmanager
def _shown(*, as_json: bool) -> Iterator[Callable[[EvaluationProgress], None]]:
    """Yield a progress callback: live on a terminal, elsewhere a line every LOG_EVERY_S seconds."""
    log, last = logging.getLogger("pia_batch.driver.progress"), 0.0
    status = Status("", console=err) if err.is_terminal else None

    def show(progress: EvaluationProgress) -> None:
        nonlocal last
        text = (
            f"{progress.done} of {progress.requests} requests measured, {progress.frames_per_second:.1f} frames/s, "
            f"{progress.errors} with an error"
        )
        if status is not None:
            status.update(text)
        elif not as_json and time.monotonic() - last >= LOG_EVERY_S:
            last = time.monotonic()
            log.info("progress %s", text)

    if status is None:
        yield show
    else:
        with status:
            yield show


@contextmanager
def _interruptible() -> Iterator[None]:
    """End the block by InterruptedRunError at the first SIGINT or SIGTERM: what is measured is committed already."""

    def stop(_: int) -> None:
        raise errors.InterruptedRunError("stopped; what was measured is committed. Start again to continue")

    with first_signal(stop):
        yield


def _print_evaluation(found: Evaluation) -> None:
    summary = found.summary
    table = Table(box=None, pad_edge=False)
    for head in ("measure", "mean", "std", "p05", "median", "p95", "clips"):
        table.add_column(head, justify="left" if head == "measure" else "right", no_wrap=True)
    for name in found.measures:
        figures = summary["measures"][name]
        numbers = (figures.get(each) for each in ("mean", "std", "p05", "median", "p95"))
        table.add_row(name, *(_number(number) for number in numbers), str(figures["count"]))
    out.print(table)
    out.print(
        f"{summary['requests']} requests, {summary['animations']} animations; {_errors(summary['errors'])}",
        soft_wrap=True,
    )
    out.print(f"evaluation: {found.evaluation_id}\nrows: {found.uri}", soft_wrap=True, markup=False)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _errors(kinds: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in kinds.items()) or "no errors"
