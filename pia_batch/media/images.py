"""Image decoding: untrusted bytes to the RGB image that conditions an animation, and fitting to a size.

Can be called from many threads. The only global state that changes is Pillow's limit on pixels, while a large image is
decoded.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pia_batch.config import Fit
from pia_batch.errors import ImageUnreadableError, message_of
from pia_batch.media import bitmaps, image_headers, png_samples
from pia_batch.media.image_headers import ImageHeader, IncompleteError

_READERS = (PngImagePlugin, JpegImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin)
"""Pillow's readers in use, imported here so that no thread makes Pillow import all sixty of them at its first image.

The others (TIFF, EPS, PSD, FITS, ...) have a history of memory errors and of calling programs, and never run.
"""

LARGE_PIXELS = 10_000_000
"""Number of pixels above which images are decoded one at a time in each process.

Decoding takes at most 23 bytes a pixel, 5 for an upright JPEG (measured).
"""
_large = threading.Lock()
"""Held while a large image is decoded, and Pillow's own limit is lifted."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that undoes each EXIF orientation; 1 is upright."""

_16_BIT_COLOUR = (png_samples.RGB, png_samples.GREY_ALPHA, png_samples.RGBA)

# Pillow's warnings about broken metadata repeat text from untrusted files.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


SIZE_STEP = 64
"""Step of the sizes that `size: auto` chooses from, in pixels; PIA's UNet halves latents of 8 pixels three times."""


def decode(data: bytes, *, max_pixels: int, background: str) -> Image.Image:
    """Return the image as 8-bit RGB in sRGB, upright, without alpha.

    Of animated input only the first frame is decoded (of a PNG: the picture that other programs show). EXIF orientation
    is applied; an embedded ICC profile is converted to sRGB, unless it is broken, made for other channels, or longer
    than 4 MiB. 16-bit samples are scaled to 8 bits, never clipped.

    Args:
        data: Untrusted file: PNG, JPEG (MPO included), WebP, GIF or BMP.
        max_pixels: Largest width x height that is decoded, in pixels (`images.max_pixels`).
        background: Colour under transparent pixels, as `#rrggbb`.

    Raises:
        ImageUnreadableError: The file is empty, of another format, corrupt, truncated, has too many pixels or a side of
            more than 65,535, or is built to exhaust memory or time. Nothing else is raised.
    """
    if not data:
        msg = "the image is empty: 0 bytes"
        raise ImageUnreadableError(msg)
    try:
        header = image_headers.read(data)
        _check_pixels(header, max_pixels)
        with _alone() if header.width * header.height > LARGE_PIXELS else contextlib.nullcontext():
            return _decode(data, header, background)
    except ImageUnreadableError:
        raise
    except IncompleteError:
        msg = f"truncated image: the file ends before its pixels ({len(data)} bytes)"
        raise ImageUnreadableError(msg) from None
    except UnidentifiedImageError as err:  # whose message has an address in memory
        msg = "corrupt image: its header is damaged, or of a variant that is not read, such as JPEG with 12 bits"
        raise ImageUnreadableError(msg) from err
    except Exception as err:  # Pillow's readers raise almost anything on corrupt bytes, MemoryError included
        if isinstance(err, OSError) and "truncated" in str(err):
            msg = f"truncated image: its data ends before its pixels ({len(data)} bytes)"
            raise ImageUnreadableError(msg) from err
        if str(err).startswith("Unsupported BMP"):
            msg = f"a BMP of a variant that is not read ({message_of(err)}); save it as PNG"
            raise ImageUnreadableError(msg) from err
        msg = f"corrupt or truncated image: {type(err).__name__}: {message_of(err)}"
        raise ImageUnreadableError(msg) from err


