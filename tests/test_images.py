import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import ExifTags, Image, ImageCms

from pia_batch import images
from pia_batch.errors import ImageUnreadableError

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


def test_no_bytes_at_all_are_called_empty():
    with pytest.raises(ImageUnreadableError, match="empty"):
        decode(b"")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error_and_not_a_half_grey_picture(fmt, kept):
    data = saved(Image.open(PHOTOGRAPHS[0]).resize((96, 96)), fmt)

    with pytest.raises(ImageUnreadableError):
        decode(data[: int(len(data) * kept)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of broken metadata, and goes on
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "MPO"])
def test_damaged_files_give_an_image_or_an_unreadable_image_and_nothing_else(fmt):
    photograph = Image.open(PHOTOGRAPHS[0]).convert("RGB").resize((40, 40))
    several = {"save_all": True, "append_images": [photograph.rotate(90)]} if fmt not in {"BMP", "JPEG"} else {}
    exif = {"exif": oriented(6)} if fmt in ("PNG", "JPEG", "WEBP") else {}
    data = saved(photograph, fmt, **several, **exif)
    random = np.random.default_rng(len(fmt))
    outcomes = set()

    for _ in range(60):
        damaged = bytearray(data)
        for position in random.integers(0, min(len(data), int(random.choice([64, len(data)]))), random.integers(1, 9)):
            damaged[position] = random.integers(256)
        try:
            outcomes.add(decode(bytes(damaged), max_pixels=100_000).mode)
        except ImageUnreadableError:
            outcomes.add("unreadable")

    assert outcomes == {"RGB", "unreadable"}


@pytest.mark.parametrize("side", [9_487, 13_000, 14_000], ids=["90 MP", "169 MP", "196 MP"])
def test_a_small_file_of_too_many_pixels_is_refused_before_it_is_decoded(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, payload in [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")]:
        data += struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))

    with pytest.raises(ImageUnreadableError, match=r"pixels"):
        decode(data)


def test_the_pixel_cap_holds_to_the_pixel():
    data = saved(picture(size=(20, 10)), "PNG")

    assert decode(data, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageUnreadableError, match="20 x 10 = 200 pixels; from 1 to 199"):
        decode(data, max_pixels=199)


def test_a_compressed_text_bomb_is_unreadable():
    text = zlib.compress(b"\0" * 70_000_000)
    data = png(np.zeros((2, 2), np.uint8), 0, (b"zTXt", b"note\0\0" + text))

    with pytest.raises(ImageUnreadableError):
        decode(data)


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
    grey, alpha = images._from_16_bit(Image.fromarray(np.int32([[0, 257, 65535, 70000, -5]])))

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
