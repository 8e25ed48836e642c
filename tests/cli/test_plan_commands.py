"""`plan`, `doctor`, messages of errors and bugs, and completion, as an operator and a scheduler see them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from inputs import requests_table

from pia_batch import cli
from pia_batch.cli import plan_commands

WriteManifest = Callable[..., str]
REAL = ("--set", "defaults.width=512", "--set", "defaults.height=512")


def pia_batch(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


def test_a_plan_has_the_same_facts_for_programs_and_people(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = requests_table(7, motion_scale=[0, 9, 1, 10, 11, 12, 0], seed=[7] * 7, fps=[30.0] * 7, format=["gif"] * 7)
    where = ("--manifest", write_manifest(table), "--output", str(tmp_path / "out"))

    assert pia_batch("plan", *where, "--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert pia_batch("plan", *where) == 0
    printed = capsys.readouterr().out

    assert (payload["manifest"]["rows"], payload["pending"], payload["rejected"], payload["finished"]) == (7, 3, 4, 0)
    assert payload["rejections"]["out_of_range"]["count"] == 4
    assert len(payload["rejections"]["out_of_range"]["first"]) == 3
    (group,) = payload["groups"]
    assert (group["num_rows"], group["batches"], group["width"]) == (3, 2, 64)
    assert len(payload["warnings"]) == 2
    for words in (
        "pending     3",
        "3 rows: default, 8 frames, 64 x 64; 2 batches",
        "out_of_range  4",
        "have the seed 7",
    ):
        assert words in printed
    assert printed.count("is not allowed") == 3
    assert not (tmp_path / "out").exists()


def test_a_plan_warns_of_a_folder_in_which_no_ray_can_start(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    where = ("--manifest", write_manifest(requests_table(2)), "--output", str(tmp_path / "out"), "--json")
    for folder, at in (("/tmp", "local"), (f"/{'x' * 80}", "head:6379"), (f"/{'x' * 80}", "local")):  # noqa: S108
        monkeypatch.setenv("TMPDIR", folder)
        assert pia_batch("plan", *where, "--set", f"placement.ray_address={at}") == 0
        warnings = json.loads(capsys.readouterr().out)["warnings"]

        assert len(warnings) == (len(folder) > 80 and at == "local")
    assert warnings[0].startswith("a run on this machine would not start: TMPDIR: too long for the sockets of a Ray")


def test_a_plan_takes_columns_of_other_names_and_says_which_is_mistyped(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = requests_table(3).rename_columns(["key", "image", "caption"])
    where = ("--manifest", write_manifest(table), "--output", str(tmp_path / "out"), "--column", "request_id=key")

    assert pia_batch("plan", *where, "--column", "prompt=caption", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pending"] == 3
    assert pia_batch("plan", *where, "--column", "prompt=captoin") == 2
    assert "columns.prompt: manifest" in (message := " ".join(capsys.readouterr().err.split()))
    assert "did you mean 'caption'?" in message


def test_a_plan_of_a_real_model_estimates_hours_cost_and_bytes(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The weights of the embedded model, by their path: to the estimate that is a model as every other.
    from pia_batch import tiny  # noqa: PLC0415

    where = ("--manifest", write_manifest(requests_table(100)), "--output", str(tmp_path / "out"))
    model = ("--set", f"model.base={tiny.PATH}", "--set", "placement.max_engines=4")

    assert pia_batch("plan", *where, *model, *REAL, "--price-per-hour", "2", "--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert pia_batch("plan", *where, *model, *REAL, "--set", "budget.price_per_hour=2") == 0
    printed = capsys.readouterr().out

    h100 = next(each for each in payload["devices"] if each["device"] == "H100")
    assert 0.07 < h100["hours"][0] < h100["hours"][1] < 0.11
    assert h100["cost"] == pytest.approx([2 * hours for hours in h100["hours"]])
    assert h100["hours_of_run"] == pytest.approx([hours / 4 for hours in h100["hours"]])
    assert h100["source"].startswith("estimate: ")
    assert "time        H100       0.082 to 0.099 device hours  cost 0.16 to 0.20  (estimate: " in printed
    assert payload["bytes"][0] == 100 * 16 * 512 * 512 * 3 // 100
    assert "output      12.6 MB to 33.6 MB" in printed
    assert payload["warnings"] == []


@pytest.mark.parametrize(
    ("hours", "shown"),
    [
        ([0.0, 0.0], "0.000"),
        ([2e-5, 3e-5], "under 0.001"),
        ([2e-5, 0.0042], "under 0.001 to 0.004"),
        ([82.3, 99.1], "82 to 99"),
    ],
)
def test_hours_that_are_few_are_not_shown_as_none(
    hours: list[float], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_commands._print_devices([{"device": "cpu", "hours": hours, "cost": None, "source": "measured"}])

    assert f"{shown} device hours  (measured)" in capsys.readouterr().out


def test_a_plan_says_what_finishing_costs(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--manifest", write_manifest(requests_table(100)), "--output", str(tmp_path / "out"))

    assert pia_batch("plan", *where, *REAL, "--json") == 0
    assert json.loads(capsys.readouterr().out)["finishing_core_hours"] == 0
    assert pia_batch("plan", *where, *REAL, "--set", "defaults.interpolate=4") == 0

    assert "finishing   0.04 hours of a core, while the devices generate (estimate)" in capsys.readouterr().out


def test_the_budget_says_how_many_are_selected(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--manifest", write_manifest(requests_table(6)), "--output", str(tmp_path / "out"))

    assert pia_batch("plan", *where, "--set", "budget.limit=2", "--json") == 0

    payload = json.loads(capsys.readouterr().out)
    assert (payload["pending"], payload["selected"]) == (6, 2)


def test_plan_and_inspect_import_neither_torch_nor_ray(write_manifest: WriteManifest, tmp_path: Path) -> None:
    script = """