def size_of(head: bytes) -> tuple[int, int] | None:
    """Return the upright width and height in pixels, as `decode` will give them, from an image's first bytes.

    Decodes nothing, and applies no limit on pixels, which `decode` does.

    Args:
        head: First bytes of the file. 64 KiB suffice for nearly every file, except a WebP, whose EXIF is at its end.

    Returns:
        Width and height; None if more bytes are needed, which for a whole file means that it is truncated.

    Raises:
        ImageUnreadableError: The format is not supported, the header is corrupt, or a side has no pixels or more than
            65,535.
    """
    try:
        return image_headers.read(head).upright
    except IncompleteError:
        return None


def fit(image: Image.Image, width: int, height: int, fit: Fit, background: str) -> Image.Image:
    """Return the image at exactly `width` x `height` pixels, scaled by Lanczos; the same object if it has that size.

    Args:
        image: RGB image of any size from 1 x 1.
        width: Width of the result, in pixels.
        height: Height of the result, in pixels.
        fit: `cover` fills and crops around the centre; `contain` pads; `stretch` distorts.
        background: Colour of the padding, as `#rrggbb`.
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
    """Return the size of a clip that keeps an image's shape: multiples of 64, so that clips have few different sizes.

    The longer side becomes `long_side`, or stays as it is if the image is smaller. Images are enlarged only by rounding
    and to at least 64. Follows the original's `preprocess_img`, with 64 instead of its 8.

    Args:
        width: Width of the upright image, in pixels.
        height: Height of the upright image, in pixels.
        long_side: Largest length of the longer side, in pixels, a multiple of 64.
    """
    scale = min(1.0, long_side / max(width, height))
    sides = (max(1, round(side * scale / SIZE_STEP)) * SIZE_STEP for side in (width, height))
    wide, high = sides
    return wide, high


def original_size(width: int, height: int, long_side: int) -> tuple[int, int]:
    """Return the size of a clip in the original: the image's own up to `long_side`, rounded down to 8 pixels.

    A side is at least 8 pixels.

    Source: open-mmlab/PIA `animatediff/utils/util.py` `preprocess_img`.
    """
    wide, high = (max(8, side // 8 * 8) for side in _shrunk(width, height, long_side))
    return wide, high


def shrink(image: Image.Image, long_side: int) -> Image.Image:
    """Return the image at `original_size`, resampled as the original does: twice, by Pillow's bicubic filter."""
    inner = image.resize(_shrunk(*image.size, long_side), Image.Resampling.BICUBIC)
    return inner.resize(original_size(*image.size, long_side), Image.Resampling.BICUBIC)


def _shrunk(width: int, height: int, long_side: int) -> tuple[int, int]:
    scale = min(1.0, long_side / max(width, height))
    return max(1, int(width * scale)), max(1, int(height * scale))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Decode one large image, without Pillow's limit: `max_pixels` has been checked, and may be higher."""
    with _large:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_pixels(header: ImageHeader, max_pixels: int) -> None:
    num_pixels = header.width * header.height
    if num_pixels > max_pixels:
        msg = (
            f"too many pixels (got {header.width} x {header.height} = {num_pixels}, expected at most {max_pixels}); "
            "raise images.max_pixels or store a smaller image"
        )
        raise ImageUnreadableError(msg)


def _decode(data: bytes, header: ImageHeader, background: str) -> Image.Image:
    colour, alpha, profile = _planes(image_headers.lean(data, header.format), header)
    flat = _to_srgb(colour, profile)
    if alpha is not None:
        flat = Image.composite(flat, Image.new("RGB", flat.size, background), alpha)
    method = _UPRIGHT.get(header.orientation)
    return flat if method is None else flat.transpose(method)


