"""Rows of fragments as arrays, and as entries of the journal's index: key, status and error kind of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.columns import SUCCEEDED
from pia_batch.schema.keys import KEY_BYTES, Keys, KeySet, keys_from_hex

NO_KEYS: Keys = np.empty(0, dtype=f"V{KEY_BYTES}")

INDEX_ENTRY = pa.schema(
    [
        ("fragment", pa.string()),
        ("keys", pa.large_binary()),  # 16 bytes per row
        ("others", pa.list_(pa.struct([("row", pa.int32()), ("succeeded", pa.bool_()), ("error_kind", pa.string())]))),
    ]
)
"""Columns of an index entry, which describes one fragment. `others` are the rows that failed or have an error kind."""

ENTRY_COLUMNS = ["key", "status", "error_kind"]
"""Columns of a fragment that its index entry is made from."""


@dataclass(frozen=True)
class Rows:
    """Rows of fragments, in no particular order; all arrays have shape (n,)."""

    keys: Keys
    succeeded: npt.NDArray[np.bool_]
    fragment: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int16]
    kinds: tuple[str | None, ...]

    def without(self, tombstones: dict[str, KeySet], names: Sequence[str]) -> Rows:
        """Return the rows that no tombstone removes.

        Args:
            tombstones: Removed keys, by fragment name.
            names: Fragment names, which `fragment` indexes.
        """
        keep = np.ones(len(self.keys), dtype=bool)
        numbers = {name: number for number, name in enumerate(names) if name in tombstones}
        suspects = np.flatnonzero(np.isin(self.fragment, list(numbers.values()))) if numbers else np.empty(0, np.int64)
        for name, number in numbers.items():
            rows = suspects[self.fragment[suspects] == number]
            keep[rows] = ~tombstones[name].contains(self.keys[rows])
        if keep.all():
            return self
        return Rows(self.keys[keep], self.succeeded[keep], self.fragment[keep], self.kind[keep], self.kinds)


class RowCollector:
    """Collects the rows of given fragments from index entries."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = pa.array(names, pa.string())
        self._found = np.zeros(len(names), dtype=bool)
        self._kinds: dict[str | None, int] = {None: 0}
        self._parts: list[tuple[Keys, npt.NDArray[np.bool_], npt.NDArray[np.int32], npt.NDArray[np.int16]]] = []

    @property
    def missing(self) -> list[str]:
        """Names of the fragments whose entries were not added yet."""
        missing: list[str] = self._names.filter(pa.array(~self._found)).to_pylist()
        return missing

    def add(self, entries: pa.Table) -> None:
        """Add the entries of missing fragments, and ignore all others."""
        at = pc.fill_null(pc.index_in(entries["fragment"], value_set=self._names), -1).to_numpy()
        numbers, first = np.unique(at, return_index=True)
        numbers, first = numbers[numbers >= 0], first[numbers >= 0]
        new = first[~self._found[numbers]]
        if not len(new):
            return
        entries = entries.take(np.sort(new)).combine_chunks() if len(new) < len(entries) else entries.combine_chunks()
        fragment = at[np.sort(new)].astype(np.int32)
        self._found[fragment] = True
        column = entries["keys"].chunk(0)
        counts = np.asarray(pc.binary_length(column)) // KEY_BYTES
        starts = np.cumsum(counts) - counts
        keys = _joined(column)
        succeeded, kind = np.ones(len(keys), dtype=bool), np.zeros(len(keys), dtype=np.int16)
        others = entries["others"].combine_chunks()
        described = pc.list_flatten(others)
        rows = starts[pc.list_parent_indices(others).to_numpy()] + pc.struct_field(described, "row").to_numpy()
        succeeded[rows] = pc.struct_field(described, "succeeded").to_numpy(zero_copy_only=False)
        kind[rows] = self._codes(pc.struct_field(described, "error_kind"))
        self._parts.append((keys, succeeded, np.repeat(fragment, counts), kind))

    def _codes(self, kinds: pa.Array) -> npt.NDArray[np.int16]:
        encoded = kinds.dictionary_encode("encode")
        codes = [self._kinds.setdefault(kind, len(self._kinds)) for kind in encoded.dictionary.to_pylist()]
        coded: npt.NDArray[np.int16] = np.array(codes, np.int16)[encoded.indices.to_numpy()]
        return coded

    def take_all(self) -> Rows:
        """Return the rows that were added, and remove them from this collector."""
        nothing = (NO_KEYS, np.empty(0, dtype=bool), np.empty(0, np.int32), np.empty(0, np.int16))
        columns = [list(parts) for parts in zip(nothing, *self._parts, strict=True)]
        # Free each column's parts as soon as they are joined: the keys of ten million rows take 160 MB.
        self._parts.clear()
        keys, succeeded, fragment, kind = (np.concatenate(columns.pop(0)) for _ in nothing)
        return Rows(keys, succeeded, fragment, kind, tuple(self._kinds))


def _joined(column: pa.LargeBinaryArray) -> Keys:
    """Return the keys of all values, one after the other."""
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]], dtype=f"V{KEY_BYTES}")


def index_entry(name: str, table: pa.Table) -> dict[str, Any]:
    """Return the index entry of a fragment; `table` has its ENTRY_COLUMNS."""
    succeeded = np.asarray(pc.equal(table["status"], SUCCEEDED), dtype=bool)
    plain = succeeded & np.asarray(pc.is_null(table["error_kind"]), dtype=bool)
    kinds = table["error_kind"]
    others = [
        {"row": int(row), "succeeded": bool(succeeded[row]), "error_kind": kinds[row].as_py()}
        for row in np.flatnonzero(~plain)
    ]
    return {"fragment": name, "keys": keys_from_hex(table["key"]).tobytes(), "others": others}
