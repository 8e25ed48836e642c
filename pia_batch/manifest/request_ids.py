"""Request ids that are not a column of the manifest: made of a row's content, or of its place.

Ids must never change between releases: `tests/manifest/request_ids.json` has recorded ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.schema.columns import REQUEST
from pia_batch.schema.keys import json_digest, keys_to_hex

_IMAGE = ("image", "image_bytes", "image_sha256")


def content_ids(typed: Mapping[str, pa.Array], images: pa.Array) -> pa.Array:
    """Return the id of each valid request by its own content: 32 hexadecimal digits.

    Equal rows have equal ids, whatever file they are in and whatever defaults the config has. An id is the 128-bit
    BLAKE2b hash of the canonical JSON of `image`, `prompt` and every setting that the row gives; null, and a setting
    that a later release adds, is left out.

    Args:
        typed: Columns of REQUEST in their types, before the config's defaults are filled in.
        images: Identity of each image, as in content keys.
    """
    given = {name: typed[name] for name in REQUEST.names if name not in (*_IMAGE, "request_id", "prompt")}
    members = given | {"image": images, "prompt": typed["prompt"]}
    return keys_to_hex(json_digest(members, dict.fromkeys(given)))


def location_ids(location: str, first_row: int, num_rows: int) -> pa.Array:
    """Return the ids of neighbouring rows of a file: its path below the manifest's folder, `#`, and the row from 0."""
    numbers = pa.array(np.arange(first_row, first_row + num_rows)).cast(pa.string())
    return pc.binary_join_element_wise(pa.scalar(location), numbers, "#")