def _planes(data: bytes, header: ImageHeader) -> tuple[Image.Image, Image.Image | None, bytes | None]:
    """Return colour in mode L, RGB or CMYK, as the ICC profile describes it, alpha in mode L or None, and the profile.

    Pillow's own notion of transparency is used only where it is that of browsers and of the format's specification.
    """
    png: png_samples.Png | None = None
    if header.format == "BMP":
        planes = bitmaps.decode(data)
        if planes is not None:
            return *planes, None
    if header.format == "PNG":
        depth, colour_type = png_samples.layout(data)
        png = png_samples.parts(data)
        data = png.data
        if depth == 16 and colour_type in _16_BIT_COLOUR:  # noqa: PLR2004
            return *png_samples.decode_16_bit(png), png.profile
    with Image.open(io.BytesIO(data), formats=(header.format,)) as image:
        if image.size != (header.width, header.height):
            msg = (
                f"corrupt image: one header says {header.width} x {header.height} pixels, another "
                f"{image.width} x {image.height}"
            )
            raise ImageUnreadableError(msg)
        frame = image.tile[0].extents if header.format == "GIF" and image.tile else None
        num_colours = _num_colours(image)
        image.load()
        if png is not None:
            png_samples.refuse_missing_pixels(image, data)
        _refuse_missing_colours(image, frame, num_colours)
        profile = image.info.get("icc_profile") if png is None else png.profile
        if image.mode.startswith("I"):
            return *png_samples.decode_16_bit_grey(image, png), profile
        colour, alpha = _split_alpha(image) if png is None else _colour_of_png(image, png)
    if frame is not None and frame != (0, 0, *colour.size):
        alpha = _within(frame, colour.size, alpha)
    return colour, alpha, profile


def _num_colours(image: Image.Image) -> int:
    """Return the number of colours of a palette, as it is in the file before Pillow completes it."""
    palette = image.palette
    return 0 if palette is None else len(palette.palette) // len(palette.rawmode or palette.mode)


def _refuse_missing_colours(image: Image.Image, frame: tuple[int, int, int, int] | None, num_colours: int) -> None:
    """Refuse pixels, inside of a GIF's frame, whose palette has no colour for them.

    Pillow shows them black, and browsers disagree.
    """
    if image.mode != "P":
        return
    counts = (image if frame is None else image.crop(frame)).histogram()
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a GIF may name one beyond its palette
        counts[transparent] = 0
    num_missing = sum(counts[num_colours:])
    if num_missing:
        msg = (
            f"corrupt image: {num_missing} of its pixels have a colour that its palette of {num_colours} lacks; "
            "save it again"
        )
        raise ImageUnreadableError(msg)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    is_grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        full = image.convert("RGBA")
        return full.getchannel("R") if is_grey else full.convert("RGB"), full.getchannel("A")
    if image.format == "JPEG":
        # No copy: it would double the memory of a large photograph. Pillow has already undone Adobe's inverted inks.
        return image, None
    return image.convert("L" if is_grey else "RGB"), None


def _colour_of_png(image: Image.Image, png: png_samples.Png) -> tuple[Image.Image, Image.Image | None]:
    """Return colour, encoded as in sRGB or as the profile has it, and alpha of a PNG of up to 8 bits per sample."""
    depth, colour_type = png_samples.layout(png.data)
    if png.key is None:
        colour, alpha = _split_alpha(image)
    else:
        alpha = png_samples.alpha_of_key(image, png.key, depth)
        colour = image.convert("L" if colour_type == png_samples.GREY else "RGB")
    return colour if png.colours is None else png.colours.encoded(colour), alpha


def _within(frame: tuple[int, int, int, int], size: tuple[int, int], alpha: Image.Image | None) -> Image.Image:
    """Return alpha that is 0 outside of a GIF's first frame.

    Browsers leave the rest of the canvas transparent, whatever the background colour is (GIF89a would have that shown).
    """
    covered = Image.new("L", size, 0)
    covered.paste(255 if alpha is None else alpha.crop(frame), frame)
    return covered


_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}
"""Colour space in a profile's header by mode; lcms would take the pixels for those of another with as many channels."""


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and len(profile) <= image_headers.MAX_PROFILE_BYTES and profile[16:20] == _SPACES.get(colour.mode):
        try:
            converted = ImageCms.profileToProfile(
                colour, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except Exception:  # noqa: BLE001 - ignore a profile that lcms cannot use, as browsers do
            converted = None
        if converted is not None:
            return converted
    return colour if colour.mode == "RGB" else colour.convert("RGB")
