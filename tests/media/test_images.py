import base64
import io
import os
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from pia_batch.errors import ImageUnreadableError
from pia_batch.media import image_headers, images, png_samples

PHOTOGRAPHS = sorted(
    path for path in (Path(skimage.__file__).parent / "data").iterdir() if path.suffix in (".png", ".jpg", ".gif")
)


def decode(data, background="#000000", max_pixels=40_000_000):
    return images.decode(data, max_pixels=max_pixels, background=background)


def pixels(image):
    return np.asarray(image).astype(int)


def saved(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def picture(mode="RGB", size=(24, 16)):
    """A smooth picture whose four quarters differ, so that turning and clipping show."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    samples = np.stack([x * 10, y * 15, x * 5 + y * 5], axis=-1).astype(np.uint8)
    return Image.fromarray(samples).convert(mode)


def png(samples, colour_type, *chunks):
    """A PNG of 8- or 16-bit samples, shape (H, W) or (H, W, C); `chunks` are (name, payload) before the pixels."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in samples.astype(samples.dtype.newbyteorder(">")))
    header = struct.pack(">IIBBBBB", width, height, samples.dtype.itemsize * 8, colour_type, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, payload in [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]:
        file += struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))
    return file


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_every_photograph_of_scikit_image_decodes_to_rgb_of_its_size(path):
    image = decode(path.read_bytes())

    with Image.open(path) as original:
        assert (image.mode, image.size) == ("RGB", original.size)
    assert pixels(image).std() > 5


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "WEBP"])
def test_a_lossless_file_gives_the_pixels_that_were_saved(fmt):
    options = {"lossless": True} if fmt == "WEBP" else {}

    assert np.array_equal(pixels(decode(saved(picture(), fmt, **options))), pixels(picture()))


@pytest.mark.parametrize("fmt", ["TIFF", "EPS", "PDF", "PPM", "ICO", "TGA", "PCX", "JPEG2000"])
def test_another_format_is_refused_with_the_list_of_what_is_accepted(fmt):
    with pytest.raises(ImageUnreadableError, match="PNG, JPEG, WebP, GIF or BMP"):
        decode(saved(picture(), fmt))


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>", b"SIMPLE  = T", b"8BPS\0\1", b"\0" * 64, b"x"])
def test_what_is_no_image_is_refused_and_its_first_bytes_are_named(data):
    with pytest.raises(ImageUnreadableError) as caught:
        decode(data)

    assert repr(data[:8]) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "got a HEIC image: 24 bytes"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "got an AVIF image: 24 bytes"),
        (b"\xff\x0a\xfa\x7f" + bytes(20), "got a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "got a JPEG XL image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20), "got a JPEG 2000 image"),
        (b"II*\0" + bytes(20), "got a TIFF image"),
        (b"qoif\0\0\0\1" + bytes(20), "got a QOI image"),
    ],
)
def test_a_picture_in_another_format_is_refused_by_the_name_of_its_format(data, words):
    with pytest.raises(ImageUnreadableError) as caught:
        decode(data)

    assert words in str(caught.value)
    assert str(caught.value).endswith("; save it as PNG")


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (b"<!DOCTYPE html><html>", "a server may have answered with a page or an error; look at it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run: git lfs pull"),
        (b"\x1f\x8b\x08\x00\xff\xff", "decompress it"),
        (b"P6\n64 64\n255\n\xff\xff", "correct the URI, or save the image as PNG"),
        (b'{"error": "no such key"}', "correct the URI, or save the image as PNG"),
    ],
)
def test_what_is_no_image_is_refused_with_a_remedy(data, remedy):
    with pytest.raises(ImageUnreadableError) as caught:
        decode(data)

    assert str(caught.value).endswith(f"; {remedy}")


