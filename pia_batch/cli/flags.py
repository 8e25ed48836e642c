"""What the commands that draw take alike, one definition for all of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from pia_batch.cli.options import (
    AsJson,
    ConfigPath,
    ManifestUri,
    OutputUri,
    Overrides,
    Params,
    RunDateText,
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
    """The flags of `run` and `retry`; the names are those of the command line."""

    config: ConfigPath = None
    manifest: ManifestUri = None
    output: OutputUri = None
    override: Overrides = None
    run_id: Annotated[
        str | None, typer.Option(help="names the results; may have {date}; made from date or time by default")
    ] = None
    run_date: RunDateText = None
    backfill: Annotated[
        str | None,
        typer.Option(metavar="FROM..TO", help="a run for each date (or hour), both ends included, in order"),
    ] = None
    param: Params = None
    max_failed: Annotated[
        int | None,
        typer.Option(min=0, help="over limits.max_failed: one failed request more stops the run with exit code 3"),
    ] = None
    max_gpu_hours: Annotated[
        float | None, typer.Option(help="stop with 4 after so many hours of engines, times their GPUs")
    ] = None
    deadline: Annotated[str | None, typer.Option(help="stop with 4 at 06:00 (UTC), at an ISO time, or after 5h")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="draw at most so many requests")] = None
    sample: Annotated[str | None, typer.Option(help="draw 1% (or 0.01) of the requests, always the same ones")] = None
    priority: Annotated[str | None, typer.Option(help="a column of numbers: the highest are drawn first")] = None
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="of one GPU: the summary tells a cost")] = None
    wait: Annotated[bool, typer.Option("--wait", help="queue while another run works on the output")] = False
    wait_for: Annotated[str | None, typer.Option(help="queue so long at most, such as 2h; then exit code 75")] = None
    as_json: AsJson = False

    def load(self, further: dict[str, Any]) -> RunConfig:
        """The config with what was given laid over it; its templates are not filled in.

        Args:
            further: what the command itself lays over the config, by dotted key.
        """
        budget = ("max_gpu_hours", "deadline", "limit", "sample", "priority", "price_per_hour")
        wait_s = float("inf") if self.wait else None
        if self.wait_for is not None:
            wait_s = seconds_of(self.wait_for, "--wait-for")
        laid_over = {
            "run_id": self.run_id,
            "run_date": self.run_date,
            "limits.max_failed": self.max_failed,
            "limits.lease_wait_s": wait_s,
            **{f"budget.{name}": getattr(self, name) for name in budget},
            **params_of(self.param),
        }
        return load(self.config, overrides(self.manifest, self.output, self.override) | given(laid_over) | further)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose first parameter is a RunFlags, as typer wants it: with a parameter for each flag."""
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
    def taken(**given_flags: Any) -> None:
        flags = RunFlags(**{name: given_flags.pop(name) for name in names if name in given_flags})
        command(flags, **given_flags)

    del taken.__wrapped__  # typer would look at the annotations of `command`
    taken.__annotations__ = {parameter.name: parameter.annotation for parameter in [*shared, *own]}
    taken.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]  # what typer reads
    return taken
