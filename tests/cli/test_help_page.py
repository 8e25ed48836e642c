"""Help shows no type for what takes no value."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from pia_batch import cli

COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]  # a group of commands


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_flags_have_no_type_and_other_options_have_theirs(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [*command.split(), "--help"], env={"COLUMNS": "80"}, terminal_width=80).output

    assert "--help" in shown
    assert "<bool>" not in shown
    assert ("<" in shown) == (command != "")
