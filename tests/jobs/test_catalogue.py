"""jobs/ reads as a catalogue: programs that say how they are run, and configs that show every key once."""

from __future__ import annotations

import json
import re
import runpy
import sys
from typing import Any

import pytest
from deployments import CONFIGS, ROOT, keys

from pia_batch.config import yaml_text


def test_the_configs_show_every_key_once_with_its_meaning_and_its_default() -> None:
    known = keys()
    explained: list[str] = []
    for path in CONFIGS:
        lines = path.read_text(encoding="utf-8").splitlines()
        shown = flattened(yaml_text.parse("\n".join(re.sub(r"^( *)#(?=\S)", r"\1", line) for line in lines)))
        active = flattened(yaml_text.parse("\n".join(lines)))
        assert shown.keys() <= known.keys()
        for key in shown.keys() - active.keys():
            default = known[key].get_default(call_default_factory=True)
            assert shown[key] == json.loads(json.dumps(default)), f"{path.name}: {key}"
        explained += meanings(lines)
    missing = known.keys() - set(explained)
    assert not missing, f"no config explains {sorted(missing)}"
    assert sorted(explained) == sorted(set(explained)), "a key is explained twice"


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
