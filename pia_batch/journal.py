"""What is finished: the commit log of an output, and the results that are published from it.

A *fragment* is one immutable Parquet file of result rows, named by its content and created by one conditional PUT after
the animations it speaks of are stored. A request is finished when a fragment says so, and not before. Nothing here is
renamed or deleted; two fragments may speak of the same key (a retry, a zombie), and then a success beats a failure, and
the smaller fragment name wins among equals.

A *withdrawal* takes rows back whose animation turned out to be lost or damaged. It names each by key and fragment, as
an observed-remove set does, and so it needs no clock: a row counts unless a withdrawal names it, in whatever order the
two are read, and what is committed of the key later is in another fragment and counts. A key of which every row is
withdrawn is unknown to the journal again, so the next run draws it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_batch.errors import AccountingError, ObjectExistsError, StorageError
from pia_batch.records import KEY_BYTES, RESULT, SUCCEEDED, Keys, KeySet, halves, keys_from_hex
from pia_batch.storage import Store

log = logging.getLogger(__name__)

FRAGMENTS = "_journal/"
WITHDRAWALS = "_withdrawn/"
RESULTS = "results/"
ANIMATIONS = "animations/"
LATEST = RESULTS + "LATEST.json"

PART_ROWS = 100_000
"""Rows of one published Parquet file."""

_WITHDRAWAL = pa.schema([("key", pa.string()), ("fragment", pa.string())])


def animation_name(key: str, extension: str) -> str:
    """Where the animation of a key lies; the key is hex, so no manifest can name a path."""
    return f"{ANIMATIONS}{key[:2]}/{key}.{extension}"


def name_in(animation_uri: str) -> str:
    """The object's name below whatever folder the output lies in today: it may have been moved as a whole."""
    return ANIMATIONS + "/".join(animation_uri.rsplit("/", 2)[-2:])


@dataclass(frozen=True)
class Outcomes:
    """The journal's verdict on every key it knows, one row per key."""

    keys: Keys
    succeeded: npt.NDArray[np.bool_]
    fragment: npt.NDArray[np.int32]
    """Index into `fragments` of the row that counts."""
    fragments: tuple[str, ...]
    error_kinds: npt.NDArray[np.object_]
    """`error_kind` of failures, None for successes."""
    withdrawn: Keys = field(default_factory=lambda: _NO_KEYS)
    """The key of every row that was taken back, sorted; a key stands there once for each of its rows."""

    def of(self, wanted: KeySet) -> Outcomes:
        """The part that speaks of `wanted`."""
        mine = wanted.contains(self.keys)
        return Outcomes(
            self.keys[mine],
            self.succeeded[mine],
            self.fragment[mine],
            self.fragments,
            self.error_kinds[mine],
            self.withdrawn[wanted.contains(self.withdrawn)],
        )

    def failed(self, kinds: frozenset[str] | None = None) -> npt.NDArray[np.bool_]:
        """Which of `keys` only failed, with one of these error kinds; None: with any. Bool, shape (n,)."""
        chosen = np.fromiter((kinds is None or kind in kinds for kind in self.error_kinds), bool, len(self.keys))
        failed: npt.NDArray[np.bool_] = ~self.succeeded & chosen
        return failed

    @property
    def due_again(self) -> int:
        """How many keys have nothing but rows that were taken back."""
        lost = KeySet.of(self.withdrawn)
        return len(lost) - int(lost.contains(self.keys).sum())

    @property
    def succeeded_keys(self) -> KeySet:
        """The keys with an animation."""
        return KeySet.of(self.keys[self.succeeded])

    @property
    def failures(self) -> Counter[str]:
        """How many keys only failed, by `error_kind`."""
        return Counter(self.error_kinds[~self.succeeded].tolist())