@pytest.mark.parametrize(("header_bytes", "bits"), [(16, 24), (40, 2), (99, 24)])
def test_a_bmp_of_a_variant_that_is_not_read_is_not_called_corrupt(header_bytes, bits):
    header = struct.pack("<IiiHHIIiiII", header_bytes, 2, 1, 1, bits, 0, 8, 0, 0, 0, 0)
    header = struct.pack("<IIIHH", 16, 2, 1, 1, bits) if header_bytes == 16 else header.ljust(header_bytes, b"\0")
    start = 14 + len(header) + 16
    data = b"BM" + struct.pack("<IHHI", start + 8, 0, 0, start) + header + bytes(24)

    with pytest.raises(ImageUnreadableError, match=r"^a BMP of a variant that is not read \(.*\); save it as PNG$"):
        decode(data)


@pytest.mark.parametrize("prefix", [b"", b"data:image/png;base64,"])
def test_text_in_the_place_of_bytes_is_refused_with_the_remedy(prefix):
    with pytest.raises(ImageUnreadableError, match=r"got text such as base64: .*; decode it to bytes$"):
        decode(prefix + base64.b64encode(saved(picture(), "PNG")))


@pytest.mark.parametrize(("at", "value"), [(24, 3), (25, 5), (29, 0)], ids=["depth", "colour type", "checksum"])
def test_a_header_that_cannot_be_read_is_named_without_an_address_in_memory(at, value):
    data = bytearray(saved(picture(), "PNG"))
    data[at] = value if data[at] != value else value + 1

    with pytest.raises(ImageUnreadableError, match="its header is damaged, or of a variant that is not read"):
        decode(bytes(data))


def test_no_bytes_at_all_are_called_empty():
    with pytest.raises(ImageUnreadableError, match="empty"):
        decode(b"")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error_and_not_a_half_grey_picture(fmt, kept):
    data = saved(Image.open(PHOTOGRAPHS[0]).resize((96, 96)), fmt)

    with pytest.raises(ImageUnreadableError):
        decode(data[: int(len(data) * kept)])


@pytest.mark.parametrize("side", [9_487, 13_000, 14_000], ids=["90 MP", "169 MP", "196 MP"])
def test_a_small_file_of_too_many_pixels_is_refused_before_it_is_decoded(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, payload in [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")]:
        data += struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))

    with pytest.raises(ImageUnreadableError, match=r"pixels"):
        decode(data)


@pytest.mark.parametrize(
    "header",
    [
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 30_000, 30_000) + bytes(9) + b"\0\0\0\0IDAT" + bytes(99),
        b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 30_000, 30_000, 3) + bytes(99),
        b"RIFF\xff\0\0\0WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + (16_383).to_bytes(3, "little") * 2 + bytes(99),
        b"GIF89a"
        + struct.pack("<HHBBB", 30_000, 30_000, 0, 0, 0)
        + b","
        + struct.pack("<HHHH", 0, 0, 1, 1)
        + bytes(99),
        b"BM" + bytes(12) + struct.pack("<Iii", 40, 30_000, -30_000) + bytes(99),
    ],
    ids=["PNG", "JPEG", "WebP", "GIF", "BMP"],
)
def test_a_header_of_hundreds_of_megapixels_is_refused_in_every_format(header):
    with pytest.raises(ImageUnreadableError, match="expected at most 40000000"):
        decode(header)


def test_one_pixel_is_an_image():
    for fmt in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        assert decode(saved(Image.new("RGB", (1, 1), "#808080"), fmt)).size == (1, 1)


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536), (40_000_000, 1)])
def test_a_line_of_pixels_is_refused_for_what_resampling_it_would_take(size):
    data = png(np.zeros((1, 1), np.uint8), 0)
    data = data[:16] + struct.pack(">II", *size) + data[24:]

    with pytest.raises(ImageUnreadableError, match="expected sides of 1 to 65535 pixels"):
        decode(data)


