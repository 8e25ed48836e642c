"""A hub of folders on this disk."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A hub that serves copies of folders as snapshots of one commit, and keeps the requests."""

    def __init__(self, cache: Path, **repositories: Path) -> None:
        self._cache = cache
        self._repositories = repositories
        self.asked: list[tuple[str, str | None]] = []
        self.patterns: list[str] = []

    def names(self, repo_id: str, revision: str | None) -> list[str]:
        del revision
        source = self._repositories[repo_id.partition("/")[2]]
        return sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())

    def download(self, repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
        self.asked.append((repo_id, revision))
        self.patterns += patterns
        name = repo_id.partition("/")[2]
        target = self._cache / name / COMMIT
        for inside in self.names(repo_id, revision):
            if any(fnmatch.fnmatch(inside, pattern) for pattern in patterns):
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self._repositories[name] / inside, target / inside)
        return target
