"""Files of a deployment: their texts, and our names in them."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import typer.main
import yaml

from pia_batch import cli
from pia_batch.config import RunConfig

ROOT = Path(__file__).parents[2]

CLUSTERS = (ROOT / "cluster.yaml", ROOT / "jobs/cluster-gcp.yaml")
CONFIGS = sorted((ROOT / "jobs/configs").glob("*.yaml"))
_FOLDERS = ("kubernetes", "airflow", "cron", "systemd", "github-actions", "configs")
FILES = sorted(
    [*CLUSTERS, ROOT / "Dockerfile", *(ROOT / "jobs").glob("*.py")]
    + [path for folder in _FOLDERS for path in (ROOT / "jobs" / folder).iterdir() if path.is_file()]
)
"""All files that a person copies, edits or submits."""


def documents(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file."""
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Yield command and options of every `pia-batch` that a text calls; continued lines are one."""
    joined = re.sub(r"\\\s*\n\s*#?\s*|\n\s+(?=--)", " ", text)
    calls = re.findall(r"(?m)(?:^|[\s/`])(?<!-n )(?<!namespace )pia-batch ([a-z]+)\b([^\n`;|]*)", joined)
    return [(name, re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)) for name, rest in calls]


@functools.cache
def options() -> dict[str, set[str]]:
    """Return the options of each command. Options that `submit` does not have are those of `run`."""
    group: Any = typer.main.get_command(cli.app)
    known = {name: {one for each in command.params for one in each.opts} for name, command in group.commands.items()}
    known["submit"] |= known["run"]
    return known


@functools.cache
def keys(section: type[Any] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Return every key of a config by its dotted name, with its field; sections are not keys."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def pins(path: Path) -> dict[str, str]:
    """Return the version that a file of requirements pins, by package name in its normal form."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}
