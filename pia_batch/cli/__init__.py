"""Command line: parses arguments, calls the package, prints, and exits with a code. Commands import lazily."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

import typer

from pia_batch import __version__, errors
from pia_batch.cli import (
    bench_command,
    evaluation_commands,
    export_command,
    inspect_command,
    job_commands,
    output_commands,
    plan_commands,
    prepare_command,
    run_commands,
)
from pia_batch.cli.console import err, out, print_any_text
from pia_batch.cli.help_page import Command, Group
from pia_batch.driver import own_ray

log = logging.getLogger("pia_batch")

EXIT_CODES = {
    0: "every request succeeded, or nothing was left to do",
    1: "a bug, or results that do not match the manifest; the traceback or the message has the details",
    2: "wrong usage, config, manifest or store, and nothing was started; or a device that computes wrong pixels",
    3: "finished with failed requests, or stopped by more of them than `limits.max_failed`; `verify`: found a problem, "
    "repaired or not",
    4: "interrupted, or a limit of the budget was reached; everything finished is committed. Start again to continue",
    75: "another run works on this output, or a job for it is pending or running",
}
"""Meaning of each exit code, for schedulers."""

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    *(
        run_commands.demo,
        prepare_command.prepare,
        plan_commands.plan,
        plan_commands.doctor,
        run_commands.run,
        run_commands.retry,
    ),
    *(
        output_commands.status,
        output_commands.verify,
        output_commands.gc,
        output_commands.report,
        inspect_command.inspect,
        export_command.export,
    ),
    evaluation_commands.evaluate,
    evaluation_commands.select,
    evaluation_commands.compare,
    *(job_commands.submit, job_commands.jobs, bench_command.bench),
):
    app.command(cls=Command)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"pia-batch {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Tab completes commands and options after `pia-batch --install-completion`. Exit codes: 0 success, 1 a bug, "
    "2 wrong usage, config, manifest or store, 3 requests failed, 4 interrupted, 75 another run works on the output."
)
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="PIA_BATCH_DEBUG", help="Log more, and the traceback of every error.")
    ] = False,
    version: Annotated[  # noqa: ARG001 - its callback has ended the program
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Animate datasets of images and prompts with PIA on Ray Data.

    Example: `pia-batch demo`, then `pia-batch plan my.yaml`, `pia-batch doctor my.yaml` and `pia-batch run my.yaml`
    """
    if debug:
        log.setLevel(logging.DEBUG)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: Arguments of the command line; None: those of the process.
    """
    print_any_text()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    try:
        _ignore_warning_filters()
        _check_interpreter()
        _check_folder()
        own_ray.check_threads()
        _check_hub_timeouts()
        own_ray.check_variables()
        app(arguments, prog_name="pia-batch")
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):
            sys.exit(_code_without_reader(ended.__context__))
        raise
    except errors.PiaBatchError as problem:
        _exit(problem)
    except Exception as problem:  # noqa: BLE001 - nothing is hidden: a bug ends the process with 1
        if (explained := errors.environment_error(problem)) is None:
            _exit_by_bug(problem)
        else:
            _exit(explained)


def _ignore_warning_filters() -> None:
    """Turn no warning into an error: with PYTHONWARNINGS=error, one of a library's would end the command."""
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.resetwarnings()
        warnings.simplefilter("ignore")


def _check_interpreter(level: int = sys.flags.optimize) -> None:
    """Refuse a Python that removes docstrings, from which Ray makes its own at import.

    Raises:
        ConfigError: It does.
    """
    if level > 1:
        raise errors.ConfigError("PYTHONOPTIMIZE or -OO: Ray does not work without docstrings; use level 1 at most")


def _check_folder() -> None:
    """Refuse a working folder that was removed, which paths, Ray and child processes start from.

    Raises:
        ConfigError: It was.
    """
    try:
        os.getcwd()  # noqa: PTH109 - quicker than importing pathlib
    except FileNotFoundError:
        raise errors.ConfigError(
            "the working folder was removed: change to a folder that exists, and start again"
        ) from None


def _check_hub_timeouts(environment: Mapping[str, str] = os.environ) -> None:
    """Check the variables that huggingface_hub reads as numbers at import: in the engines' processes, again and again.

    Raises:
        ConfigError: One is no whole number.
    """
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        try:
            int(environment.get(name, "0"))
        except ValueError:
            msg = f"{name} must be a whole number of seconds (got {environment[name]!r}); correct or unset it"
            raise errors.ConfigError(msg) from None


def _code_without_reader(broken: BrokenPipeError) -> int:
    """Return the exit code of help, or of a wrong usage, whose reader has left; click and rich end with 1."""
    usage: Any = broken.__context__  # click's exceptions, which have no common type in typer
    return getattr(usage, "exit_code", 0)


def _exit(problem: errors.PiaBatchError) -> NoReturn:
    log.debug("traceback", exc_info=problem)
    line = " ".join(str(problem).split("\n"))  # some libraries' messages have several lines
    err.print(f"pia-batch: {line}", style="bold red", markup=False, soft_wrap=True)
    sys.exit(problem.exit_code)


def _exit_by_bug(bug: Exception) -> NoReturn:
    err.print(bug_report(bug, on_terminal=err.is_terminal), style="bold red", markup=False, soft_wrap=True)
    sys.exit(1)


def bug_report(bug: Exception, *, on_terminal: bool) -> str:
    """Return the message for an unexpected exception.

    Args:
        bug: Exception as it was caught.
        on_terminal: True for one line and the traceback in a file; False for the whole traceback, as for a log.
    """
    trace = "".join(traceback.format_exception(bug))
    line = f"pia-batch: a bug: {type(bug).__name__}: {errors.message_of(bug)}"
    if not on_terminal or log.isEnabledFor(logging.DEBUG):
        return f"{trace}{line}"
    with tempfile.NamedTemporaryFile("w", prefix="pia-batch-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(trace)
    return f"{line}\nThe traceback is in {file.name}, and `pia-batch --debug` prints it; please report both"
