"""The consoles of the commands, as a program that reads their pipes gets them, and as a terminal does."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

LINE = "word " * 40 + "end"
PRINTS = f"""
from rich.table import Table
from pia_batch.cli.console import out, err
out.print({LINE!r})
err.print({LINE!r})
table = Table(box=None)
for _ in range(6):
    table.add_column("a column of 18 xx", no_wrap=True)
out.print(table)
"""


@pytest.mark.parametrize("columns", ["20", None])
def test_no_line_is_broken_in_a_pipe(columns: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}

    done = subprocess.run(
        [sys.executable, "-c", PRINTS],
        env=environment if columns is None else environment | {"COLUMNS": columns},
        capture_output=True,
        text=True,
        check=True,
    )

    first, *table = done.stdout.splitlines()
    assert (first, done.stderr.strip()) == (LINE, LINE)
    assert [line.count("a column of 18 xx") for line in table] == [6]


def test_lines_are_broken_between_words_on_a_terminal() -> None:
    main, end = pty.openpty()
    try:
        environment = os.environ | {"COLUMNS": "40", "TERM": "xterm"}
        printing = f"from pia_batch.cli.console import out\nout.print({LINE!r})"
        subprocess.run([sys.executable, "-c", printing], env=environment, stdout=end, check=True)
        printed = os.read(main, 4096).decode()
    finally:
        os.close(end)
        os.close(main)

    lines = printed.splitlines()
    assert len(lines) > 4
    assert all(len(line) <= 40 for line in lines)
    assert " ".join(line.strip() for line in lines) == LINE
