"""Formats of an export: one declaration for each, and the interface of what they share."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pia_batch.datasets.export_plan import ExportPlan, Shard
from pia_batch.datasets.export_rows import Batch, RowReader
from pia_batch.errors import ConfigError, ObjectExistsError
from pia_batch.journal import layout
from pia_batch.journal.dataset_card import CardFacts, make_card
from pia_batch.schema.dataset_columns import Media
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

PROGRESS = "_export/"
"""Prefix of what an export needs only until it is complete: its options, and what each complete shard has."""


@dataclass(frozen=True)
class ShardTarget:
    """Place of one shard on a worker.

    Attributes:
        store: Destination.
        shard: The shard.
        name: Name of its object below the destination; empty for formats with one object for each animation.
        schema: Chosen columns.
        media: Media of the animations; `file` where a format takes any.
        folder: Empty folder on the local disk.
    """

    store: Store
    shard: Shard
    name: str
    schema: pa.Schema
    media: Media
    folder: Path

    def put(self, path: Path) -> int:
        """Store a local file as the shard's object, and return its size in bytes."""
        return self.store.replace_file(self.name, path).num_bytes


@dataclass(frozen=True)
class Written:
    """Complete shard.

    Attributes:
        number: Number of the shard.
        name: Name of its object; empty for formats with one object for each animation.
        rows: Number of animations.
        num_bytes: Size of what was written, in bytes.
    """

    number: int
    name: str
    rows: int
    num_bytes: int


@dataclass(frozen=True)
class Finish:
    """Export whose shards are complete, for the files that stand next to them.

    Attributes:
        store: Destination.
        plan: Plan of the export.
        reader: Reader of its rows.
        written: Its shards, in order.
        media: Media of the animations.
        folder: Empty folder on the local disk.
    """

    store: Store
    plan: ExportPlan
    reader: RowReader
    written: Sequence[Written]
    media: Media
    folder: Path


def write_card(finish: Finish, data_files: Sequence[str]) -> None:
    """Write a dataset card, unless there is one: it is a person's to complete.

    Args:
        finish: The export.
        data_files: Paths and patterns of its files, for `datasets`.
    """
    plan = finish.plan
    facts = CardFacts(
        run_id=plan.published.run_id,
        num_rows=plan.num_rows,
        media=finish.media,
        formats=plan.exported_formats,
        models=plan.models,
        sources=plan.published.sources,
        columns=plan.columns,
        data_files=data_files,
        chosen=plan.names,
    )
    try:
        finish.store.create(layout.DATASET_CARD, make_card(facts).encode())
    except ObjectExistsError:
        log.info("dataset_card_found uri=%s", finish.store.uri_of(layout.DATASET_CARD))


def nothing_to_check(plan: ExportPlan) -> None:
    """Accept every plan."""


def nothing_to_finish(finish: Finish) -> None:
    """Write nothing next to the shards."""


@dataclass(frozen=True)
class ExportFormat:
    """One format of exports.

    Attributes:
        name: Name on the command line.
        description: Contents of the destination, for help and documentation.
        write: Writer of one shard from its batches; returns the bytes written. The same rows give the same bytes.
        object_name: Name of a shard's object, from its number and the number of shards; None: one object for each
            animation.
        one_media: True if all animations must be of one media that `datasets` decodes.
        posters: True if `write` writes the posters, too.
        times_as_texts: True if columns with times that Python lacks become texts, because its readers cannot read them.
        check: Check of a plan before anything is written; raises ConfigError.
        finish: Writer of what stands next to the shards; it may be called again after a crash.
        module: Module that the format needs beyond this package's own; empty: none.
        extra: Extra of this package that installs it.
    """

    name: str
    description: str
    write: Callable[[Iterator[Batch], ShardTarget], int]
    object_name: Callable[[int, int], str] | None
    one_media: bool = True
    posters: bool = False
    times_as_texts: bool = False
    check: Callable[[ExportPlan], None] = nothing_to_check
    finish: Callable[[Finish], None] = nothing_to_finish
    module: str = ""
    extra: str = ""

    def require(self) -> None:
        """Refuse the format where its library is not installed.

        Raises:
            ConfigError: It is not; the message has the command that installs it.
        """
        if self.module and importlib.util.find_spec(self.module) is None:
            msg = f"--format {self.name} needs another library; install it by: pip install 'pia-batch[{self.extra}]'"
            raise ConfigError(msg)

    def media_of(self, plan: ExportPlan) -> Media:
        """Return the media of a plan's animations; `file` where this format takes any.

        Raises:
            ConfigError: This format needs one media, and the plan has several, or files that nothing decodes.
        """
        media = plan.media
        if not self.one_media:
            return next(iter(media)) if len(media) == 1 else "file"
        if len(media) == 1 and "file" not in media:
            return next(iter(media))
        counts = ", ".join(f"{number} {name}" for name, number in plan.exported_formats.items())
        msg = (
            f"--format {self.name}: the animations must all be videos (mp4) or all be images (gif, webp), and there "
            f"are {counts}; give --transcode mp4, choose by --where \"format == 'mp4'\", or use webdataset or folder"
        )
        raise ConfigError(msg)
