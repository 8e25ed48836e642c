"""The language of the package: no headless docstrings, and none of the words that this project has replaced.

The same check runs as a program and prints `file:line: finding` for the given files and folders (default: all):

    python tests/docs/test_language.py pia_batch/engine jobs/benchmark.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_OPENINGS = "what whether how which who whom whose where when why that those as"
HEADLESS = frozenset(_OPENINGS.split())
"""First words of a clause that cannot be read alone."""

INSTEAD = {
    "generate (the model), animate (the task), sample (a random choice), render (a chart)": (
        "draw draws drew drawn drawing drawings drawable redraw redraws redrawn redrawing undrawn"
    ),
    "report, record, notify; as a name: payload, record, message": "tell tells told telling",
    "validate, validation result": "judge judges judged judging judgement judgements judgment verdict verdicts",
    "pending; needs regeneration": "due",
    "fix, repair": "mend mends mended mending",
    "again": "anew",
    "name the actor": "nobody",
    "happen to": "befall befalls befallen befell",
    "self-test": "canary canaries",
    "variant, baseline": "contestant contestants",
    "attempt tracker": "ledger ledgers",
    "tombstone": "withdraw withdraws withdrew withdrawn withdrawal withdrawals",
    "statistics": "survey surveys surveyed surveying",
    "work classes": "trait traits",
    "warnings, config errors": "advice",
}
"""Refused words by the terms that replace them."""

REFUSED = {word: terms for terms, words in INSTEAD.items() for word in words.split()}

ALLOWED = {
    "ImageDraw.Draw": "Pillow's class",
    "ImageDraw": "Pillow's module",
    "power.draw": "a field of nvidia-smi",
    "drawImage": "the method of HTML canvases",
    ".tell()": "a method of files",
    "_withdrawn/": "a prefix of stored outputs, which must stay readable",
}
"""Names that cannot be changed here, with their owner."""

_ALLOWED = re.compile("|".join(map(re.escape, sorted(ALLOWED, key=len, reverse=True))))
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # snake_case and CamelCase split into words
_ARGUMENT = re.compile(r"^ {4,}\**\w+( \(.*?\))?: +(?P<text>\S.*)$")
_SUFFIXES = {".py", ".pyi", ".js", ".css", ".html", ".yaml", ".sh", ".cron", ".service", ".timer", ".json", ".md"}
_DATA = ("pia_batch/tiny/checkpoint/", "pia_batch/tiny/sample/", "pia_batch/weights/sd15/")  # vocabularies, pictures


def headless(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a Python source whose docstring or described argument opens with a headless clause."""
    for line, words in _described(ast.parse(text)):
        first = re.match(r"\W*(\w+)", words)
        if first and first[1].lower() in HEADLESS:
            yield line, f"opens with {first[1]!r}: begin with a noun phrase or an imperative"


