"""Help names the values of options, shows no type for what takes none, and cuts nothing off."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from pia_batch import cli

COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]  # a group of commands


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_names_values_in_capitals_and_fits_into_eighty_columns(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [*command.split(), "--help"], env={"COLUMNS": "80"}, terminal_width=80).output

    assert "--help" in shown
    assert not re.search("<[a-z]", shown)  # a type of Python
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.replace("clip_t, \N{HORIZONTAL ELLIPSIS}", "")  # a word cut off
    assert max(map(len, shown.splitlines())) <= 80


def test_options_and_arguments_have_names_for_their_values() -> None:
    run, report = (
        CliRunner().invoke(cli.app, [name, "--help"], terminal_width=80).output for name in ("run", "report")
    )

    for option in ("--set KEY=VALUE", "--limit N", "--max-gpu-hours HOURS", "--wait Wait"):
        assert option in " ".join(run.split())
    assert "{OUTPUT}" in report
    assert "--out PATH" in " ".join(report.split())
