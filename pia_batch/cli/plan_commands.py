"""Commands `plan` and `doctor`, which check a run before it costs anything."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pia_batch.cli.console import out, print_json
from pia_batch.cli.options import (
    AsJson,
    ColumnSources,
    ConfigPath,
    ManifestUri,
    OutputUri,
    Overrides,
    Params,
    RequestIdFrom,
    RetryFailed,
    RunDateText,
    columns_of,
    given,
    load,
    overrides,
    params_of,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from pia_batch.config import RunConfig
    from pia_batch.planning.plan import Plan
    from pia_batch.planning.statistics import Statistics

SHOWN_GROUPS = 10
SHOWN_FILES = 3
"""Maximum number of names of files that are shown."""

SHOWN_REJECTIONS = 3
"""Maximum number of examples shown for each kind of rejection."""


def plan(
    config: ConfigPath = None,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    override: Overrides = None,
    run_date: RunDateText = None,
    param: Params = None,
    column: ColumnSources = None,
    request_id_from: RequestIdFrom = None,
    retry_failed: RetryFailed = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price per GPU-hour, in any currency; overrides budget.price_per_hour.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the manifest, estimate what a run would do and cost, and warn of likely errors. Write nothing.

    Needs neither a GPU nor a cluster. Example: `pia-batch plan nightly.yaml --price-per-hour 2.49`
    """
    from pia_batch.driver.worker_modules import check_modules
    from pia_batch.planning.plan import Retry, make_plan
    from pia_batch.planning.statistics import Statistics

    dated = given({"run_date": run_date, "request_id_from": request_id_from}) | params_of(param) | columns_of(column)
    loaded = load(config, overrides(manifest, output, override) | dated).filled()
    check_modules()
    statistics = Statistics()
    made = make_plan(loaded, retry=Retry() if retry_failed else None, statistics=statistics)
    price = loaded.budget.price_per_hour if price_per_hour is None else price_per_hour
    payload = _payload(made, statistics, price)
    if as_json:
        print_json(payload)
    else:
        _print(payload)


