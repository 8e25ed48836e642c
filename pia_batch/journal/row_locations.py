"""Record of manifest files whose rows have their location as id: a changed file is refused, as rows may have moved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress

from pia_batch.errors import ManifestError, ObjectExistsError
from pia_batch.journal import layout
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri

_SHOWN_FILES = 3


class RowLocations:
    """Versions of the files of one manifest, as runs of one output have seen them first.

    Args:
        store: Store of the output.
        manifest: URI of the manifest.
    """

    def __init__(self, store: Store, manifest: str) -> None:
        self._store, self._manifest = store, redacted_uri(manifest)

    def check(self, files: Mapping[str, str]) -> None:
        """Check that no file has changed since a run of this output has recorded it.

        Args:
            files: Version of each file by its path below the manifest's folder.

        Raises:
            ManifestError: a file has changed; the message names it.
            StorageError: the output cannot be read.
        """
        recorded = self._recorded()
        changed = [path for path, version in files.items() if recorded.get(path, version) != version]
        if not changed:
            return
        names = ", ".join(changed[:_SHOWN_FILES]) + (", ..." if len(changed) > _SHOWN_FILES else "")
        msg = (
            f"request_id_from: location: {len(changed)} of the files of manifest {self._manifest} were replaced since "
            f"an earlier run: {names}; an id may now be that of another row. Restore the files and put new rows into "
            "new files, or choose another output, or request_id_from: content"
        )
        raise ManifestError(msg)

    def record(self, files: Mapping[str, str]) -> None:
        """Record the files that are not recorded yet, before anything about their rows is committed.

        Raises:
            StorageError: the output cannot be written.
        """
        recorded = self._recorded()
        new = {path: version for path, version in files.items() if path not in recorded}
        if not new:
            return
        content = json.dumps({"manifest": self._manifest, "files": new}, sort_keys=True).encode()
        name = layout.row_locations_name(hashlib.blake2b(content, digest_size=16).hexdigest())
        with suppress(ObjectExistsError):
            self._store.create(name, content)

    def _recorded(self) -> dict[str, str]:
        names = [found.name for found in self._store.list(layout.ROW_LOCATIONS)]
        entries = [json.loads(data) for data in self._store.read_all(names)]
        files = [entry["files"] for entry in entries if entry["manifest"] == self._manifest]
        return {path: version for each in files for path, version in each.items()}