import sys
from pia_batch import cli
for arguments in (sys.argv[1:], ["inspect", "/nowhere"]):
    try:
        cli.main(arguments)
    except SystemExit:
        pass
print(sorted({"torch", "ray", "diffusers", "transformers", "tokenizers"} & set(sys.modules)))
"""
    arguments = ["plan", "--manifest", write_manifest(), "--output", str(tmp_path / "out"), "--set", "defaults.fps=9"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.long
def test_a_doctor_that_finds_a_failure_ends_with_2_and_the_remedy(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--manifest", write_manifest(), "--output", str(tmp_path / "out"))

    assert pia_batch("doctor", *where, "--set", "model.base=/nowhere/model", "--json") == 2
    payload = json.loads(capsys.readouterr().out)

    assert payload["fail"] >= 1
    (weights,) = [finding for finding in payload["findings"] if finding["subject"] == "weights"]
    assert (weights["state"], weights["remedy"]) == (
        "fail",
        "correct the config, or fetch the weights once on this machine",
    )
    assert "/nowhere/model" in weights["message"]


@pytest.mark.long
def test_a_doctor_of_this_machine_alone_needs_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    code = pia_batch("doctor")

    printed = capsys.readouterr().out
    assert "OK   codecs    mp4, gif, webp, png_zip, webm: encoded and decoded\n" in printed
    assert code == (0 if " 0 failures" in printed else 2)


@pytest.mark.parametrize("how", [["--debug"], "PIA_BATCH_DEBUG"])
def test_an_error_has_a_traceback_only_on_demand(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: list[str] | str,
) -> None:
    assert pia_batch("plan", "nowhere.yaml") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert caplog.text == ""

    if isinstance(how, str):
        monkeypatch.setenv(how, "1")
    assert pia_batch(*(how if isinstance(how, list) else []), "plan", "nowhere.yaml") == 2

    assert "cannot read config nowhere.yaml" in capsys.readouterr().err
    assert "Traceback (most recent call last)" in caplog.text


def bug() -> Exception:
    try:
        raise KeyError("animations\nand more")  # noqa: TRY301 - for its traceback
    except KeyError as err:
        return err


def test_a_bug_is_one_line_on_a_terminal_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    logging.getLogger("pia_batch").setLevel(logging.INFO)

    first, second = cli.bug_report(bug(), on_terminal=True).splitlines()

    (kept,) = tmp_path.iterdir()
    assert first == "pia-batch: a bug: KeyError: 'animations\\nand more'"
    assert str(kept) in second
    assert "--debug" in second
    assert 'raise KeyError("animations' in kept.read_text()


def test_a_bug_is_logged_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise bug()

    monkeypatch.setattr("pia_batch.config.RunConfig.load", broken)

    assert pia_batch("plan") == 1

    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.splitlines()[-1] == "pia-batch: a bug: KeyError: 'animations\\nand more'"


@pytest.mark.parametrize("command", ["plann", "inspekt", "verfy"])
def test_a_mistyped_command_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert pia_batch(command) == 2
    assert "Did you mean" in capsys.readouterr().err


def complete(words: str) -> list[str]:
    """Return the completions that the shell offers after `words`."""
    asked = {"_PIA_BATCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    program = Path(sys.executable).with_name("pia-batch")
    done = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_shell_completes_commands_and_options() -> None:
    assert complete("pia-batch in") == ["inspect"]
    assert "--manifest-row" in complete("pia-batch inspect --")


def test_the_script_for_the_shell_can_be_shown() -> None:
    program = Path(sys.executable).with_name("pia-batch")
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the tests' own parent is no shell
    command = [program, "--show-completion", "bash"]
    done = subprocess.run(command, env=os.environ | named, capture_output=True, text=True, check=True)

    assert "complete -o default -F _pia_batch_completion pia-batch" in done.stdout


def test_a_plan_warns_of_an_output_that_cannot_be_written(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    where = ("--manifest", write_manifest(requests_table(2)), "--output", str(tmp_path / "file" / "out"), "--json")

    assert pia_batch("plan", *where) == 0

    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("a run on this machine would not start: cannot write to file://")
    assert warning.endswith("file/out: Not a directory; a file has the name of a folder there; remove it or choose another path")  # fmt: skip  # noqa: E501
