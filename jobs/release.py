"""Preparation of a release: version numbers, the changelog's section and the release notes.

    python jobs/release.py 0.2.0            # rewrites the files; then review, commit and tag v0.2.0
    python jobs/release.py 0.2.0 --notes    # prints the notes of a release that is prepared, for its page

`pia_batch.__version__` is the version. Files that name an image of the package follow it. Nothing is published here.
"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import UTC, date, datetime
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
NAMED_IN = (
    "Dockerfile",
    "docs/kubernetes.md",
    "docs/nodes.md",
    "jobs/github-actions/nightly.yaml",
    "jobs/kubernetes/rayjob.yaml",
    "jobs/kubernetes/raycronjob.yaml",
)
"""Files that name the version of the container image."""

_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
_IMAGE = re.compile(r'(/pia-batch:|image\.version=")\d+\.\d+\.\d+\w*')
_UNRELEASED = "## [Unreleased]\n"


def prepare(root: Path, version: str, day: date) -> list[str]:
    """Write a version into every file that names it, and give the unreleased changes its section.

    Args:
        root: Root of the repository.
        version: Version of the release, in the normal form of PEP 440.
        day: Day of the release, for the changelog.

    Returns:
        Paths of the files that changed, relative to the root.

    Raises:
        ValueError: The version is not normal, not the next one, or has no changes or no notes. Nothing is written.
    """
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    new = {"CHANGELOG.md": cut(changelog, version, day)}
    if not notes_path(root, version).is_file():
        raise ValueError(f"no release notes: write {notes_path(root, version).relative_to(root)} first")
    module = (root / "pia_batch/__init__.py").read_text(encoding="utf-8")
    new["pia_batch/__init__.py"] = _VERSION.sub(f'__version__ = "{version}"', module)
    for name in NAMED_IN:
        text = (root / name).read_text(encoding="utf-8")
        new[name] = _IMAGE.sub(lambda match: f"{match[1]}{version}", text)
    changed = [name for name, text in new.items() if (root / name).read_text(encoding="utf-8") != text]
    for name in changed:
        (root / name).write_text(new[name], encoding="utf-8")
    return changed


def cut(changelog: str, version: str, day: date) -> str:
    """Return the changelog with the unreleased changes under a version, and an empty unreleased section above.

    Raises:
        ValueError: The version is not in normal form or not above the last one, or nothing is unreleased.
    """
    try:
        number = Version(version)
    except InvalidVersion as err:
        raise ValueError(f"version: not a version of PEP 440 (got {version})") from err
    if str(number) != version:
        raise ValueError(f"version: not in normal form (got {version}, expected {number})")
    released = [Version(name) for name in re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)]
    if released and number <= max(released):
        raise ValueError(f"version: not above the last release (got {version}, last is {max(released)})")
    if not _section(changelog, "Unreleased"):
        raise ValueError("CHANGELOG.md: nothing is unreleased")
    return changelog.replace(_UNRELEASED, f"{_UNRELEASED}\n## [{version}] - {day.isoformat()}\n", 1)


def notes(root: Path, version: str) -> str:
    """Return the notes of a prepared release: its page of docs/releases without the title, and its changes.

    Raises:
        ValueError: The changelog has no section of this version, or the version has no page.
    """
    changes = _section((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if not changes:
        raise ValueError(f"CHANGELOG.md: no section {version}; prepare the release first")
    path = notes_path(root, version)
    if not path.is_file():
        raise ValueError(f"no release notes {path.relative_to(root)}")
    _, _, page = path.read_text(encoding="utf-8").partition("\n")
    return f"{page.strip()}\n\n## Changes\n\n{changes}\n"


def notes_path(root: Path, version: str) -> Path:
    """Return the path of the page that introduces a release."""
    return root / "docs/releases" / f"{version}.md"


def _section(changelog: str, name: str) -> str:
    """Return the text under a heading of the changelog, without the heading; empty if there is none."""
    found = re.search(rf"^## \[{re.escape(name)}\].*?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def main() -> None:
    """Prepare the release, or print its notes; exit with 1 if it cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="version of the release, such as 0.2.0")
    parser.add_argument("--date", type=date.fromisoformat, default=datetime.now(UTC).date(), help="default: today")
    parser.add_argument(
        "--notes", action="store_true", help="print the notes of a prepared release, and change nothing"
    )
    chosen = parser.parse_args()
    try:
        if chosen.notes:
            sys.stdout.write(notes(ROOT, chosen.version))
            return
        for name in prepare(ROOT, chosen.version, chosen.date):
            print(f"changed {name}")
    except ValueError as err:
        sys.exit(f"error: {err}")
    print(f"next: review, commit, and tag v{chosen.version} (docs/releasing.md)")


if __name__ == "__main__":
    main()