def test_the_pixel_cap_holds_to_the_pixel():
    data = saved(picture(size=(20, 10)), "PNG")

    assert decode(data, max_pixels=200).size == (20, 10)
    assert decode(data, max_pixels=201).size == (20, 10)
    with pytest.raises(ImageUnreadableError, match="got 20 x 10 = 200, expected at most 199") as caught:
        decode(data, max_pixels=199)
    assert "raise images.max_pixels" in str(caught.value)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_no_limit_of_pillow_is_kept_instead_of_the_one_that_is_set(fmt, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    data = saved(Image.new("L", (4000, 2600)), fmt)

    assert decode(data, max_pixels=4000 * 2600).size == (4000, 2600)
    with pytest.raises(ImageUnreadableError, match=r"images\.max_pixels"):
        decode(data, max_pixels=4000 * 2600 - 1)

    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_gif_whose_picture_reaches_beyond_its_canvas_keeps_to_the_limit_that_is_set(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = bytearray(saved(Image.new("L", (4000, 2600)), "GIF"))
    data[6:10] = struct.pack("<HH", 10, 10)

    assert decode(bytes(data), max_pixels=4000 * 2600).size == (4000, 2600)


def test_pillows_limit_is_back_after_a_large_image_that_is_corrupt():
    limit = Image.MAX_IMAGE_PIXELS
    data = saved(Image.new("L", (4000, 2600)), "PNG")

    with pytest.raises(ImageUnreadableError):
        decode(data[: len(data) // 2])

    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.slow
def test_a_photograph_of_200_megapixels_takes_what_decoding_takes():
    code = """
import io, resource, sys
from PIL import Image
from pia_batch.media import images
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = images.decode(data, max_pixels=250_000_000, background="#000000")
print(*image.size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (image.width * image.height))
"""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.new("RGB", (16320, 12240), "#c86432").save(file, "JPEG")
        file.flush()
        done = subprocess.run([sys.executable, "-c", code, file.name], capture_output=True, text=True, check=True)

    width, height, bytes_a_pixel = done.stdout.split()
    assert (width, height) == ("16320", "12240")
    assert float(bytes_a_pixel) < 5  # Pillow stores RGB in four bytes


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
def test_megabytes_that_a_chunk_unpacks_to_are_neither_kept_nor_a_reason_to_refuse(chunk):
    packed = zlib.compress(bytes(200_000_000), 9)
    payload = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[chunk] + packed
    data = png(np.full((2, 2), 7, np.uint8), 0, (chunk, payload))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert (pixels(decode(data)) == 7).all()

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def padded_profile(num_bytes):
    """A profile whose red is sRGB's green, of any length."""
    profile = swapped_profile()
    return struct.pack(">I", num_bytes) + profile[4:].ljust(num_bytes - 4, b"\0")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP"])
def test_a_profile_is_used_up_to_its_limit(fmt):
    red = Image.new("RGB", (8, 8), "#ff0000")
    for length, shown in [
        (2**21, (0, 255, 0)),
        (image_headers.MAX_PROFILE_BYTES - 1, (0, 255, 0)),
        (image_headers.MAX_PROFILE_BYTES, (0, 255, 0)),
        (image_headers.MAX_PROFILE_BYTES + 1, (255, 0, 0)),
    ]:
        decoded = decode(saved(red, fmt, icc_profile=padded_profile(length)))
        assert np.abs(pixels(decoded) - shown).max() <= 4, length


def jpeg_with(before=b"", after=b"", **options):
    """A JPEG with `before` in front of its segments and `after` behind its picture."""
    data = saved(picture(), "JPEG", **options)
    return data[:2] + before + data[2:] + after


def last_scan(data):
    return data[data.rfind(b"\xff\xda") : -2]


def repeated(name, count):
    """A file that an honest encoder could not have made: `count` parts that cost a decoder time."""
    progressive = saved(Image.new("L", (64, 64)), "JPEG", progressive=True)
    grey = png(np.zeros((2, 2), np.uint8), 0)
    gif = saved(picture(), "GIF")
    at = 13 + 3 * 256  # behind the screen and its palette
    return {
        "scans": progressive[:-2] + last_scan(progressive) * count + b"\xff\xd9",
        "comments": jpeg_with(b"\xff\xfe\0\2" * count),
        "padding": jpeg_with(b"\xff" * count),
        "chunks": grey[:33] + (b"\0\0\0\0prVt" + struct.pack(">I", zlib.crc32(b"prVt"))) * count + grey[33:],
        "pixels": grey[:33] + (b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))) * count + grey[33:],
        "blocks": gif[:at] + b"!\xfe\1a\0" * count + gif[at:],
    }[name]


@pytest.mark.parametrize("name", ["scans", "comments", "padding", "chunks", "pixels", "blocks"])
def test_a_file_of_too_many_parts_is_refused_in_no_time_and_one_of_some_is_an_image(name):
    started = time.process_time()

    assert decode(repeated(name, 50)).mode == "RGB"
    with pytest.raises(ImageUnreadableError, match="more than"):
        decode(repeated(name, 300_000))

    assert time.process_time() - started < 2


def test_the_number_of_parts_is_kept_to_its_limit():
    progressive = saved(Image.new("L", (64, 64)), "JPEG", progressive=True)
    to_scans = image_headers.MAX_SCANS - progressive.count(b"\xff\xda")
    before_scan = len(list(image_headers._jpeg_segments(jpeg_with()))) - 1
    limits = {
        "scans": to_scans,
        "comments": image_headers.MAX_PARTS - before_scan,
        "chunks": image_headers.MAX_PARTS - 1,  # besides IHDR
        "pixels": image_headers.MAX_CHUNKS - 3,  # besides IHDR, the pixels and IEND
        "blocks": image_headers.MAX_PARTS // 2 - saved(picture(), "GIF").count(b"!\xf9"),  # an extension, a sub-block
    }
    for name, limit in limits.items():
        for count in (limit - 1, limit):
            assert decode(repeated(name, count)).mode == "RGB", name
        with pytest.raises(ImageUnreadableError, match="more than"):
            decode(repeated(name, limit + 1))


@pytest.mark.parametrize("size", [(65_535, 1), (1, 65_535), (65_534, 1)])
def test_the_longest_side_is_an_image(size):
    assert decode(png(np.zeros(size[::-1], np.uint8), 0)).size == size


def test_exif_is_read_no_further_than_its_orientation_and_without_a_word(recwarn):
    entries = b"".join(struct.pack(">HHLL", 0x9000 + k, 7, 60_000, 8) for k in range(5000))
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">H", 5001) + struct.pack(">HHLHH", 0x0112, 3, 1, 6, 0) + entries
    segments = b""
    for start in range(0, len(tiff), 60_000):
        payload = b"Exif\0\0" + tiff[start : start + 60_000]
        segments += b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload

    assert decode(jpeg_with(segments)).size == picture().size[::-1]
    assert not recwarn.list


def test_what_follows_a_jpegs_picture_is_left_alone():
    clip = np.random.default_rng(0).bytes(500_000)  # a phone's "live photo"; some of it looks like scans

    assert np.array_equal(pixels(decode(jpeg_with(after=clip))), pixels(decode(jpeg_with())))


def test_an_enormous_profile_is_left_out():
    parts = [b"ICC_PROFILE\0" + bytes([k + 1, 100]) + bytes(65_000) for k in range(100)]
    segments = b"".join(b"\xff\xe2" + struct.pack(">H", len(part) + 2) + part for part in parts)

    assert np.array_equal(pixels(decode(jpeg_with(segments))), pixels(decode(jpeg_with())))


def test_readers_of_other_formats_are_never_even_imported():
    code = """
import sys
from pia_batch.media import image_headers, images, png_samples
from pia_batch.errors import ImageUnreadableError
starts = [b"%!PS-Adobe-3.0 EPSF", b"8BPS\\0\\1", b"SIMPLE  =", b"II*\\0", b"MM\\0*", b"\\0\\0\\1\\0", b"P6 1 1 255 a"]
for data in starts:
    for padded in (data, data + bytes(999)):
        try:
            images.decode(padded, max_pixels=100, background="#000000")
        except ImageUnreadableError:
            continue
        sys.exit(f"decoded {data}")
print(sorted(name for name in sys.modules if name.startswith("PIL.") and name.endswith("ImagePlugin")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    names = ("Bmp", "Gif", "Jpeg", "Png", "WebP")
    assert done.stdout.strip() == str([f"PIL.{name}ImagePlugin" for name in names])


def test_large_images_are_decoded_one_at_a_time():
    data = saved(Image.new("1", (4000, 2600)), "PNG")  # 10.4 million pixels
    done = []

    with images._large:
        thread = threading.Thread(target=lambda: done.append(decode(data).size))
        thread.start()
        thread.join(0.5)
        assert done == []
        assert decode(saved(picture(), "PNG")).size == picture().size  # a small one does not wait
    thread.join()

    assert done == [(4000, 2600)]


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_animated_input_gives_its_first_frame(fmt):
    first, second = Image.new("RGB", (16, 16), "#ff0000"), Image.new("RGB", (16, 16), "#0000ff")

    image = decode(saved(first, fmt, save_all=True, append_images=[second], duration=100))

    assert np.abs(pixels(image) - (255, 0, 0)).max() <= 3


def test_a_phones_mpo_file_gives_its_first_picture():
    data = saved(Image.new("RGB", (16, 16), "#ff0000"), "MPO", save_all=True, append_images=[picture(size=(16, 16))])

    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(pixels(decode(data)) - (255, 0, 0)).max() <= 3


def oriented(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(fmt, orientation):
    upright = pixels(picture())
    # How a camera that was held so stores the scene: the inverse of what the number asks a viewer to do.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(fmt, {})

    image = decode(saved(Image.fromarray(stored.astype(np.uint8)), fmt, exif=oriented(orientation), **options))

    assert image.size == picture().size
    assert np.abs(pixels(image) - upright).max() <= (6 if fmt == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0" + b"MM\0*" * 9])
def test_broken_exif_leaves_the_picture_as_it_is(exif):
    assert np.abs(pixels(decode(saved(picture(), "JPEG", quality=100, exif=exif))) - pixels(picture())).max() <= 20


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_opaque_modes_keep_their_colours(mode):
    source = picture(mode)

    assert np.array_equal(pixels(decode(saved(source, "PNG"))), pixels(source.convert("RGB")))


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_transparent_pixels_show_the_background_and_not_what_hides_below(fmt):
    image = picture("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0] * 8 + [128] * 8 + [255] * 8]), 16, axis=0)))
    options = {"lossless": True, "exact": True} if fmt == "WEBP" else {}

    decoded = pixels(decode(saved(image, fmt, **options), background="#00ff80"))

    assert (decoded[:, :8] == (0, 255, 128)).all()
    assert np.abs(decoded[:, 8:16] - (pixels(picture())[:, 8:16] * 128 + np.array([0, 255, 128]) * 127) / 255).max() < 2
    assert np.array_equal(decoded[:, 16:], pixels(picture())[:, 16:])


def test_grey_with_alpha_is_composited():
    image = Image.new("LA", (4, 4), (200, 0))
    image.putpixel((0, 0), (200, 255))

    decoded = pixels(decode(saved(image, "PNG"), background="#102030"))

    assert decoded[0, 0].tolist() == [200, 200, 200]
    assert decoded[1, 1].tolist() == [16, 32, 48]


@pytest.mark.parametrize(("fmt", "transparency"), [("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0, 255]))])
def test_a_palette_with_transparency_is_composited(fmt, transparency):
    image = Image.fromarray(np.uint8([[0, 1, 2]] * 3))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])

    decoded = pixels(decode(saved(image, fmt, transparency=transparency), background="#808080"))

    assert decoded[0].tolist() == [[255, 0, 0], [128, 128, 128], [0, 0, 255]]


def test_16_bit_grey_is_scaled_and_not_clipped():
    samples = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    samples[-1, -1] = 65535

    decoded = pixels(decode(png(samples, 0)))

    assert np.array_equal(decoded[..., 0], np.round(samples / 257))
    assert len(np.unique(decoded)) == 256


def test_the_colour_key_of_16_bit_grey_is_transparent():
    decoded = pixels(decode(png(np.uint16([[1000, 1001]]), 0, (b"tRNS", struct.pack(">H", 1000))), "#ff0000"))

    assert decoded[0].tolist() == [[255, 0, 0], [4, 4, 4]]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])
def test_16_bit_colour_is_scaled_to_the_level(colour_type, channels):
    samples = np.random.default_rng(0).integers(0, 65536, (8, 8, channels), dtype=np.uint16)
    if channels % 2 == 0:
        samples[..., -1] = 65535

    decoded = pixels(decode(png(samples, colour_type)))

    colours = samples[..., :3] if channels > 2 else samples[..., :1]
    assert np.abs(decoded - colours / 257).max() <= 1


def test_32_bit_samples_of_a_16_bit_picture_are_scaled_too():
    grey, alpha = png_samples.decode_16_bit_grey(Image.fromarray(np.int32([[0, 257, 65535, 70000, -5]])), None)

    assert alpha is None
    assert pixels(grey).tolist() == [[0, 1, 255, 255, 0]]


def test_an_adobe_cmyk_jpeg_keeps_its_colours():
    data = saved(Image.new("RGB", (16, 16), "#c81e78").convert("CMYK"), "JPEG", quality=95)

    assert b"Adobe" in data
    assert np.abs(pixels(decode(data)) - (200, 30, 120)).max() <= 4


def swapped_profile():
    """A valid ICC profile whose red is sRGB's green, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"?XYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"?XYZ", b"gXYZ", 1)


def test_an_icc_profile_is_converted_to_srgb():
    decoded = decode(saved(Image.new("RGB", (8, 8), "#ff0000"), "PNG", icc_profile=swapped_profile()))

    assert np.abs(pixels(decoded) - (0, 255, 0)).max() <= 3


def test_an_icc_profile_does_not_lose_alpha():
    decoded = decode(saved(Image.new("RGBA", (8, 8), "#ff000000"), "PNG", icc_profile=swapped_profile()), "#123456")

    assert (pixels(decoded) == (0x12, 0x34, 0x56)).all()


def test_an_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    assert np.array_equal(pixels(decode(saved(picture(), "PNG", icc_profile=profile))), pixels(picture()))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("profile", [b"not a profile", swapped_profile()[:200]], ids=["garbage", "truncated"])
def test_a_broken_icc_profile_is_ignored(mode, profile):
    with_profile = decode(saved(picture(mode), "JPEG", icc_profile=profile))

    assert np.array_equal(pixels(with_profile), pixels(decode(saved(picture(mode), "JPEG"))))


def test_a_profile_made_for_other_channels_is_ignored():
    data = saved(picture("L"), "PNG", icc_profile=swapped_profile())

    assert np.array_equal(pixels(decode(data)), pixels(picture("L").convert("RGB")))


@pytest.mark.parametrize("space", ["LAB", "XYZ"])
def test_a_profile_of_another_space_with_as_many_channels_is_ignored(space):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()

    assert np.array_equal(pixels(decode(saved(picture(), "PNG", icc_profile=profile))), pixels(picture()))


def test_many_threads_decode_at_once():
    photographs = [path.read_bytes() for path in PHOTOGRAPHS[:6]] * 4
    expected = [decode(data).tobytes() for data in photographs]
    found = [b""] * len(photographs)

    def work(number):
        found[number] = decode(photographs[number]).tobytes()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(photographs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == expected


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 5), (65, 64), (512, 500)])
def test_an_image_of_any_shape_is_fitted_to_the_exact_size(fit, size):
    for target in [(64, 64), (96, 40), (8, 8)]:
        image = images.fit(Image.new("RGB", size, "#ff8000"), *target, fit, "#000000")

        assert (image.size, image.mode) == (target, "RGB")
        if fit != "contain":
            assert (pixels(image) == (255, 128, 0)).all()


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_an_image_that_has_the_size_comes_back_unchanged(fit):
    image = picture()

    assert images.fit(image, *image.size, fit, "#ffffff") is image