def doctor(
    config: ConfigPath = None,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    override: Overrides = None,
    run_date: RunDateText = None,
    param: Params = None,
    column: ColumnSources = None,
    request_id_from: RequestIdFrom = None,
    as_json: AsJson = False,
) -> None:
    """Check everything that a run needs: packages, codecs, GPU, disk, weights, manifest, store, Ray.

    Exit code 2 if any check fails. Without a config, only this machine is checked. One small object stays in the
    output, as after every run. Example: `pia-batch doctor nightly.yaml`
    """
    from pia_batch.driver import preflight

    dated = given({"run_date": run_date, "request_id_from": request_id_from}) | params_of(param) | columns_of(column)
    given_overrides = overrides(manifest, output, override) | dated
    loaded = load(config, given_overrides).filled() if config is not None or given_overrides else None
    findings = []
    for finding in preflight.examine(loaded):
        findings.append(finding)
        if not as_json:
            style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[finding.state]
            out.print(f"{finding.state.upper():5}", style=style, end="")
            out.print(f"{finding.subject:9} {finding.message}", soft_wrap=True, markup=False)
            if finding.remedy:
                out.print(f"{'':15}{finding.remedy}", soft_wrap=True, markup=False)
    counts = {state: sum(finding.state == state for finding in findings) for state in ("ok", "warn", "fail")}
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings], **counts})
    else:
        out.print(f"\n{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    raise typer.Exit(2 if counts["fail"] else 0)


def _payload(made: Plan, statistics: Statistics, price: float | None) -> dict[str, Any]:
    from pia_batch.journal.log import Journal
    from pia_batch.planning.cost import estimate_bytes, estimate_costs, estimate_finishing, measure_finished
    from pia_batch.planning.plan_warnings import warnings_of
    from pia_batch.storage.object_store import Store

    config = made.config
    journal = Journal(Store(config.output))
    found = measure_finished(journal, made.outcomes.fragments, config, made.engine_ids)
    costs = estimate_costs(statistics, made.num_selected, config, found)
    engines = config.placement.max_engines
    return {
        "manifest": {
            "uri": made.manifest.uri,
            "format": made.manifest.format,
            "files": len(made.manifest.files),
            "rows": made.manifest.num_rows,
            "blank": made.manifest.num_blank,
            "left_out": {
                "count": len(made.manifest.left_out),
                "first": [path.rsplit("/", 1)[-1] for path in made.manifest.left_out[:SHOWN_FILES]],
            },
        },
        "duplicates": made.num_duplicates,
        "rejected": made.num_rejected,
        "rejections": _rejections(made.rejected),
        "finished": len(made.wanted) - made.num_pending - made.num_rejected,
        "pending": made.num_pending,
        "selected": made.num_selected,
        "engines": made.engine_ids,
        "groups": _groups(statistics.work, config.placement.batch_size),
        "devices": [
            {
                "device": cost.device,
                "hours": list(cost.hours),
                "hours_of_run": [hours / engines for hours in cost.hours],
                "cost": None if price is None else [hours * price for hours in cost.hours],
                "source": cost.source,
            }
            for cost in costs
        ],
        "bytes": list(estimate_bytes(statistics, made.num_selected, found)),
        "finishing_core_hours": estimate_finishing(statistics, made.num_selected),
        "warnings": [*warnings_of(config, statistics), *_about_this_machine(config)],
    }


def _rejections(rejected: pa.Table) -> dict[str, dict[str, Any]]:
    """Return the number of rejected rows by error kind, with the first messages of each kind."""
    pairs = list(zip(*(rejected[name].to_pylist() for name in ("error_kind", "error")), strict=True))
    found = {}
    for kind in sorted({kind for kind, _ in pairs}):
        texts = [text for name, text in pairs if name == kind]
        found[kind] = {"count": len(texts), "first": texts[:SHOWN_REJECTIONS]}
    return found


def _groups(work: pa.Table, batch_size: int) -> list[dict[str, Any]]:
    """Return the groups of requests that share batches, the largest first, with their sizes and batch counts."""
    from pia_batch.schema.columns import GROUPED

    groups = work.group_by(list(GROUPED)).aggregate([("num_rows", "sum")])
    groups = groups.rename_columns([*GROUPED, "num_rows"]).sort_by([("num_rows", "descending")])
    return [group | {"batches": -(-group["num_rows"] // batch_size)} for group in groups.to_pylist()]


def _about_this_machine(config: RunConfig) -> list[str]:
    """Return what would keep a run on this machine from starting, as far as it is seen without writing anything."""
    from pia_batch.driver.own_ray import check_limits, check_temp_path
    from pia_batch.errors import ConfigError
    from pia_batch.storage.object_store import Store

    found = []
    place = config.placement
    if place.address == "local":
        for check in (check_temp_path, partial(check_limits, object_store_mb=place.object_store_mb)):
            try:
                check()
            except ConfigError as err:
                found.append(str(err))
    if obstacle := Store(config.output).find_obstacle():
        found.append(obstacle)
    return [f"a run on this machine would not start: {each}" for each in found]


def _print(payload: dict[str, Any]) -> None:
    manifest = payload["manifest"]
    _print_manifest(manifest)
    for name in ("duplicates", "rejected", "finished", "pending"):
        out.print(f"{name:12}{payload[name]}")
    if payload["selected"] != payload["pending"]:
        out.print(f"selected    {payload['selected']}  (by the budget)")
    for name, engine_id in payload["engines"].items():
        out.print(f"engine      {engine_id}  {name}", markup=False)
    for group in payload["groups"][:SHOWN_GROUPS]:
        size = f"up to {group['long_side']} px" if group["size"] == "auto" else f"{group['width']} x {group['height']}"
        words = f"{group['num_rows']} rows: {group['model']}, {group['call_frames']} frames, {size}"
        batches = f"{group['batches']} batch{'es' if group['batches'] > 1 else ''}"
        out.print(f"group       {words}; {batches}", soft_wrap=True, markup=False)
    if len(payload["groups"]) > SHOWN_GROUPS:
        out.print(f"            and {len(payload['groups']) - SHOWN_GROUPS} more groups")
    if payload["selected"]:
        _print_work(payload)
    for words in payload["warnings"]:
        out.print(f"warning     {words}", soft_wrap=True, markup=False, style="yellow")
    for kind, found in payload["rejections"].items():
        out.print(f"\n{kind}  {found['count']}", style="bold")
        for text in found["first"]:
            out.print(f"  {text}", markup=False, soft_wrap=True)


def _print_work(payload: dict[str, Any]) -> None:
    from pia_batch.report import head

    low, high = (head.size(number) for number in payload["bytes"])
    out.print(f"output      {low if low == high else f'{low} to {high}'}")
    if payload["finishing_core_hours"]:
        hours = f"{payload['finishing_core_hours']:.2g} hours of a core, while the devices generate"
        out.print(f"finishing   {hours} (estimate)", soft_wrap=True)
    _print_devices(payload["devices"])


def _print_manifest(manifest: dict[str, Any]) -> None:
    files = f"{manifest['files']} {manifest['format']} files"
    out.print(f"manifest    {manifest['uri']}  ({files})", soft_wrap=True, markup=False)
    left_out = manifest["left_out"]
    if left_out["count"]:
        names = ", ".join(left_out["first"]) + (", ..." if left_out["count"] > len(left_out["first"]) else "")
        words = f"{left_out['count']} files (not Parquet, JSONL or CSV by name, or left by a broken write: {names})"
        out.print(f"left out    {words}", soft_wrap=True, markup=False, style="yellow")
    if manifest["blank"]:
        words = f"{manifest['blank']} (CSV lines without any value; skipped)"
        out.print(f"blank rows  {words}", markup=False, style="yellow")
    out.print(f"rows        {manifest['rows']}")


def _print_devices(devices: list[dict[str, Any]]) -> None:
    for each in devices:
        cost = "" if each["cost"] is None else f"  cost {_range(each['cost'], 2)}"
        words = f"{each['device']:10} {_range(each['hours'], 3)} device hours{cost}  ({each['source']})"
        out.print(f"time        {words}", soft_wrap=True, markup=False)
    if not devices:
        out.print("time        unknown: the embedded model was not measured here yet; a first run measures it")


def _range(numbers: list[float], digits: int) -> str:
    """Return two numbers as one or as a span; no number but 0 is shown as 0."""
    low, high = (_decimals(number, digits) for number in numbers)
    return low if low == high else f"{low} to {high}"


def _decimals(number: float, digits: int) -> str:
    least = 10**-digits
    if 0 < number < least:
        return f"under {least:.{digits}f}"
    return f"{number:.{digits}f}" if number < 10 else f"{number:,.0f}"  # noqa: PLR2004 - more digits say nothing
