"""Untrusted image bytes to the RGB image that conditions an animation: safe decoding, and fitting to a size.

Knows nothing of where bytes come from. Safe to call from many threads: nothing global changes after the import.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageOps,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pia_batch.config import Fit
from pia_batch.errors import ImageUnreadableError

_READERS = (PngImagePlugin, JpegImagePlugin, MpoImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin)
"""Imported here, so that no thread makes Pillow import its readers, let alone all sixty of them, at its first image."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What Pillow may try. The rest (TIFF, EPS, PSD, FITS, ...) has a history of memory errors and of calling programs.
A phone's MPO file is a JPEG whose first picture is the photograph: the JPEG reader takes it."""

_ACCEPTED = "PNG, JPEG, WebP, GIF or BMP"

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

# Our own cap is what counts; Pillow's warning at 89 million pixels would only be noise in the log of a run that
# allows more. Its error at 179 million stays.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, *, max_pixels: int, background: str) -> Image.Image:
    """The image as 8-bit RGB in sRGB, upright, without alpha.

    Animated input gives its first frame. EXIF orientation is applied; an embedded ICC profile is converted to sRGB,
    unless it is broken or made for other channels. 16-bit samples are scaled to 8 bits, never clipped.

    Args:
        data: an encoded PNG, JPEG (MPO included), WebP, GIF or BMP file.
        max_pixels: width x height above which nothing is decoded; above 178,956,970 Pillow refuses by itself.
        background: `#rrggbb` under what is transparent.

    Raises:
        ImageUnreadableError: empty, another format, corrupt, truncated, or too many pixels.
    """
    if not data:
        msg = "the image is empty: 0 bytes"
        raise ImageUnreadableError(msg)
    try:
        return _decode(data, max_pixels, background)
    except ImageUnreadableError:
        raise
    except UnidentifiedImageError:
        msg = f"not a readable {_ACCEPTED} image; its {len(data)} bytes begin with {data[:8]!r}"
        raise ImageUnreadableError(msg) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        msg = f"too many pixels: {err}"
        raise ImageUnreadableError(msg) from None
    except Exception as err:  # Pillow's readers raise almost anything on corrupt bytes
        msg = f"corrupt or truncated image: {type(err).__name__}: {err}"
        raise ImageUnreadableError(msg) from err


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


def _decode(data: bytes, max_pixels: int, background: str) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        num_pixels = image.width * image.height
        if not 0 < num_pixels <= max_pixels:
            msg = f"{image.width} x {image.height} = {num_pixels} pixels; from 1 to {max_pixels} are accepted"
            raise ImageUnreadableError(msg)
        image.load()
        orientation = _orientation(image)
        colour, alpha = _split_alpha(image)
        flat = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        flat = Image.composite(flat, Image.new("RGB", flat.size, background), alpha)
    method = _UPRIGHT.get(orientation)
    return flat if method is None else flat.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - a good picture with broken EXIF is shown as it is, as browsers do
        return 1
    return orientation if isinstance(orientation, int) else 1


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
    samples = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    grey = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey, None
    return grey, Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8))


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                colour, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except Exception:  # noqa: BLE001 - a profile that lcms cannot use is left out, as browsers do
            converted = None
        if converted is not None:
            return converted
    return colour.convert("RGB")
