"""Options of `prepare`, checked as far as they can be without the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from pia_batch.config import ImagesConfig
from pia_batch.datasets.request_columns import IdsFrom, OnMissing, RequestOptions
from pia_batch.datasets.sources import Images, Kind, ReadOptions
from pia_batch.datasets.templates import Template
from pia_batch.errors import ConfigError
from pia_batch.schema.expressions import RowFilter
from pia_batch.storage import uris


@dataclass(frozen=True)
class PrepareOptions:
    """Options of `prepare`, as `pia_batch.prepare` documents them."""

    kind: str | None = None
    version: str | None = None
    images: Images | None = None
    allow: Sequence[str] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    text: Sequence[str] = ()
    prompt: str | None = None
    negative_prompt: str | None = None
    on_missing: OnMissing = "fail"
    request_id_from: IdsFrom | None = None
    vary: Sequence[str] = ()
    where: str | None = None
    limit: int | None = None
    sample: float | None = None
    shuffle: int | None = None
    probe: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the source.

        Raises:
            ConfigError: An option cannot be what it is.
        """
        for name, allowed in (
            ("images", get_args(Images)),
            ("on_missing", get_args(OnMissing)),
            ("request_id_from", get_args(IdsFrom)),
        ):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: unknown; write one of {', '.join(allowed)}")
        for entry in self.allow:
            try:
                uris.parse_prefix(entry)
            except ValueError as err:
                raise ConfigError(f"--allow: {err}") from None
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: at least 1 is expected")
        if self.sample is not None and not 0 < self.sample <= 1:
            raise ConfigError(f"--sample {self.sample}: a share above 0, up to 1, is expected, such as 0.01 or 1%")

    def for_reading(self) -> ReadOptions:
        """Return the part that the source needs.

        Raises:
            ConfigError: A template cannot be parsed.
        """
        templates = (_template(self.prompt, "--prompt"), _template(self.negative_prompt, "--negative-prompt"))
        named = {*self.columns.values(), *(name for template in templates if template for name in template.columns)}
        return ReadOptions(
            self.images, self.version, frozenset(self.text), frozenset(name for name in named if "." in name)
        )

    def for_requests(self, kind: Kind) -> RequestOptions:
        """Return the part that decides what becomes of a row.

        Raises:
            ConfigError: A template or the condition cannot be parsed.
        """
        return RequestOptions(
            kind=kind,
            columns=dict(self.columns),
            prompt=_template(self.prompt, "--prompt"),
            negative_prompt=_template(self.negative_prompt, "--negative-prompt"),
            on_missing=self.on_missing,
            ids_from=self.request_id_from,
            where=None if self.where is None else RowFilter(self.where),
            sample=self.sample,
            shuffle=self.shuffle,
            probe=self.probe,
            images=self.images,
            fetching=ImagesConfig(allow=tuple(self.allow)),
        )


def _template(text: str | None, option: str) -> Template | None:
    return None if text is None else Template(text, option)