class Journal:
    """The commit log below an output. Safe to append to from many processes at once."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def append(self, results: pa.Table) -> str:
        """Commit result rows by one conditional PUT, and return the fragment's name.

        The name is a hash of keys and statuses, so a second commit of the same outcome finds it taken and is done;
        unless a row of it was taken back meanwhile, for then the same outcome is news and gets the next name.
        """
        order = pc.sort_indices(results["key"])
        outcome = json.dumps([results["key"].take(order).to_pylist(), results["status"].take(order).to_pylist()])
        data = to_parquet(results)
        for again in itertools.count():
            said = outcome if not again else f"{outcome} {again}"
            name = f"{FRAGMENTS}{hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}.parquet"
            try:
                self.store.create(name, data)
            except ObjectExistsError:
                if name in self._withdrawn():
                    continue
                log.info("fragment_exists name=%s rows=%d", name, len(results))
            return name
        raise AssertionError  # unreachable: the count has no end

    def withdraw(self, keys: Keys, seen: Outcomes) -> None:
        """Take back every row of `keys` that the fragments of `seen` have: these requests are due again.

        What other fragments say stays: whoever wrote it knows more than `seen` did.
        """
        lost = KeySet.of(keys)
        if not len(lost):
            return
        rows = []
        for name, table in zip(seen.fragments, self.read(list(seen.fragments), ["key"]), strict=True):
            here = table["key"].filter(pa.array(lost.contains(keys_from_hex(table["key"]))))
            rows += [{"key": key, "fragment": name} for key in here.to_pylist()]
        table = pa.Table.from_pylist(rows, _WITHDRAWAL).sort_by([("key", "ascending"), ("fragment", "ascending")])
        said = json.dumps(table.to_pydict(), sort_keys=True).encode()
        name = f"{WITHDRAWALS}{hashlib.blake2b(said, digest_size=16).hexdigest()}.parquet"
        try:
            self.store.create(name, to_parquet(table))
        except ObjectExistsError:
            log.info("withdrawal_exists name=%s rows=%d", name, len(table))

    def _withdrawn(self) -> dict[str, KeySet]:
        """What was taken back: keys by the fragment that had them."""
        names = sorted(item.name for item in self.store.list(WITHDRAWALS) if item.name.endswith(".parquet"))
        if not names:
            return {}
        # The same row may be named by two withdrawals, by a repair that was killed and one that followed.
        rows = pa.concat_tables(self.read(names, _WITHDRAWAL.names)).group_by(_WITHDRAWAL.names).aggregate([])
        by_fragment = rows.group_by("fragment").aggregate([("key", "list")])
        return {
            fragment.as_py(): KeySet.of(keys_from_hex(keys.values))
            for fragment, keys in zip(by_fragment["fragment"], by_fragment["key_list"], strict=True)
        }

    def fragments(self) -> list[str]:
        """The names of all fragments, sorted."""
        return sorted(item.name for item in self.store.list(FRAGMENTS) if item.name.endswith(".parquet"))

    def read(self, names: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Fragments in the order of `names`, `columns` only.

        Raises:
            StorageError: a fragment is damaged. It is never skipped: what it says would be computed again.
        """
        for name, data in zip(names, self.store.read_all(names), strict=True):
            try:
                table = pq.read_table(pa.BufferReader(data), columns=columns, page_checksum_verification=True)
                yield table.select(columns) if columns else table
            except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as err:
                msg = f"journal fragment {self.store.uri_of(name)} is damaged: {err}; restore it, or delete it"
                raise StorageError(msg) from None

    def outcomes(self) -> Outcomes:
        """What is finished, and how: reads three columns of every fragment."""
        names = self.fragments()
        withdrawn = self._withdrawn()
        keys, succeeded, origin, kinds = [], [], [], []
        for index, whole in enumerate(self.read(names, ["key", "status", "error_kind"])):
            taken_back = withdrawn.get(names[index])
            table = whole
            if taken_back is not None:
                table = whole.filter(pa.array(~taken_back.contains(keys_from_hex(whole["key"]))))
            keys.append(keys_from_hex(table["key"]))
            succeeded.append(np.asarray(pc.equal(table["status"], SUCCEEDED).combine_chunks(), dtype=bool))
            origin.append(np.full(len(table), index, dtype=np.int32))
            kinds.append(np.asarray(table["error_kind"].to_pylist(), dtype=object))
        if not keys:
            return Outcomes(_NO_KEYS, np.empty(0, dtype=bool), np.empty(0, dtype=np.int32), (), np.empty(0, object))
        all_keys, all_succeeded = np.concatenate(keys), np.concatenate(succeeded)
        all_origin, all_kinds = np.concatenate(origin), np.concatenate(kinds)
        high, low = halves(all_keys)
        order = np.lexsort((all_origin, ~all_succeeded, low, high))
        high, low = high[order], low[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        chosen = order[first]
        return Outcomes(
            all_keys[chosen],
            all_succeeded[chosen],
            all_origin[chosen],
            tuple(names),
            all_kinds[chosen],
            _all_keys(withdrawn.values()),
        )

    def winning_rows(self, outcomes: Outcomes) -> Iterator[pa.Table]:
        """The one result row that counts of every key in `outcomes`, fragment by fragment, all columns."""
        order = np.argsort(outcomes.fragment, kind="stable")
        indices, starts = np.unique(outcomes.fragment[order], return_index=True)
        names = [outcomes.fragments[index] for index in indices]
        groups = np.split(order, starts)[1:]
        for table, group in zip(self.read(names), groups, strict=True):
            rows = KeySet.of(outcomes.keys[group]).contains(keys_from_hex(table["key"]))  # a fragment has a key once
            yield table.filter(pa.array(rows))


@dataclass(frozen=True)
class Published:
    """A complete set of results."""

    run_id: str
    num_requests: int
    num_succeeded: int
    num_failed: int
    uri: str


def publish(
    journal: Journal, outcomes: Outcomes, wanted: KeySet, carried: pa.Schema, run_id: str, about: dict[str, Any]
) -> Published:
    """Write `results/<run_id>/`: one row for every wanted key, then `_SUCCESS.json`, then point LATEST.json at it.

    Doing it again with the same run id gives the same files.

    Args:
        journal: where the rows come from.
        outcomes: what the journal says now.
        wanted: the keys of the run's manifest.
        carried: the manifest's own columns, which follow those of RESULT.
        run_id: names the folder.
        about: what `_SUCCESS.json` tells besides, such as the manifest's URI.

    Raises:
        AccountingError: a request without a result, or a succeeded one whose animation is missing or has another size.
            Nothing is published then.
    """
    outcomes = outcomes.of(wanted)
    missing = len(wanted) - len(outcomes.keys)
    if missing:
        msg = f"{missing} of {len(wanted)} requests have no result yet; start the run again to finish them"
        raise AccountingError(msg)
    folder = f"{RESULTS}{run_id}/"
    schema = pa.schema([*RESULT, *carried])
    stored = {item.name: item.num_bytes for item in journal.store.list(ANIMATIONS)}
    counts = {"succeeded": 0, "failed": 0}
    parts = []
    for index, part in enumerate(_parts(journal.winning_rows(outcomes), schema)):
        _check_objects(part, stored)
        name = f"part-{index:05d}.parquet"
        journal.store.replace(folder + name, to_parquet(part))
        parts.append({"name": name, "rows": len(part)})
        for status in counts:
            counts[status] += pc.sum(pc.equal(part["status"], status)).as_py() or 0
    state = {"run_id": run_id, "requests": len(wanted), **counts, "parts": parts, "digest": digest_of(outcomes)}
    state |= {"published_at": datetime.now(UTC).isoformat(timespec="seconds"), **about}
    journal.store.replace(f"{folder}_SUCCESS.json", to_json(state))
    journal.store.replace(LATEST, to_json({"run_id": run_id, "digest": state["digest"]}))
    uri = journal.store.uri_of(folder.rstrip("/"))
    return Published(run_id, len(wanted), counts["succeeded"], counts["failed"], uri)


def is_published(store: Store, run_id: str) -> bool:
    """Whether the results of this run are complete."""
    try:
        store.read(f"{RESULTS}{run_id}/_SUCCESS.json")
    except FileNotFoundError:
        return False
    return True


def latest(store: Store) -> dict[str, Any] | None:
    """What `results/LATEST.json` says, or None before the first complete run."""
    try:
        return dict(json.loads(store.read(LATEST)))
    except FileNotFoundError:
        return None


def digest_of(outcomes: Outcomes) -> str:
    """32 hex digits over keys, statuses and what was taken back: where they are equal, nothing is new to publish."""
    digest = hashlib.blake2b(digest_size=16)
    for keys in (KeySet.of(outcomes.keys), outcomes.succeeded_keys):
        digest.update(keys.high.tobytes() + keys.low.tobytes() + b"|")
    digest.update(outcomes.withdrawn.tobytes())  # what was drawn once more has another row, with the same outcome
    return digest.hexdigest()


_NO_KEYS: Keys = np.empty(0, dtype=f"V{KEY_BYTES}")


def _all_keys(sets: Iterable[KeySet]) -> Keys:
    """The members of all sets, sorted; one that several have comes as often."""
    halved = [np.stack([keys.high, keys.low], axis=1) for keys in sets]
    pairs = np.concatenate([np.empty((0, 2), np.uint64), *halved])
    pairs = np.ascontiguousarray(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].astype(">u8"))
    return np.frombuffer(pairs.tobytes(), dtype=f"V{KEY_BYTES}")


