"""Standard error arrives while Ray starts, but for one line, also where Ray ends the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pia_batch.driver.ray_output import without_level_line

LEVEL = b"[2026-11-29 06:57:29,658 I 24186 24186] logging.cc:303: Set ray log level from environment variable "
LEVEL += b"RAY_BACKEND_LOG_LEVEL to 3\n"


def test_one_line_is_hidden_and_all_others_arrive_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    with without_level_line():
        os.write(2, b"before \xff\n" + LEVEL)
        os.write(2, b"after\n")
    os.write(2, LEVEL)

    assert capfd.readouterr().err.splitlines()[:2] == ["before \ufffd", "after"]


def test_what_is_written_before_an_error_arrives(capfd: pytest.CaptureFixture[str]) -> None:
    def start() -> None:
        with without_level_line():
            os.write(2, LEVEL + b"the raylet ended\n")
            raise RuntimeError("Ray")

    with pytest.raises(RuntimeError, match="Ray"):
        start()

    assert capfd.readouterr().err == "the raylet ended\n"


def test_the_last_words_of_a_process_that_ray_ends_arrive() -> None:
    program = (
        "import os\nfrom pia_batch.driver.ray_output import without_level_line\n"
        f"with without_level_line():\n    os.write(2, {LEVEL + b'Check failed'!r})\n    os.abort()"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert done.stderr.splitlines() == ["Check failed"]


@pytest.mark.parametrize("state", ["without grep", "without standard error"])
def test_nothing_is_hidden_where_no_filter_can_start(state: str) -> None:
    program = "import os\nfrom pia_batch.driver.ray_output import without_level_line\n"
    program += "os.close(2)\n" if state == "without standard error" else "os.environ['PATH'] = '/nowhere'\n"
    program += f"with without_level_line():\n    os.write({1 if 'error' in state else 2}, {LEVEL!r})"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "Set ray log level" in done.stdout + done.stderr
