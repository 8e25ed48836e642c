"""The command line: parse, call, print, exit code. Heavy imports wait until a command needs them.

Exit codes, for schedulers: 0 every request succeeded, or nothing to do · 1 a bug · 2 usage, config, manifest or store ·
3 finished, with more failed requests than `limits.max_failed`, or `verify` found a problem · 4 interrupted, start again
to resume · 75 another run holds the lease.
"""

from __future__ import annotations

import logging
import sys

import typer

from pia_batch import errors
from pia_batch.cli import outputs, preparing, running
from pia_batch.cli.console import err

EXIT_CODES: dict[type[errors.PiaBatchError], int] = {
    errors.ConfigError: 2,
    errors.ManifestError: 2,
    errors.StorageError: 2,
    errors.BrokenDeviceError: 2,
    errors.InterruptedRunError: 4,
    errors.LeaseHeldError: 75,
}

app = typer.Typer(
    help="Animate datasets of images and prompts with PIA on Ray Data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    *(running.demo, preparing.plan, running.run, running.retry),
    *(outputs.status, outputs.verify, outputs.gc, outputs.report),
):
    app.command()(command)


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
