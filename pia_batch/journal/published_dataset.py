"""Published dataset: `metadata.parquet` and `README.md` of an output, its newest results as a Hugging Face dataset.

Both are replaced by every publication. Each is one object that is written at once, and the card states the checksum of
the table, so that a process that dies between the two leaves a difference that `verify` finds.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from pia_batch.journal import layout
from pia_batch.journal.dataset_card import CardFacts, make_card, read_identity
from pia_batch.journal.dataset_table import DatasetTable, DatasetTableWriter
from pia_batch.storage.object_store import ObjectInfo, Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredDataset:
    """The two objects as they were written.

    Attributes:
        run_id: Run whose results they show.
        media: Media of the files.
        num_rows: Number of rows of the table.
        table: The table's object.
        card: Bytes of the card; None: it was left as a person has written it.
    """

    run_id: str
    media: str
    num_rows: int
    table: ObjectInfo
    card: bytes | None

    def is_stored(self, store: Store) -> bool:
        """Return whether the output still has these two; another publication may have replaced one.

        Raises:
            StorageError: The store refused or did not answer.
        """
        try:
            same_card = self.card is None or store.read(layout.DATASET_CARD) == self.card
            return same_card and store.stat(layout.DATASET_TABLE) == self.table
        except FileNotFoundError:
            return False


class DatasetWriter:
    """Writer of the two objects, from the parts of results. Used as a context, which holds a temporary folder.

    Args:
        run_id: Run whose results they show.
        digest: Digest of the results.
        schema: Schema of the results.
    """

    def __init__(self, run_id: str, digest: str, schema: pa.Schema) -> None:
        self._run_id = run_id
        self._folder = tempfile.TemporaryDirectory(prefix="pia-batch-dataset-")
        self._table = DatasetTableWriter(Path(self._folder.name), schema, {"run_id": run_id, "digest": digest})

    def __enter__(self) -> Self:
        """Return this writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the temporary folder."""
        self._folder.cleanup()

    def add(self, part: pa.Table) -> None:
        """Add a part of the results."""
        self._table.add(part)

    def write(self, store: Store, num_failed: int, sources: dict[str, Any]) -> StoredDataset:
        """Write the table, then the card.

        Args:
            store: Output.
            num_failed: Number of failed requests.
            sources: Weights of each model, by its name in the config.

        Raises:
            StorageError: The store refused or did not answer.
        """
        table = self._table.finish()
        stored = store.replace_file(layout.DATASET_TABLE, table.path)
        card = self._card(store, table, num_failed, sources)
        if card is not None:
            store.replace(layout.DATASET_CARD, card)
        return StoredDataset(self._run_id, table.media, table.num_rows, stored, card)

    def _card(self, store: Store, table: DatasetTable, num_failed: int, sources: dict[str, Any]) -> bytes | None:
        facts = CardFacts(
            run_id=self._run_id,
            num_rows=table.num_rows,
            media=table.media,
            formats=table.formats,
            models=table.models,
            sources=sources,
            columns=table.columns,
            data_files=[layout.DATASET_TABLE, *_patterns(table)],
            num_failed=num_failed,
            table_sha256=sha256_of(table.path),
        )
        try:
            return make_card(facts, store.read(layout.DATASET_CARD).decode()).encode()
        except FileNotFoundError:
            return make_card(facts).encode()
        except ValueError as problem:
            uri = store.uri_of(layout.DATASET_CARD)
            log.warning("dataset_card_kept uri=%s: not a dataset card: %s; correct or delete it", uri, problem)
            return None


def _patterns(table: DatasetTable) -> list[str]:
    """Return the patterns of the files of the table's media; `datasets` refuses one that no file matches."""
    if table.media == "file" or not table.num_rows:
        return []
    return [f"{layout.ANIMATIONS}*/*.{extension}" for extension in table.extensions]


def find_difference(store: Store, run_id: str) -> str | None:
    """Return the difference between the two objects and the published results of a run in words, or None.

    Args:
        store: Output.
        run_id: Run that published last.

    Raises:
        StorageError: The store refused or did not answer.
    """
    try:
        card = store.read(layout.DATASET_CARD)
    except FileNotFoundError:
        return f"{store.uri_of(layout.DATASET_CARD)} does not exist"
    try:
        found = store.stat(layout.DATASET_TABLE)
    except FileNotFoundError:
        return f"{store.uri_of(layout.DATASET_TABLE)} does not exist"
    identity = read_identity(card.decode(errors="replace"))
    if identity is None:
        return f"{store.uri_of(layout.DATASET_CARD)} is not the dataset card of a run; delete it"
    if identity[0] != run_id:
        return f"{store.uri_of(layout.DATASET_CARD)} shows run {identity[0]}, and {run_id} published last"
    with tempfile.TemporaryDirectory(prefix="pia-batch-dataset-") as folder:
        path = Path(folder, "table")
        store.download(found, path)
        same = sha256_of(path) == identity[1]
    return None if same else f"{store.uri_of(layout.DATASET_TABLE)} is not the table that the dataset card states"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
