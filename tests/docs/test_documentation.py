"""The documentation says what the code does: its tables are written by the code, and its examples are run."""

from __future__ import annotations

import ast
import base64
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import pia_batch
from pia_batch import cli, errors, tiny
from pia_batch.config import RunConfig
from pia_batch.media import codecs
from pia_batch.planning.plan import make_plan
from pia_batch.schema.columns import REQUEST, RESULT

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """Return the names of docs/reference.py, which `make docs` runs."""
    return runpy.run_path(str(ROOT / "docs" / "reference.py"))


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"README"}))
def test_the_tables_that_come_from_the_code_are_what_it_says_now(name: str, reference: dict[str, Any]) -> None:
    assert reference["written"](PAGES[name]) == PAGES[name], "run `make docs`"


def test_every_table_stands_in_one_page(reference: dict[str, Any]) -> None:
    found = re.findall(r"<!-- generated: ([\w ]+) -->\n\n(?:\||```)", "".join(PAGES.values()))
    assert sorted(found) == sorted(reference["TABLES"])


def test_a_table_that_drifted_is_written_again(reference: dict[str, Any]) -> None:
    page = "before\n<!-- generated: exit codes -->\n\n| old |\n\n<!-- end -->\nafter\n"

    written = reference["written"](page)

    assert written.startswith(
        "before\n<!-- generated: exit codes -->\n\n| exit code | meaning |\n| --- | --- |\n| 0 | every"
    )
    assert written.endswith("pending or running |\n\n<!-- end -->\nafter\n")


def test_every_column_is_explained() -> None:
    for field in REQUEST:
        assert f"\n| `{field.name}` | " in PAGES["manifest"], field.name
    for field in RESULT:
        assert f"`{field.name}`" in PAGES["results"], field.name


def test_every_error_kind_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "pia_batch").glob("*.py"))
    kinds = {kind.kind for kind in errors.RequestError.__subclasses__()}
    kinds |= set(re.findall(r'"(invalid_\w+|missing_value|not_finite|out_of_range|duplicate_id|unsupported)"', source))
    for kind in kinds:
        assert f"`{kind}`" in PAGES["results"], kind


def test_every_command_and_exit_code_is_named() -> None:
    for command in cli.app.registered_commands:
        assert f"pia-batch {command.callback.__name__}" in PAGES["commands"]
    kinds = [errors.PiaBatchError, *errors.PiaBatchError.__subclasses__()]
    assert {0, 3, *(kind.exit_code for kind in kinds)} == set(cli.EXIT_CODES)


def test_the_tree_names_every_module_with_one_line() -> None:
    page = PAGES["architecture"]
    tree = page[page.index("```text\npia_batch/") :]
    modules = {path.relative_to(ROOT / "pia_batch") for path in (ROOT / "pia_batch").rglob("*.py")}
    for module in modules:
        assert re.search(rf"^ *{re.escape(module.name)} +\S", tree, re.MULTILINE), module


def test_the_example_manifest_is_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(python_block("pq.write_table"), {})  # noqa: S102 - what a reader would do

    plan = make_plan(RunConfig.load(None, {"manifest": "requests.parquet", "output": "out"}))

    assert (plan.num_pending, plan.num_rejected, plan.carried.names) == (3, 0, ["shop"])


_IMPORTS = ast.Import | ast.ImportFrom


@pytest.mark.long
def test_the_example_of_the_engine_generates_two_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.SAMPLE / "images", "photos")
    names: dict[str, Any] = {}
    exec(python_block("engine.animate"), names)  # noqa: S102 - what a reader would do

    assert [clip.frames.shape for clip in names["clips"]] == [(8, 64, 64, 3)] * 2


def test_what_the_notebook_imports_exists() -> None:
    notebook = nbformat.read(ROOT / "docs" / "engine.ipynb", as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    imports = [node for source in sources for node in ast.parse(source).body if isinstance(node, _IMPORTS)]

    assert imports
    exec("\n".join(map(ast.unparse, imports)), {})  # noqa: S102 - our own


@pytest.mark.long
def test_the_notebook_shows_three_animations() -> None:
    notebook = nbformat.read(ROOT / "docs" / "engine.ipynb", as_version=4)

    NotebookClient(notebook, timeout=200).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data["image/gif"] for output in outputs if output.output_type == "display_data"]
    assert [codecs.probe(base64.b64decode(gif), "gif").num_frames for gif in shown] == [16, 16, 8]


def test_the_public_names_are_those_of_their_modules() -> None:
    assert sorted(pia_batch.__all__) == [
        "ModelConfig",
        "PiaEngine",
        "RunConfig",
        "Shot",
        "__version__",
        "animate",
        "evaluate",
        "export",
        "plan",
        "prepare",
        "run",
    ]
    assert pia_batch.plan is make_plan
    assert set(pia_batch.__all__) < set(dir(pia_batch))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pia_batch.nonsense


def python_block(word: str) -> str:
    text = "\n".join(PAGES.values())
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in block)


def test_every_link_between_pages_leads_somewhere() -> None:
    for folder, page in [
        (ROOT, PAGES["README"]),
        *((ROOT / "docs", PAGES[p.stem]) for p in (ROOT / "docs").glob("*.md")),
    ]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page):
            assert (folder / link).exists(), link
        for anchor in re.findall(r"\]\(#([^)]+)\)", page):
            assert f"\n## {anchor.replace('-', ' ')}" in page.lower(), anchor


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_that_are_shipped_can_be_loaded(path: Path) -> None:
    RunConfig.load(path, {"manifest": "m", "output": "o"})