def to_parquet(table: pa.Table) -> bytes:
    """A Parquet file in memory, its pages with checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def to_json(value: dict[str, Any]) -> bytes:
    """A JSON object for people and programs: indented, sorted, UTF-8."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _parts(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of PART_ROWS, sorted by request within each."""
    waiting: list[pa.Table] = []
    num_rows = 0
    for table in tables:
        waiting.append(_conform(table, schema))
        num_rows += len(table)
        while num_rows >= PART_ROWS:
            whole = pa.concat_tables(waiting)
            yield _sorted(whole.slice(0, PART_ROWS))
            waiting = [whole.slice(PART_ROWS)]
            num_rows -= PART_ROWS
    if num_rows:
        yield _sorted(pa.concat_tables(waiting))


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` in the columns of `schema`; an older fragment may lack carried columns, or have them in other types."""
    columns = []
    for wanted in schema:
        column = table[wanted.name] if wanted.name in table.column_names else pa.nulls(len(table), wanted.type)
        try:
            columns.append(column.cast(wanted.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            log.warning("carried_column_changed name=%s was=%s is=%s", wanted.name, column.type, wanted.type)
            columns.append(pa.nulls(len(table), wanted.type))
    return pa.table(columns, schema=schema)


def _sorted(table: pa.Table) -> pa.Table:
    return table.sort_by([("request_id", "ascending"), ("key", "ascending")])


def _check_objects(part: pa.Table, stored: dict[str, int]) -> None:
    succeeded = part.filter(pc.equal(part["status"], SUCCEEDED)).select(["animation_uri", "num_bytes", "request_id"])
    for uri, num_bytes, request_id in zip(*(column.to_pylist() for column in succeeded.columns), strict=True):
        size = stored.get(name_in(uri))
        if size != num_bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            msg = (
                f"animation {uri} of request {request_id!r} {found}, its result says {num_bytes} bytes; "
                "`pia-batch verify --repair` finds all such, and the run after it draws them again"
            )
            raise AccountingError(msg)