def test_cover_crops_both_sides_alike():
    image = Image.new("RGB", (300, 100), "#ff0000")
    image.paste("#00ff00", (100, 0, 200, 100))

    assert (pixels(images.fit(image, 50, 50, "cover", "#000000"))[:, 3:-3] == (0, 255, 0)).all()


def test_contain_pads_both_sides_alike_with_the_background():
    fitted = pixels(images.fit(Image.new("RGB", (200, 100), "#ff0000"), 64, 64, "contain", "#0000ff"))

    assert (fitted[:16] == (0, 0, 255)).all()
    assert (fitted[16:48] == (255, 0, 0)).all()
    assert (fitted[48:] == (0, 0, 255)).all()


def test_stretch_keeps_the_whole_picture():
    image = Image.new("RGB", (300, 100), "#ff0000")
    image.paste("#00ff00", (150, 0, 300, 100))
    fitted = pixels(images.fit(image, 64, 64, "stretch", "#000000"))

    assert (fitted[:, :28] == (255, 0, 0)).all()
    assert (fitted[:, 36:] == (0, 255, 0)).all()


@pytest.mark.parametrize(
    ("size", "long_side", "found"),
    [
        ((512, 512), 512, (512, 512)),
        ((1920, 1080), 512, (512, 256)),
        ((1080, 1920), 512, (256, 512)),
        ((1920, 1080), 1024, (1024, 576)),
        ((300, 200), 512, (320, 192)),
        ((1, 1), 512, (64, 64)),
        ((5000, 10), 512, (512, 64)),
    ],
)
def test_an_automatic_size_keeps_the_shape_in_multiples_of_64(
    size: tuple[int, int], long_side: int, found: tuple[int, int]
) -> None:
    assert images.bucket(*size, long_side) == found


