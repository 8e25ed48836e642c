"""Keys that last: a release changes no content key and no engine id, whatever it adds.

`keys.json` has rows for every setting, encoder option and model option, at its neutral value and at others. A row that
was released must never change: users would generate every finished animation again. To add a setting or an option, add
its rows with any key; the test that fails names the key to write.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from golden_keys import computed, recorded
from pydantic import BaseModel

from pia_batch.config import EncodingConfig, FreeUConfig, ImagesConfig, ModelConfig, SchedulerConfig
from pia_batch.schema.identity import ALWAYS, Decides, is_neutral
from pia_batch.schema.settings import BY_NAME

ROWS = recorded()
PACKAGE = Path(__file__).parents[2] / "pia_batch"


def named(row: dict[str, Any]) -> str:
    return f"{row['option']}={row['value']}"


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_recorded_key_never_changes(row: dict[str, Any]) -> None:
    assert computed(row) == row["key"], (
        "the key of something that was released must not change: give what was added a neutral value. Only a new row "
        "may get the key that the code computes"
    )


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_only_the_default_has_the_key_of_a_row_without_the_option(row: dict[str, Any]) -> None:
    changed = {part: dict(row[part]) for part in ("columns", "config") if part in row}
    key = row["option"].rpartition(".")[2]
    assert changed["columns" if key in BY_NAME else "config"].pop(row["option"]) == row["value"]

    assert (computed({"kind": row["kind"]} | changed) == row["key"]) == row.get("default", False)


def declared() -> dict[str, object]:
    """Neutral values of everything that a key has, by column or config key."""
    sections: dict[str, type[BaseModel]] = {
        "encoding": EncodingConfig,
        "images": ImagesConfig,
        "model": ModelConfig,
        "model.scheduler": SchedulerConfig,
        "model.freeu": FreeUConfig,
    }
    options = {
        f"{prefix}.{name}": mark.neutral
        for prefix, section in sections.items()
        for name, field in section.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Decides) and f"{prefix}.{name}" not in sections
    }
    return {name: setting.neutral for name, setting in BY_NAME.items()} | options


def test_every_option_is_recorded_at_its_neutral_value_and_at_another() -> None:
    found: Counter[tuple[str, bool]] = Counter()
    options = declared()
    for row in ROWS:
        found[row["option"], is_neutral(row["value"], options.get(row["option"], ALWAYS))] += 1

    for name, neutral in options.items():
        assert found[name, False], f"add a row of {name} with a value that is not neutral"
        assert found[name, True] or neutral is ALWAYS, f"add a row of {name} with the value {neutral!r}"
        assert found[name, False] > 1 or neutral is not ALWAYS, f"add a row of {name} with another value"


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a package as a later release might be: one more setting, encoder option and model option."""
    folder = tmp_path_factory.mktemp("later")
    added = {
        "schema/settings.py": (
            "class Settings(EngineSettings):\n",
            '    sparkle: int = setting(0, "Stars in every frame.", neutral=0, ge=0, le=9)\n',
        ),
        "config/requests.py": (
            "class EncodingConfig(Section):\n",
            "    mp4_grain: Annotated[int, Decides(neutral=0, formats=('mp4',))] = Field(2, description='Grain.')\n",
        ),
        "config/models.py": (
            "class ModelConfig(Section):\n",
            "    sharpen: Annotated[float, Decides(neutral=0.0)] = Field(0.0, description='Sharpness.')\n",
        ),
    }
    package = folder / "pia_batch"
    for source in PACKAGE.rglob("*"):
        name = str(source.relative_to(PACKAGE))
        if source.suffix in (".py", ".yaml", ".json", ".txt") and name not in added:
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).symlink_to(source)
    for name, (after, line) in added.items():
        text = (PACKAGE / name).read_text(encoding="utf-8")
        head, _, rest = text.partition(after)
        assert rest, f"{name} has no line {after!r}"
        (package / name).write_text(head + after + line + rest, encoding="utf-8")
    return folder


def computed_later(later: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Keys of rows by the program of the later release."""
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, f"{support}/golden_keys.py"],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(later), support])},
    )
    assert done.returncode == 0, done.stderr
    keys: list[str] = json.loads(done.stdout)
    return keys


def test_what_a_later_release_adds_changes_no_key_at_its_neutral_value_and_a_key_at_any_other(later: Path) -> None:
    plain = {"encoding.mp4_grain": 0}  # its default is another value than the neutral one
    request, engine = {"kind": "request", "config": plain}, {"kind": "engine"}
    as_before = [row | {"config": plain | row.get("config", {})} for row in ROWS]
    neutral = [
        request | {"columns": {"sparkle": 0}},
        request | {"config": plain | {"defaults.sparkle": 0}},
        request | {"config": {}, "columns": {"format": "gif"}},  # the option affects MP4 files only
        engine | {"config": {"model.sharpen": 0.0}},
    ]
    others = [
        request | {"columns": {"sparkle": 1}},
        request | {"columns": {"sparkle": 2}},
        request | {"config": {}},
        request | {"config": {"encoding.mp4_grain": 3}},
        engine | {"config": {"model.sharpen": 0.5}},
    ]
    default = [request | {"config": plain | {"defaults.sparkle": 1}}]

    keys = computed_later(later, as_before + neutral + others + default)

    assert keys[: len(ROWS)] == [row["key"] for row in ROWS]
    known = [computed(row) for row in ({"kind": "request"}, {"kind": "engine"})]
    gif = computed({"kind": "request", "columns": {"format": "gif"}})
    found = keys[len(ROWS) :]
    assert found[:4] == [known[0], known[0], gif, known[1]]
    assert len({*found[4:9], *known}) == len(others) + len(known)
    assert found[9] == found[4]  # a default is the same as a column
