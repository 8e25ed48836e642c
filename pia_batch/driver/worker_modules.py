"""Modules of workers: Ray's workers import them from where the driver does, and files that shadow them are refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from importlib.machinery import FrozenImporter, PathFinder
from pathlib import Path

from pia_batch.errors import ConfigError, printable

_PACKAGES = frozenset({
    "PIL", "accelerate", "aiobotocore", "aiohttp", "attr", "av", "botocore", "certifi", "click", "diffusers",
    "filelock", "fsspec", "google", "grpc", "huggingface_hub", "idna", "jinja2", "jsonschema", "msgpack", "numpy",
    "obstore", "packaging", "pandas", "peft", "psutil", "pyarrow", "pydantic", "ray", "regex", "requests", "rich",
    "ruamel", "s3fs", "safetensors", "scipy", "spandrel", "sympy", "tokenizers", "torch", "torchvision", "tqdm",
    "transformers", "typer", "typing_extensions", "urllib3", "yaml",
})  # fmt: skip
"""Packages that a worker or the driver imports, by the names of their modules."""

_UNUSED = frozenset({
    "antigravity", "cgi", "chunk", "crypt", "curses", "getopt", "imp", "mailbox", "pipes", "sched", "shelve",
    "smtplib", "this", "tkinter", "trace", "turtle", "venv", "wave", "webbrowser",
})  # fmt: skip
"""Modules of the standard library that no worker imports, and whose names scripts have."""


def inherited_paths(paths: Collection[str], search_path: Sequence[str]) -> list[str]:
    """Return those of the paths that Ray would add for its workers which this process searches itself.

    Ray adds the working folder, first of all. A program that was installed, such as `pia-batch`, imports nothing from
    there, and its workers may not either: `torch.py` there may be anything.
    """
    searched = {os.path.realpath(path) for path in search_path}  # "" is the working folder
    return [path for path in paths if os.path.realpath(path) in searched]


def check_modules(search_path: Sequence[str] | None = None, script: str | None = None) -> None:
    """Check that no file in the working folder, or next to the script, has the name of a module that a worker imports.

    Only folders that this process searches for modules count.

    Args:
        search_path: Folders in which modules are searched, in this order; None: those of this process.
        script: Path of the program that runs; None: that of this process.

    Raises:
        ConfigError: There is such a file. The message names it.
    """
    search_path = sys.path if search_path is None else search_path
    script = sys.argv[0] if script is None else script
    folders = {os.path.realpath(folder) for folder in ("", Path(os.path.realpath(script)).parent)}
    for at, entry in enumerate(search_path):
        if (folder := os.path.realpath(entry)) not in folders:
            continue
        for name in _module_names(folder):
            found = _file_of(name, [folder])
            if found is None or _file_of(name, search_path[:at]) is not None:
                continue
            if name in sys.stdlib_module_names or PathFinder.find_spec(name, search_path[at + 1 :]):
                msg = (
                    f"{printable(found)}: workers would import it as the module {name!r} of Python or of a package; "
                    f"rename it, or start `pia-batch` itself, which imports nothing from the working folder"
                )
                raise ConfigError(msg)


def _module_names(folder: str) -> list[str]:
    """Return the names of modules that workers import and that files or folders of a folder have, sorted."""
    try:
        names = {path.name.split(".", 1)[0] for path in Path(folder).iterdir()}
    except OSError:
        return []
    known = (sys.stdlib_module_names | _PACKAGES) - _UNUSED - set(sys.builtin_module_names)
    return sorted(name for name in names & known if FrozenImporter.find_spec(name) is None)


def _file_of(name: str, search_path: Sequence[str]) -> str | None:
    """Return the file of a module in a search path; None if it is not found, or is a folder without `__init__.py`."""
    spec = PathFinder.find_spec(name, list(search_path))
    return spec.origin if spec is not None and spec.has_location else None
