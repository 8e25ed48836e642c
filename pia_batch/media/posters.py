"""Posters: the first frame of a stored animation as a JPEG, for pages that show a picture before they play."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from pia_batch.errors import EncodingError
from pia_batch.schema.columns import Row

QUALITY = 90
"""Quality of the JPEG, in Pillow's scale of 0 to 95."""


def make_poster(frame: npt.NDArray[np.uint8]) -> bytes:
    """Return a frame as a JPEG. The same frame and library version give the same bytes.

    Args:
        frame: First frame of the file, uint8, shape (H, W, 3), RGB, 0-255.
    """
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


def check_poster(data: bytes, row: Row) -> None:
    """Decode a poster and compare it with `width` and `height` of its animation's result.

    Raises:
        EncodingError: The poster does not decode, or has another size.
    """
    wanted = (row["width"], row["height"])
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            found = image.size
            if found == wanted:
                image.load()
    except Exception as err:  # Pillow raises almost any exception on corrupt bytes
        msg = f"not a complete JPEG: {type(err).__name__}: {err}"
        raise EncodingError(msg) from err
    if found != wanted:
        msg = f"another JPEG was found: width, height (got {found}, expected {wanted})"
        raise EncodingError(msg)
