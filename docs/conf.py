"""Configuration of the documentation's site: `make docs` builds it with Sphinx, Furo and MyST.

The source folder of Sphinx is the root of the repository, so that pages link to each other, to README.md and to
programs by the same relative paths as on GitHub. `index.md` lists the pages in groups; the site's navigation is made
of that list.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx

import pia_batch

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "pia_batch"
release = version = pia_batch.__version__
root_doc = "docs/index"
include_patterns = ["docs/**.md", "README.md", "CHANGELOG.md", "RELIABILITY.md", "SECURITY.md", "CONTRIBUTING.md"]
include_patterns += ["CODE_OF_CONDUCT.md", "jobs/README.md"]
exclude_patterns = [".*", "build", "dist", "outputs", "pia_batch", "tests"]
"""Folders that the search for pages leaves out."""
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]

myst_heading_anchors = 3
myst_enable_extensions = ["strikethrough"]

autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False

nitpicky = True
"""A type or a name in a docstring that leads nowhere is an error, except these."""
nitpick_ignore_regex = [
    ("py:class", r"pia_batch\.(engine|pipeline|planning|journal|manifest|schema|config|driver|evaluation)\..*"),
    (
        "py:class",
        "Speed|Arithmetic|Interpolation|Context|LoraScales|FreeInitMethod|KeyPrompts?|Field",
    ),  # aliases of them
    ("py:class", "compiling.Compiler|KeySet|Outcomes|Manifest|ScanCache|Chunk"),
    ("py:exc", r"torch\.OutOfMemoryError"),  # torch does not document it
]

html_theme = "furo"
html_title = f"pia_batch {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_extra_path = ["site"]
"""Files of the site's root: `index.html`, which leads to the index of the pages."""


def _inventories() -> dict[str, tuple[str, str]]:
    """Write the inventories of other projects' names in Sphinx's format, and return them for intersphinx.

    They are kept as text in docs/inventories, with the names that our docstrings use: a build needs no network.
    """
    folder = ROOT / "build/inventories"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for path in sorted((HERE / "inventories").glob("*.txt")):
        url, *entries = path.read_text(encoding="utf-8").splitlines()
        head = f"# Sphinx inventory version 2\n# Project: {path.stem}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        body = "".join(f"{entry} -\n" for entry in entries if entry)
        written = folder / f"{path.stem}.inv"
        written.write_bytes(head.encode() + zlib.compress(body.encode()))
        found[path.stem] = (url, str(written))
    return found


intersphinx_mapping = _inventories()


_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^)#:\s]+)\)")


def _links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace links that lead out of the site, to folders and to pages of other folders, by the path that they name."""
    folder = ROOT / Path(docname).parent

    def replaced(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        page = target.suffix == ".md" and target.is_file()
        known = page and target.relative_to(ROOT).with_suffix("").as_posix() in app.env.found_docs
        return f"{link[1]} (`{target.relative_to(ROOT)}`)" if target.is_dir() or (page and not known) else link[0]

    source[0] = _LINK.sub(replaced, source[0])


def _navigation(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Add to the index, for each group of its list, a hidden tree of the pages that the group links to."""
    if docname != root_doc:
        return
    for caption, pages in groups(source[0]).items():
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"


def groups(index: str) -> dict[str, list[str]]:
    """Return the pages that the index lists under each heading, as entries `Title <path>` of a toctree."""
    found = {}
    for group in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        caption, _, text = group.partition("\n")
        pages = re.findall(r"^- \[([^]]+)\]\(([\w./-]+)\.md\)", text, re.MULTILINE)
        found[caption] = [f"{title} <{path}>" for title, path in pages]
    return found


def _fields(_app: Sphinx, what: str, _name: str, obj: Any, _options: Any, lines: list[str]) -> None:
    """Add the fields of a pydantic model, with their descriptions, to its docstring."""
    if what == "class" and issubclass(obj, BaseModel):
        lines.append("")
        lines += [f":ivar {name}: {field.description}" for name, field in obj.model_fields.items() if field.description]


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect what the site adds to the pages."""
    app.connect("source-read", _links)
    app.connect("source-read", _navigation)
    app.connect("autodoc-process-docstring", _fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
