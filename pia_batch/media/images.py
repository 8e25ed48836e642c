"""Untrusted image bytes to the RGB image that conditions an animation: safe decoding, and fitting to a size.

Knows nothing of where bytes come from. Safe to call from many threads: nothing global changes after the import.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from pia_batch.config import Fit
from pia_batch.errors import ImageUnreadableError, message_of
from pia_batch.media import image_headers
from pia_batch.media.image_headers import Header, IncompleteError

_READERS = (PngImagePlugin, JpegImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin)
"""Imported here, so that no thread makes Pillow import its readers, let alone all sixty of them, at its first image.
The rest (TIFF, EPS, PSD, FITS, ...) has a history of memory errors and of calling programs, and never runs."""

LARGE_PIXELS = 10_000_000
"""Images of more are decoded one at a time in each process: at most 21 bytes a pixel while it lasts (measured)."""
_large = threading.Lock()

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it; 1 is upright."""

_TO_8_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)

# Our own cap is what counts; Pillow's warning at 89 million pixels would only be noise in the log of a run that
# allows more. Its error at 179 million stays. Its warnings of broken metadata repeat what strangers wrote.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


SIZE_STEP = 64
"""Pixels between the sizes that `size: auto` chooses from; PIA's UNet halves latents of 8 pixels three times."""


def decode(data: bytes, *, max_pixels: int, background: str) -> Image.Image:
    """The image as 8-bit RGB in sRGB, upright, without alpha.

    Animated input gives its first frame (of a PNG: the picture that other programs show), and no other is decoded.
    EXIF orientation is applied; an embedded ICC profile is converted to sRGB, unless it is broken, made for other
    channels, or longer than 4 MiB. 16-bit samples are scaled to 8 bits, never clipped.

    Args:
        data: an encoded PNG, JPEG (MPO included), WebP, GIF or BMP file, from anybody.
        max_pixels: width x height above which nothing is decoded; above 178,956,970 Pillow refuses by itself.
        background: `#rrggbb` under what is transparent.

    Raises:
        ImageUnreadableError: empty, another format, corrupt, truncated, too many pixels, a side of more than 65,535,
            or a file that is built to exhaust memory or time. Nothing else.
    """
    if not data:
        msg = "the image is empty: 0 bytes"
        raise ImageUnreadableError(msg)
    try:
        header = image_headers.read(data)
        _check_pixels(header, max_pixels)
        with _large if header.width * header.height > LARGE_PIXELS else contextlib.nullcontext():
            return _decode(data, header, background)
    except ImageUnreadableError:
        raise
    except IncompleteError:
        msg = f"truncated image: its {len(data)} bytes end before its pixels"
        raise ImageUnreadableError(msg) from None
    except Exception as err:  # Pillow's readers raise almost anything on corrupt bytes, MemoryError included
        msg = f"corrupt or truncated image: {type(err).__name__}: {message_of(err)}"
        raise ImageUnreadableError(msg) from err


def size_of(head: bytes) -> tuple[int, int] | None:
    """Upright width and height in pixels, as `decode` will give them, from an image's first bytes.

    Nothing is decoded, and no cap on pixels is applied: that is `decode`'s.

    Args:
        head: 64 KiB do for nearly every file but a WebP that has EXIF, which keeps it at its end.

    Returns:
        None if more bytes are needed; for a whole file that means that it is truncated.

    Raises:
        ImageUnreadableError: another format, a corrupt header, a side of no pixel or of more than 65,535.
    """
    try:
        return image_headers.read(head).upright
    except IncompleteError:
        return None


def fit(image: Image.Image, width: int, height: int, fit: Fit, background: str) -> Image.Image:
    """The image at exactly `width` x `height` pixels, by Lanczos; the very same object where it already is.

    Args:
        image: RGB, any size from 1 x 1.
        width: pixels.
        height: pixels.
        fit: cover fills and crops the overhang around the centre; contain pads; stretch distorts.
        background: `#rrggbb` of the padding.
    """
    size = (width, height)
    if image.size == size:
        return image
    if fit == "stretch":
        return image.resize(size, Image.Resampling.LANCZOS)
    if fit == "cover":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    # Not ImageOps.contain: it rounds the short side of a very long image to 0.
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    padded = Image.new("RGB", size, background)
    padded.paste(image.resize(inner, Image.Resampling.LANCZOS), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return padded


def bucket(width: int, height: int, long_side: int) -> tuple[int, int]:
    """The size of a clip that keeps an image's shape: multiples of 64, so that few sizes are drawn.

    The longer side becomes `long_side`, or stays as it is where the image is smaller: nothing is enlarged, but by
    rounding, and to 64 at least. After the original's `preprocess_img`, with 64 for its 8.

    Args:
        width: of the upright image, in pixels.
        height: as `width`.
        long_side: most pixels of the longer side, a multiple of 64.
    """
    scale = min(1.0, long_side / max(width, height))
    sides = (max(1, round(side * scale / SIZE_STEP)) * SIZE_STEP for side in (width, height))
    wide, high = sides
    return wide, high


def _check_pixels(header: Header, max_pixels: int) -> None:
    num_pixels = header.width * header.height
    if num_pixels > max_pixels:
        msg = f"{header.width} x {header.height} = {num_pixels} pixels; from 1 to {max_pixels} are accepted"
        raise ImageUnreadableError(msg)


def _decode(data: bytes, header: Header, background: str) -> Image.Image:
    lean = io.BytesIO(image_headers.lean(data, header.format))
    with Image.open(lean, formats=(header.format,)) as image:
        if image.size != (header.width, header.height):
            msg = f"corrupt image: it has {header.width} x {header.height} pixels, and {image.width} x {image.height}"
            raise ImageUnreadableError(msg)
        image.load()
        colour, alpha = _split_alpha(image)
        flat = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        flat = Image.composite(flat, Image.new("RGB", flat.size, background), alpha)
    method = _UPRIGHT.get(header.orientation)
    return flat if method is None else flat.transpose(method)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour in mode L, RGB or CMYK (what the ICC profile describes), and alpha in mode L where there is any."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    is_grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        full = image.convert("RGBA")
        return full.getchannel("R") if is_grey else full.convert("RGB"), full.getchannel("A")
    if image.mode == "CMYK":  # Adobe's inverted inks have been turned round by Pillow's JPEG reader
        return image.copy(), None
    return image.convert("L" if is_grey else "RGB"), None


def _from_16_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey, in Pillow's modes I;16 and I. Its own conversion clips at 255, which ruins the picture."""
    samples = np.asarray(image)
    if samples.dtype != np.uint16:
        samples = np.clip(samples, 0, 65535).astype(np.uint16)
    grey = Image.fromarray(_TO_8_BITS[samples])
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey, None
    return grey, Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8))


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and len(profile) <= image_headers.MAX_PROFILE_BYTES:
        try:
            converted = ImageCms.profileToProfile(
                colour, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except Exception:  # noqa: BLE001 - a profile that lcms cannot use is left out, as browsers do
            converted = None
        if converted is not None:
            return converted
    return colour.convert("RGB")
