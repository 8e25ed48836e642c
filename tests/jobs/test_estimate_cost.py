"""Estimates without a manifest: the page shows what the program prints, and what is wrong is refused."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "jobs"))

import estimate_cost  # noqa: E402

PAGE = (ROOT / "docs/sizing.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```bash\npython (jobs/estimate_cost\.py [^\n]+)\n```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


def printed(arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", shlex.split(arguments))
    estimate_cost.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=["prices", "balanced"])
def test_the_page_shows_what_the_program_prints(
    command: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert output in printed(command, monkeypatch, capsys)


def test_hours_grow_with_the_rows_and_the_cost_with_the_price(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed("x --rows 1000000 --price H100=1", monkeypatch, capsys).splitlines()
    line = next(line for line in lines if line.startswith("H100"))

    (clip_low, clip_high), hours, cost = (re.findall(r"[\d,.]+", part) for part in re.split(r"\s{2,}", line)[1:])
    assert hours == cost
    low, high = (float(number.replace(",", "")) * 3600 / 1e6 for number in hours)
    assert (low, high) == pytest.approx((float(clip_low), float(clip_high)), abs=0.06)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rows 0", "--rows: too few (got 0, expected 1 or more)"),
        ("--rows 1 --price V100=1", "no figures of this device (got 'V100', expected one of A100, H100"),
        ("--rows 1 --price H100=nan", "not a price (got 'nan', expected such as H100=2.49)"),
        ("--rows 1 --price H100", "not a price (got ''"),
        ("--rows 1 --set model.sped=fast", "did you mean 'model.speed'"),
        ("--rows 1 --set defaults.num_frames=2000", "must be less than or equal to 1024"),
        ("--rows 1 --set defaults.free_init_iters=2 --set defaults.strength=0.5", "free_init_iters"),
    ],
)
def test_what_cannot_be_estimated_is_refused(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        printed(f"x {arguments}", monkeypatch, capsys)

    assert message in capsys.readouterr().err
