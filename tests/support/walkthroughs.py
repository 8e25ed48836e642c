"""Commands of the documentation: found in its pages, split into words, and checked against the repository."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from typer._click import exceptions

from pia_batch import cli
from pia_batch.cli.options import load, overrides
from pia_batch.errors import ConfigError, RequestError

ROOT = Path(__file__).parents[2]

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("", "docs", "jobs")
    for path in sorted((ROOT / folder).glob("*.md"))
}
"""Every page for users, by its path."""

SHELL = {
    *("cat", "cd", "cp", "export", "kill", "mkdir", "sleep", "source", "test", "unset", "wait", "do", "done", "until"),
    *("for", "while", "echo", "ls", "rm"),
}
"""Words of the shell, and programs that every machine has."""

SHELLS = ("bash", "console", "shell", "sh")
"""Languages of the blocks that hold commands."""

_SEPARATORS = re.compile(r"[\n;&|]+")
_REDIRECTIONS = re.compile(r"\d?(>>|>|<)(&\d|\s*[^\s;&|]+)")


@dataclass(frozen=True)
class Command:
    """One command of a page: its words, without redirections and without assignments before it."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks(page: str, *languages: str) -> list[str]:
    """Return the blocks of a page in these languages, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def unprinted(expected: str, printed: str) -> str | None:
    """Return the first line of a page's block of output that was not printed after those before it, or None.

    `...` stands for any text inside of a line. What was printed may have further lines, and spaces at the ends.
    """
    lines = iter(printed.splitlines())
    for line in expected.splitlines():
        pattern = ".*".join(re.escape(part) for part in line.rstrip().split("..."))
        if not any(re.fullmatch(pattern, found.rstrip()) for found in lines):
            return line
    return None


def commands(page: str) -> Iterator[Command]:
    """Yield the commands of a page's shell blocks."""
    variables: dict[str, str] = {}
    for block in blocks(page, *SHELLS):
        for words in _split(block):
            while words and (set_to := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
                variables[set_to[1]] = set_to[2]
                words = words[1:]  # noqa: PLW2901 - what is left of it
            while words and words[0] in ("until", "while", "!"):
                words = words[1:]  # noqa: PLW2901
            filled = [part for word in words for part in _filled(word, variables)]
            if filled:
                filled[0] = filled[0].removeprefix(".venv/bin/")
                yield Command(page, tuple(filled))


def mentions(page: str) -> Iterator[Command]:
    """Yield our commands that its text names between backquotes; capitals are placeholders."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for words in re.findall(r"`(pia-batch [^`]+)`", text):
        yield Command(page, tuple(shlex.split(words)))


def _split(block: str) -> Iterator[list[str]]:
    """Yield the words of each simple command, without quotes."""
    block = re.sub(r"<<'(\w+)'(.*?)\n.*?^\1$", r"\2", block, flags=re.DOTALL | re.MULTILINE)
    block = re.sub(r"(^|\s)#\s.*$", "", block, flags=re.MULTILINE).replace("\\\n", " ")
    quoted: list[str] = []

    def keep(match: re.Match[str]) -> str:
        quoted.append(match[0])
        return f"\0{len(quoted) - 1}\0"

    plain = re.sub(r"\"[^\"]*\"|'[^']*'|\$\([^)]*\)", keep, block)
    plain = _REDIRECTIONS.sub("", plain)
    for part in _SEPARATORS.split(plain):
        whole = re.sub("\0(\\d+)\0", lambda match: quoted[int(match[1])], part)
        yield shlex.split(whole)


def _filled(word: str, variables: dict[str, str]) -> list[str]:
    """Replace a variable that the page has set, as the shell does; others stay."""
    name = word.removeprefix("$")
    return shlex.split(variables[name]) if name in variables and name != word else [word]


def mistake_in(command: Command) -> str | None:
    """Return the error of a command that shows without running it, or None."""
    program, *arguments = command.words
    if program == "pia-batch":
        return _mistake_in_ours(command.page, arguments)
    if program == "python":
        return _mistake_in_program(command.page, arguments)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return next((f"no target {word}" for word in arguments if "=" not in word and word not in targets), None)
    named = [word for word in arguments if re.fullmatch(r"[\w./-]+\.(lock|txt|yaml|toml)", word)]
    return next((f"no file {word}" for word in named if not _is_there(command.page, word)), None)


def _mistake_in_ours(page: str, arguments: list[str], *, may_lack: bool = False) -> str | None:
    group = typer.main.get_command(cli.app)
    try:
        context = group.make_context("pia-batch", list(arguments))
        if "--help" in arguments or not arguments:
            return None
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        given = command.make_context(name, rest, parent=context).params
    except typer.Exit:  # an option that ends the program, such as --version
        return None
    except exceptions.MissingParameter as err:
        return None if may_lack else err.format_message()
    except exceptions.UsageError as err:
        return err.format_message()
    return _mistake_in_values(page, given)


def _mistake_in_values(page: str, given: dict[str, object]) -> str | None:
    """Return the error of a command's config or overrides, or None."""
    config, settings = given.get("config"), given.get("override")
    if config is not None and not re.fullmatch("[A-Z]+", str(config)) and not _is_there(page, str(config)):
        return f"no config {config}"
    kinds = {kind.kind for kind in RequestError.__subclasses__()}
    if unknown := set(given.get("kinds") or ()) - kinds:  # type: ignore[call-overload]
        return f"no error kind {', '.join(sorted(unknown))}"
    try:
        load(None, overrides("manifest", "output", list(settings or [])))  # type: ignore[call-overload]
    except ConfigError as err:
        return str(err)
    return None


def mistake_in_mention(command: Command) -> str | None:
    """Return the error, like `mistake_in`, of a command that a text names without all of its arguments."""
    if "..." in command.words or command.words[1:2] == ("--install-completion",):
        return None
    return _mistake_in_ours(command.page, list(command.words[1:]), may_lack=True)


def _mistake_in_program(page: str, arguments: list[str]) -> str | None:
    if arguments[0] == "-c":
        return None
    if arguments[0] == "-m":
        return None if _is_module(arguments[1]) else f"no module {arguments[1]}"
    if not _is_there(page, arguments[0]):
        return f"no program {arguments[0]}"
    if not (ROOT / arguments[0]).exists():
        return None
    source = (ROOT / arguments[0]).read_text(encoding="utf-8")
    flags = [word.partition("=")[0] for word in arguments[1:] if word.startswith("--")]
    return next((f"{arguments[0]} knows no {flag}" for flag in flags if f'"{flag}"' not in source), None)


def _is_module(name: str) -> bool:
    if not name.startswith("pia_batch."):
        return importlib.util.find_spec(name) is not None
    file = ROOT.joinpath(*name.split("."))  # finding it by its name would import its package
    return file.with_suffix(".py").exists() or (file / "__init__.py").exists()


def _is_there(page: str, name: str) -> bool:
    """Return true if a file is in the repository, or the page shows how to write it: by `cat` or as a named block."""
    return (ROOT / name).exists() or re.search(rf"(> |^# ){re.escape(name)}\b", PAGES[page], re.MULTILINE) is not None
