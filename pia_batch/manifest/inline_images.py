"""Images written as text where a URI belongs: `data:` URIs and base64. They are refused by name, with the remedy."""

from __future__ import annotations

import base64
import re

import pyarrow as pa
import pyarrow.compute as pc

PATTERN = r"^\s*(?i:data):|^(?:iVBORw0KGgo|/9j/[247]|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{16,}$"
"""A `data:` URI, or base64 of a PNG, JPEG, GIF or WebP; for RE2 and for `re`."""

NOT_INLINE = {
    "image": "a URI or a path; decode the image itself from base64 into the column `image_bytes`, in Parquet",
    "ip_adapter_image": "a URI or a path; decode the image itself from base64, and store it as a file",
}
"""Allowed values of the columns of URIs, with the remedy."""

_LOOKED_AT = 16


def has_inline_images(column: pa.ChunkedArray) -> bool:
    """Return True if one of the first values of a column, texts or a dictionary of them, is an image as text."""
    first = column.slice(0, _LOOKED_AT).combine_chunks()
    if pa.types.is_dictionary(first.type):
        first = first.dictionary.take(first.indices)
    if not (pa.types.is_string(first.type) or pa.types.is_large_string(first.type)):
        return False
    return bool(pc.any(pc.match_substring_regex(first, PATTERN)).as_py())


def decoded(text: str) -> bytes | None:
    """Return the image in a `data:` URI or in base64; None if the text is neither.

    Raises:
        ValueError: It is, and cannot be decoded.
    """
    if not re.search(PATTERN, text):
        return None
    _, comma, data = text.partition(",") if text.lstrip()[:5].lower() == "data:" else ("", ",", text)
    if not comma or ("," in text and ";base64" not in text.partition(",")[0].lower()):
        raise ValueError("the data: URI is not base64; write data:image/png;base64,...")
    try:
        return base64.b64decode(re.sub(r"\s", "", data), validate=True)
    except ValueError as err:
        raise ValueError(f"the image is no base64: {err}; write it again") from None
