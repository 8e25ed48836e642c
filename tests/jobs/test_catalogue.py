"""jobs/ reads as a catalogue: programs that say how they are run, short configs, and one with every key."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from deployments import CONFIGS, ROOT, keys

from pia_batch.config import RunConfig, yaml_text

REFERENCE = ROOT / "jobs/configs/reference.yaml"


def test_the_reference_config_has_every_key_below_its_meaning_and_with_its_default() -> None:
    known = keys()
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()
    shown = flattened(yaml_text.parse("\n".join(re.sub(r"^( *)#(?=\S)", r"\1", line) for line in lines)))
    assert shown.keys() == known.keys() == set(meanings(lines))
    for key in shown.keys() - {"manifest", "output"}:
        default = known[key].get_default(call_default_factory=True)
        assert shown[key] == json.loads(json.dumps(default)), key


def test_the_reference_config_is_what_the_code_says_now() -> None:
    generated = runpy.run_path(str(ROOT / "docs/reference.py"))["reference_config"]()
    assert REFERENCE.read_text(encoding="utf-8") == generated, "run `make tables`"


def test_the_reference_config_changes_nothing_whether_its_keys_are_comments_or_not(tmp_path: Path) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    (tmp_path / "all.yaml").write_text(re.sub(r"^( *)#(?=\S)", r"\1", text, flags=re.MULTILINE))
    model = {"model.base": "weights/base"}  # the model of the package has defaults of its own
    required = {"manifest": "s3://bucket/requests/", "output": "s3://bucket/animations"}
    plain = RunConfig.load(None, model | required)
    assert RunConfig.load(REFERENCE, model) == RunConfig.load(tmp_path / "all.yaml", model) == plain


@pytest.mark.parametrize("path", [path for path in CONFIGS if path != REFERENCE], ids=lambda path: path.name)
def test_an_example_of_a_config_fits_into_a_glance(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 15


def meanings(lines: list[str]) -> list[str]:
    """The dotted keys of those lines that stand below a comment, which has their description word for word."""
    found, parents, comment = [], [], ""
    for line in lines:
        if match := re.match(r" *# (.*)", line):
            comment += f" {match[1]}"
            continue
        if match := re.match(r"( *)#?(\w+):", line):
            depth = len(match[1]) // 2
            parents[depth:] = [match[2]]
            key = ".".join(parents)
            if comment and key in keys():
                assert comment.strip() == keys()[key].description, key
                found.append(key)
        comment = ""
    return found


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a config by dotted key; sections without any are left out."""
    known = keys()
    flat: dict[str, Any] = {}
    for name, value in (tree or {}).items():
        key = prefix + name
        if key in known or not isinstance(value, dict | None):
            flat[key] = value
        else:
            flat |= flattened(value, f"{key}.")
    return flat


def test_every_program_of_the_catalogue_says_how_it_is_run() -> None:
    programs = {
        path.relative_to(ROOT / "jobs").as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "jobs").rglob("*.py"))
    }
    programs = {name: text for name, text in programs.items() if "__main__" in text}
    wanted = {"animate", "scheduled", "backfill", "verify", "benchmark", "tiny/train", "tiny/evaluate", "photographs"}
    assert {f"{name}.py" for name in wanted} <= programs.keys()
    for name, text in programs.items():
        assert f"python jobs/{name}" in text.split('"""')[1], name


def test_the_catalogue_names_every_program_config_and_folder_once() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", (ROOT / "jobs/README.md").read_text(encoding="utf-8"))
    folders = [ROOT / "jobs" / name for name in (".", "configs", "tiny")]
    below = [path for folder in folders for path in folder.iterdir()]
    wanted = {path for path in below if path.suffix in {".py", ".yaml"} or path.is_dir()}
    wanted -= {path for path in below if path.name in {"__pycache__", "configs", "tiny"}}
    found = [ROOT / "jobs" / link for link in linked]
    assert all(path.exists() for path in found)
    assert wanted - {path.resolve() for path in found} == set(), "jobs/README.md lacks these"
    assert len(set(found)) == len(found)


USAGE = "usage: python jobs/backfill.py FROM..TO [options of pia-batch run]"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["jobs/backfill.py"], USAGE, USAGE),
        (["jobs/backfill.py", "2026-11-22..2026-11-20"], 2, "2026-11-22..2026-11-20"),
        (["jobs/scheduled.py", "--run-date", "tomorrow"], 2, "tomorrow"),
        (["jobs/verify.py", "/nowhere/at/all"], 2, "no run has ever written to"),
    ],
)
def test_the_programs_of_the_catalogue_pass_on_what_they_are_told(
    arguments: list[str],
    code: int | str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "path", list(sys.path))

    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")

    assert left.value.code == code
    assert said in f"{code} {capsys.readouterr().err}".replace("\n", " ")