@given(st.integers(1, 30_000), st.integers(1, 30_000), st.integers(1, 64))
def test_an_automatic_size_is_never_larger_than_asked_and_near_the_images_shape(
    width: int, height: int, blocks: int
) -> None:
    wide, high = images.bucket(width, height, 64 * blocks)

    assert max(wide, high) <= 64 * blocks
    assert wide % 64 == high % 64 == 0
    scale = min(1, 64 * blocks / max(width, height))
    assert abs(wide - max(64, width * scale)) <= 32
    assert abs(high - max(64, height * scale)) <= 32


# --- the size, from the first bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_the_size_of_a_photograph_is_known_from_its_first_bytes(path):
    data = path.read_bytes()

    assert images.size_of(data[: 64 * 1024]) == images.size_of(data) == decode(data).size


def every_kind():
    """Small files of every format with and without what may stand before the pixels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for fmt in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "MPO"):
        yield fmt, saved(picture(), fmt)
        if fmt in ("GIF", "BMP", "MPO"):
            continue
        for orientation in range(1, 9):
            yield f"{fmt} {orientation}", saved(picture(), fmt, exif=oriented(orientation), icc_profile=profile)
    for fmt in ("GIF", "WEBP", "PNG"):
        several = {"save_all": True, "append_images": [picture().rotate(90)]}
        yield f"{fmt} animated", saved(picture(), fmt, **several)
    yield "GIF with a comment", saved(picture(), "GIF", comment=b"x" * 1000)
    yield "WEBP lossless", saved(picture("RGBA"), "WEBP", lossless=True)
    yield "WEBP with alpha", saved(picture("RGBA"), "WEBP")
    yield "JPEG progressive", saved(picture(), "JPEG", progressive=True)
    yield "JPEG CMYK", saved(picture("CMYK"), "JPEG")
    yield "PNG palette", saved(picture("P"), "PNG")


KINDS = dict(every_kind())


@pytest.mark.parametrize("kind", KINDS)
def test_every_beginning_of_a_file_gives_its_upright_size_or_asks_for_more(kind):
    data = KINDS[kind]
    size = decode(data).size
    expected = picture().size if kind[-1] not in "5678" else picture().size[::-1]

    found = [images.size_of(data[:length]) for length in range(len(data) + 1)]

    assert size == expected
    assert set(found) == {None, size}
    first = found.index(size)
    assert found[first:] == [size] * (len(data) + 1 - first)
    assert images.size_of(data + b"and more") == size


@pytest.mark.parametrize("data", [b"<!DOCTYPE html>", b"II*\0", b"BX", b"RIFF\0\0\0\0WAVE", b"x", b"GIF88a"])
def test_what_is_no_image_has_no_size(data):
    with pytest.raises(ImageUnreadableError, match="PNG, JPEG, WebP, GIF or BMP"):
        images.size_of(data)


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (b"II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 6, 0), True),
        (b"MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, 0x0112, 4, 1, 6), True),
        (b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 8, 0), True),
        (b"II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 9, 0), False),
        (b"II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 0x0112, 2, 1, 6, 0), False),
        (b"II*\0\xff\xff\xff\xff", False),
        (b"II*\0\x08\0\0\0\xff\xff", False),
        (b"JJ*\0", False),
        (b"", False),
    ],
)
def test_orientation_is_read_from_any_exif_and_broken_exif_is_none(exif, turned):
    data = png(np.zeros((2, 3), np.uint8), 0, (b"eXIf", exif))

    assert images.size_of(data) == decode(data).size == ((2, 3) if turned else (3, 2))


# --- any bytes at all ------------------------------------------------------------------------------------------------

FUZZ = int(os.environ.get("PIA_BATCH_FUZZ", "600"))
"""Damaged files that the test below makes; `PIA_BATCH_FUZZ=5000 pytest tests/media/test_images.py -k any_damage`."""


def damaged(random, files):
    """One of `files` after byte flips, cuts, splices, repeats and extreme numbers."""
    data = bytearray(files[random.integers(len(files))])
    for _ in range(random.integers(1, 4)):
        if len(data) < 2:
            break
        # Half of the time near the beginning, where the structure is.
        reach = len(data) if random.random() < 0.5 else min(len(data), 80)
        at, kind = int(random.integers(reach)), random.integers(7)
        if kind == 0:
            data[at] ^= 1 << random.integers(8)
        elif kind == 1:
            data[at] = random.integers(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + int(random.integers(1, 40))]
        elif kind == 4:
            other = files[random.integers(len(files))]
            start = int(random.integers(len(other)))
            data[at : at + int(random.integers(60))] = other[start : start + int(random.integers(1, 200))]
        elif kind == 5:
            data[at:at] = data[at : at + int(random.integers(1, 60))] * int(random.integers(1, 50))
        else:
            number = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)[random.integers(9)]
            data[at : at + 4] = struct.pack(("<I", ">I")[random.integers(2)], number)
    return bytes(data)


def test_any_damage_gives_an_image_or_an_unreadable_image_and_nothing_else():
    files = [*KINDS.values(), png(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999, 0)]
    random = np.random.default_rng(20261123)
    outcomes = {"RGB": 0, "unreadable": 0}
    said = []

    for _ in range(FUZZ):
        data = damaged(random, files)
        started = time.process_time()
        try:
            image = decode(data, max_pixels=100_000)
        except ImageUnreadableError as err:
            outcomes["unreadable"] += 1
            said.append(str(err))
        else:
            outcomes[image.mode] += 1
            assert images.size_of(data) == image.size
            assert image.width * image.height <= 100_000
            assert len(image.tobytes()) == 3 * image.width * image.height
        try:
            images.size_of(data)
        except ImageUnreadableError as err:
            said.append(str(err))
        assert time.process_time() - started < 2

    assert min(outcomes.values()) > FUZZ / 20
    assert sum(outcomes.values()) == FUZZ
    assert all(text.isprintable() and len(text) < 500 for text in said)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((512, 512), (512, 512)), ((1024, 683), (512, 336)), ((300, 451), (296, 448)), ((2000, 30), (512, 8))],
)
def test_the_original_shrinks_to_512_and_rounds_down_to_8(size, wanted):
    """The recipe of `preprocess_img`, step by step."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    scale = min(1, 512 / max(size))
    first = image.resize((int(size[0] * scale), int(size[1] * scale)))
    truth = first.resize(wanted)

    assert images.original_size(*size, 512) == wanted
    assert np.array_equal(np.asarray(images.shrink(image, 512)), np.asarray(truth))
