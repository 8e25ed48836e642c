"""Files for those who change the code: what runs before a commit is what `make lint` runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pia_batch import cli

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / ".pre-commit-config.yaml"


def test_the_hooks_before_a_commit_run_what_lint_runs() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (local,) = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))["repos"]
    assert local["repo"] == "local"
    assert [hook["entry"] for hook in local["hooks"]] == commands


def test_pre_commit_accepts_its_configuration() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", HOOKS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- CONTRIBUTING.md and the templates of GitHub ---------------------------------------------------------------------

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAMES = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|json|yaml|toml|txt)|[\w.-]+(?:/[\w.-]+)*/)`")
"""Paths between backquotes: files by their suffix, folders by a slash at their end."""
BELOW = {"media/codecs/": "pia_batch/"}
"""Folders that the import contracts name without the package."""
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def test_every_path_that_the_lists_of_files_name_exists() -> None:
    named = [BELOW.get(path, "") + path for path in NAMES.findall(PAGE)]

    assert len(set(named)) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pia_batch/schema/settings.py", "Format"),
        ("pia_batch/schema/settings.py", "MAX_FPS"),
        ("pia_batch/media/codecs/table.py", "CODECS"),
        ("pia_batch/media/codecs/codec.py", "Codec"),
        ("pia_batch/storage/object_store.py", "MEDIA_TYPES"),
        ("pia_batch/schema/dataset_columns.py", "MEDIA"),
        ("pia_batch/schema/identity.py", "Decides"),
        ("pia_batch/datasets/export.py", "TRANSCODED"),
        ("pia_batch/storage/schemes.py", "Scheme"),
        ("pia_batch/storage/schemes.py", "SCHEMES"),
        ("pia_batch/storage/schemes.py", "EXTRAS"),
        ("pia_batch/config/models.py", "SchedulerName"),
        ("pia_batch/weights/scheduler_values.py", "CLASSES"),
        ("pia_batch/weights/scheduler_values.py", "_RULES"),
        ("pia_batch/planning/cost.py", "_EVALUATIONS"),
        ("tests/support/schedulers.py", "SCHEDULERS"),
        ("tests/storage/test_schemes.py", "URIS"),
        ("tests/storage/test_schemes.py", "READABLE"),
    ],
)
def test_a_name_that_the_lists_mention_is_defined_where_they_say(path: str, name: str) -> None:
    assert f"`{name}`" in PAGE or f"`{name}(" in PAGE
    assert re.search(rf"^(class )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_each_step_of_a_list_names_a_file_or_what_writes_it() -> None:
    steps = re.findall(r"^\d+\. (.+)$", PAGE, re.MULTILINE)

    assert len(steps) > 20
    assert [step for step in steps if "`" not in step] == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_the_forms_for_issues_follow_their_schema(path: Path) -> None:
    schema = "vendor.github-issue-config" if path.stem == "config" else "vendor.github-issue-forms"
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", schema, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(FORMS) > 1


def test_a_form_asks_only_for_files_and_commands_that_exist() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (*FORMS, ROOT / ".github/PULL_REQUEST_TEMPLATE.md"))
    commands = {callback.callback.__name__ for callback in cli.app.registered_commands if callback.callback}
    assert set(re.findall(r"pia-batch ([a-z]+)", text)) <= commands
    for name in re.findall(r"(?<![/\w])[A-Z]+\.md", text):
        assert (ROOT / name).is_file(), name


def test_the_container_for_editors_has_the_python_of_the_image_and_is_set_up_by_make() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    image = re.search(r"^FROM (python:[\d.]+)-slim-(\w+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert image
    assert container["image"] == f"{image[1]}-{image[2]}"  # not slim: with make and git
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    command, *wanted = container["postCreateCommand"].split()
    assert command == "make"
    assert set(wanted) <= set(targets)
