"""Flags that `run`, `retry` and `submit` share, defined once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from pia_batch.cli.options import (
    AsJson,
    ColumnSources,
    ConfigPath,
    ManifestUri,
    OutputUri,
    Overrides,
    Params,
    RequestIdFrom,
    RunDateText,
    columns_of,
    given,
    load,
    overrides,
    params_of,
    seconds_of,
)

if TYPE_CHECKING:
    from pia_batch.config import RunConfig


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Flags of `run`, `retry` and `submit`, named as on the command line."""

    config: ConfigPath = None
    manifest: ManifestUri = None
    output: OutputUri = None
    override: Overrides = None
    run_id: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the results; may contain {date}. Default: made from the date or the time."
        ),
    ] = None
    run_date: RunDateText = None
    backfill: Annotated[
        str | None,
        typer.Option(metavar="FROM..TO", help="Run each date (or hour) from FROM to TO, both included, in order."),
    ] = None
    param: Params = None
    column: ColumnSources = None
    request_id_from: RequestIdFrom = None
    max_failed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Stop after more than this many failed requests (exit code 3); overrides limits.max_failed."
        ),
    ] = None
    max_gpu_hours: Annotated[
        float | None,
        typer.Option(metavar="HOURS", help="Stop after this many GPU-hours; on CPUs, engine-hours (exit code 4)."),
    ] = None
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop at 06:00 (UTC), at an ISO time, or after 5h (exit code 4).")
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Process at most this many requests (exit code 4 if some are left).")
    ] = None
    sample: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Process 1% (or 0.01) of the requests, always the same ones (exit code 4)."),
    ] = None
    priority: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of numbers: process the highest first.")
    ] = None
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="PRICE", min=0, help="Price per GPU-hour; adds the cost to the summary.")
    ] = None
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait while another run works on the output, instead of exit code 75.")
    ] = False
    wait_for: Annotated[
        str | None, typer.Option(metavar="TIME", help="Wait at most this long, such as 2h; then exit code 75.")
    ] = None
    as_json: AsJson = False

    def load(self, further: dict[str, Any]) -> RunConfig:
        """Return the config with the flags' overrides; templates are not filled in.

        Args:
            further: Further overrides of the command, by dotted key.
        """
        budget = ("max_gpu_hours", "deadline", "limit", "sample", "priority", "price_per_hour")
        wait_s = float("inf") if self.wait else None
        if self.wait_for is not None:
            wait_s = seconds_of(self.wait_for, "--wait-for")
        flag_overrides = {
            "run_id": self.run_id,
            "run_date": self.run_date,
            "limits.max_failed": self.max_failed,
            "limits.lease_wait_s": wait_s,
            **{f"budget.{name}": getattr(self, name) for name in budget},
            **params_of(self.param),
            **columns_of(self.column),
            "request_id_from": self.request_id_from,
        }
        return load(self.config, overrides(self.manifest, self.output, self.override) | given(flag_overrides) | further)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command for typer, with one parameter for each flag in place of its first parameter, a RunFlags."""
    names = [field.name for field in dataclasses.fields(RunFlags)]
    hints = get_type_hints(RunFlags, include_extras=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(RunFlags, name), annotation=hints[name])
        for name in names
    ]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    ]

    @functools.wraps(command)
    def flattened(**given_flags: Any) -> None:
        flags = RunFlags(**{name: given_flags.pop(name) for name in names if name in given_flags})
        command(flags, **given_flags)

    del flattened.__wrapped__  # typer would read the annotations of `command`
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in [*shared, *own]}
    flattened.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]  # typer reads it
    return flattened