def refused(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of any source that have a replaced word in an identifier, a string or a comment."""
    for number, line in enumerate(text.splitlines(), start=1):
        for match in _WORD.finditer(_ALLOWED.sub("", line)):
            if terms := REFUSED.get(match[0].lower()):
                yield number, f"{match[0]!r}: {terms}"


def findings(path: Path) -> list[str]:
    """List what is wrong with one file, as `file:line: finding`."""
    text = path.read_text(encoding="utf-8")
    found = [*refused(text), *(headless(text) if path.suffix in {".py", ".pyi"} else ())]
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [f"{shown}:{line}: {finding}" for line, finding in sorted(found)]


def files(folder: Path) -> list[Path]:
    """List the checked files of a folder, or the file itself."""
    if folder.is_file():
        return [folder]
    found = (path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES and path.is_file())
    return [path for path in found if not path.as_posix().removeprefix(f"{ROOT.as_posix()}/").startswith(_DATA)]


def _described(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of docstrings, of attribute docstrings, of their arguments, and of help and descriptions."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if not isinstance(block, list):
                continue
            for place, statement in enumerate(block):
                documents = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                if (place == 0 and documents) or (place and isinstance(block[place - 1], ast.Assign | ast.AnnAssign)):
                    yield from _docstring(statement)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in {"help", "description"}:
                    yield from ((keyword.value.lineno, text) for text in _strings(keyword.value))


def _docstring(statement: ast.stmt) -> Iterator[tuple[int, str]]:
    if not isinstance(statement, ast.Expr):
        return
    for text in _strings(statement.value):
        yield statement.lineno, text
        for number, line in enumerate(text.splitlines()):
            if number and (argument := _ARGUMENT.match(line)):
                yield statement.lineno + number, argument["text"]


def _strings(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


# --- tests ----------------------------------------------------------------------------------------------------------


def parts() -> list[str]:
    """List the packages and modules of `pia_batch/`, `jobs`, and the pages."""
    inside = sorted((ROOT / "pia_batch").iterdir())
    pages = [path.name for path in sorted(ROOT.glob("*.md")) if path.name != "CHANGELOG.md"]
    return [
        "jobs",
        "docs",
        *pages,
        *(path.relative_to(ROOT).as_posix() for path in inside if path.is_dir() and files(path)),
    ] + [path.relative_to(ROOT).as_posix() for path in inside if path.suffix in _SUFFIXES]


@pytest.mark.parametrize("part", parts())
def test_no_docstring_is_headless_and_no_replaced_word_is_used(part: str) -> None:
    found = [finding for path in files(ROOT / part) for finding in findings(path)]

    assert not found, "\n".join(found)


def test_every_allowed_name_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for part in parts() for path in files(ROOT / part))

    assert [name for name in ALLOWED if name not in text] == []


@pytest.mark.parametrize(
    "source",
    [
        '"""What a run costs."""\n',
        'class Cost:\n    """Whether it is known."""\n',
        'def cost():\n    """How much it is."""\n',
        'async def cost():\n    """Where it is."""\n',
        'class Cost:\n    euros: float = 0\n    """Which is paid."""\n',
        'EUROS = 1\n"""`Whose` money it is."""\n',
        'def cost(hours):\n    """Return the cost.\n\n    Args:\n        hours: that all have lived.\n    """\n',
        'def cost(hours):\n    """Return it.\n\n    Args:\n        hours (float): how many.\n    """\n',
        'x = Field(description="how many euros")\n',
    ],
)
def test_a_headless_clause_is_found_wherever_something_is_described(source: str) -> None:
    assert len(list(headless(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""Cost of a run: what it was, and why."""\n',
        'def cost(hours):\n    """Return the cost.\n\n    Args:\n        hours: Total uptime, in hours.\n    """\n',
        'print("What now?")\n',
        'def cost():\n    x = 1\n    print("how")\n',
    ],
)
def test_a_question_inside_a_sentence_or_a_message_is_none(source: str) -> None:
    assert list(headless(source)) == []


@pytest.mark.parametrize(
    "line",
    ["drawn_frames = 1", "class DrawnFrames:", 'say("it is due")', "# Nobody knows", "reTOLD = TOLD", "f(drawFrame)"],
)
def test_a_replaced_word_is_found_in_names_strings_and_comments(line: str) -> None:
    assert len({number for number, _ in refused(line)}) == 1


@pytest.mark.parametrize("line", ["ImageDraw.Draw(picture)", "withdrawable = residue = 1", "# a drawer, a teller"])
def test_other_words_and_the_names_of_libraries_are_not(line: str) -> None:
    assert list(refused(line)) == []


if __name__ == "__main__":
    places = [Path(name).resolve() for name in sys.argv[1:]] or [ROOT / part for part in parts()]
    printed = [finding for place in places for path in files(place) for finding in findings(path)]
    sys.stdout.write("".join(f"{finding}\n" for finding in printed))
    sys.exit(1 if printed else 0)
