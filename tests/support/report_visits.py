"""Pages of reports with their media, and a person who opens one in Chromium."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from inputs import png
from playwright.sync_api import Page
from reported import (
    RUN,
    publish,
    store_clip,
)

from pia_batch import report
from pia_batch.storage.object_store import Store


@dataclass
class Visit:
    """One person before one page. `told` is what the console said, `asked` every URL that the page fetched."""

    page: Page
    missing: bool = False
    """Whether media may be missing, of which the console tells too."""
    told: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def hear(self, text: str, uri: str) -> None:
        if not (uri.endswith("/gone.png") or (self.missing and "ERR_FILE_NOT_FOUND" in text)):
            self.told.append(text)

    def open(self, uri: str) -> Page:
        self.page.goto(uri)
        self.page.wait_for_selector("#grid li .pictures > *")
        return self.page

    def ids(self) -> list[str]:
        """The request ids of the cards, in reading order."""
        return self.page.locator("#grid .id").all_inner_texts()


@dataclass(frozen=True)
class Site:
    """A published run with its media, and its page."""

    folder: Path
    rows: list[dict[str, Any]]

    @property
    def uri(self) -> str:
        return (self.folder / "out" / "_runs" / RUN / "report.html").as_uri()


def build(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Site:
    store = publish(Store(str(folder / "out")), rows)
    (folder / "manifest" / "images").mkdir(parents=True)
    for k in range(5):
        (folder / "manifest" / "images" / f"{k}.png").write_bytes(png(k))
    for k, row in enumerate(rows):
        if row["status"] == "succeeded":
            store_clip(store, row, k)
    report.write(store, options=report.ReportOptions(**options))
    return Site(folder, rows)


def inspected(page: Page) -> Path:
    """The file that the copyable command would inspect."""
    *command, uri = shlex.split(page.locator("#inspect").text_content() or "")
    assert command == ["pia-batch", "inspect"]
    return Path(unquote(urlsplit(uri).path))
