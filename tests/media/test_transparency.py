"""Transparency of every accepted format, depth and mode, in files that are written here byte by byte.

Expected colours are computed from the formats' rules, never by Pillow: PNG specification (third edition), GIF89a,
Microsoft's BITMAPINFOHEADER, BITMAPV4HEADER and BITMAPV5HEADER, RFC 9649 (WebP); where these leave it open, browsers.
"""

import io
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pia_batch.errors import ImageUnreadableError
from pia_batch.media import bitmaps, images
from pia_batch.media.image_headers import IncompleteError

BACKGROUND = (16, 32, 48)
CASES = {}
"""Name of a case: its file, and its rows of pixels as (red, green, blue, alpha), 0 to 255."""

CLEAR = (0, 0, 0, 0)


def rendered(data, background="#102030"):
    return np.asarray(images.decode(data, max_pixels=10_000, background=background)).astype(int).tolist()


def over(pixel, background=BACKGROUND):
    """What a viewer shows of a pixel over a background."""
    *colour, alpha = pixel
    return [(c * alpha + b * (255 - alpha)) / 255 for c, b in zip(colour, background, strict=True)]


# --- PNG -------------------------------------------------------------------------------------------------------------

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""First column, first row, step of columns and step of rows of each pass."""


def png(rows, depth, colour_type, *chunks, interlaced=False):
    """A PNG of rows of pixels, each a tuple of samples; `chunks` are (name, payload) before the pixels."""

    def packed(pixels):
        bits = "".join(f"{sample:0{depth}b}" for pixel in pixels for sample in pixel)
        bits += "0" * (-len(bits) % 8)
        return b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")  # filter type 0

    height, width = len(rows), len(rows[0])
    if interlaced:
        passes = [[row[x::dx] for row in rows[y::dy]] for x, y, dx, dy in ADAM7]
        stored = b"".join(packed(row) for part in passes for row in part if row)
    else:
        stored = b"".join(packed(row) for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    file = b"\x89PNG\r\n\x1a\n"
    for name, payload in [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(stored)), (b"IEND", b"")]:
        file += struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))
    return file


def trns(*samples):
    return b"tRNS", struct.pack(f">{len(samples)}H", *samples)


def grey_pixels(rows, depth, key):
    largest = 2**depth - 1
    scale = [[round(value * 255 / largest) for (value,) in row] for row in rows]
    return [
        [(level, level, level, 0 if value == key else 255) for level, (value,) in zip(levels, row, strict=True)]
        for levels, row in zip(scale, rows, strict=True)
    ]


for depth in (1, 2, 4, 8, 16):
    largest = 2**depth - 1
    levels = sorted({0, 1, largest // 3, largest // 2, largest - 1, largest, min(5, largest)})
    rows = [[(value,) for value in levels]] * 3
    for interlaced in (False, True):
        name = f"PNG grey {depth}{' interlaced' * interlaced}"
        CASES[f"{name} without a key"] = png(rows, depth, 0, interlaced=interlaced), grey_pixels(rows, depth, None)
        for key in levels:
            CASES[f"{name} key {key}"] = (
                png(rows, depth, 0, trns(key), interlaced=interlaced),
                grey_pixels(rows, depth, key),
            )
    if depth < 16:  # 11.3.1.1: the least significant bits are used
        CASES[f"PNG grey {depth} key with upper bits"] = (
            png(rows, depth, 0, trns(0xFF00 + 256 * (depth > 8) | levels[1] | (0xFFFF ^ largest))),
            grey_pixels(rows, depth, levels[1]),
        )

for depth in (8, 16):
    high, low = (0x12, 0x34) if depth == 8 else (0x1234, 0xFF80)
    near = [(high, low, 7), (high, low, 8), (high + 1, low, 7), (high, low - 1, 7), (low, high, 7)]
    rows = [near, near[::-1], near]
    shown = [
        [(*(round(v * 255 / (2**depth - 1)) for v in pixel), 0 if pixel == (high, low, 7) else 255) for pixel in row]
        for row in rows
    ]
    for interlaced in (False, True):
        name = f"PNG RGB {depth}{' interlaced' * interlaced}"
        CASES[f"{name} key"] = png(rows, depth, 2, trns(high, low, 7), interlaced=interlaced), shown
        CASES[f"{name} without a key"] = (
            png(rows, depth, 2, interlaced=interlaced),
            [[(*pixel[:3], 255) for pixel in row] for row in shown],
        )
    for colour_type, channels in ((4, 2), (6, 4)):
        top = 2**depth - 1
        samples = [0, 1, top // 257 if depth == 16 else 3, top // 3, top // 2 + 1, top - 1, top]
        rows = [[(*samples[k : k + channels - 1], alpha) for k in range(3)] for alpha in (0, 1, top // 3, top - 1, top)]
        scaled = [[[round(v * 255 / top) for v in pixel] for pixel in row] for row in rows]
        shown = [[tuple(p if channels == 4 else [p[0]] * 3 + [p[1]]) for p in row] for row in scaled]
        for interlaced in (False, True):
            name = f"PNG {'RGBA' if channels == 4 else 'LA'} {depth}{' interlaced' * interlaced}"
            CASES[name] = png(rows, depth, colour_type, interlaced=interlaced), shown
        CASES[f"{name} with a key, which such a picture cannot have"] = (
            png(rows, depth, colour_type, trns(*[rows[1][0][0]] * (1 if channels == 2 else 3))),
            shown,
        )

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 240, 10)]
PLTE = b"PLTE", bytes(sum(COLOURS, ()))
for depth in (1, 2, 4, 8):
    count = min(4, 2**depth)
    rows = [[(k,) for k in range(count)]] * 2
    plte = PLTE[0], PLTE[1][: 3 * count]
    for alphas in ([0], [255, 0], [10, 20], [255, 128, 0, 1][:count], [255] * count):
        full = alphas + [255] * (count - len(alphas))
        CASES[f"PNG palette {depth} alpha {alphas}"] = (
            png(rows, depth, 3, plte, (b"tRNS", bytes(alphas))),
            [[(*COLOURS[k], full[k]) for k in range(count)]] * 2,
        )
    CASES[f"PNG palette {depth}"] = png(rows, depth, 3, plte), [[(*COLOURS[k], 255) for k in range(count)]] * 2

# Browsers ignore these chunks, or what is too much of them.
OF_TWO = [[(0,), (1,)]]
CASES["PNG palette with alpha of colours that are not there"] = (
    png(OF_TWO, 8, 3, (b"PLTE", PLTE[1][:6]), (b"tRNS", bytes([255, 0, 0, 0]))),
    [[(*COLOURS[0], 255), (*COLOURS[1], 0)]],
)
CASES["PNG palette behind its alpha"] = (
    png(OF_TWO, 8, 3, (b"tRNS", b"\0"), PLTE),
    [[(*COLOURS[0], 255), (*COLOURS[1], 255)]],
)
CASES["PNG palette with two tRNS"] = (
    png(OF_TWO, 8, 3, PLTE, (b"tRNS", b"\0"), (b"tRNS", b"\xff\0")),
    [[(*COLOURS[0], 0), (*COLOURS[1], 255)]],
)
CASES["PNG with two keys"] = png(OF_TWO, 8, 0, trns(0), trns(1)), grey_pixels(OF_TWO, 8, 0)
ROW = [[(1,), (2,)]]
CASES["PNG key of another length"] = png(ROW, 8, 0, (b"tRNS", b"\0\1\0")), grey_pixels(ROW, 8, None)
CASES["PNG key of one byte"] = png(ROW, 8, 0, (b"tRNS", b"\1")), grey_pixels(ROW, 8, None)


# --- GIF -------------------------------------------------------------------------------------------------------------


def gif(indices, size, at=(0, 0), transparent=None, palette=COLOURS, background=0, local=False, interlaced=False):
    """A GIF of one picture of 2-bit indices, whose LZW codes are never longer than 3 bits."""
    height, width = len(indices), len(indices[0])
    order = list(range(height))
    if interlaced:
        order = [y for start, step in ((0, 8), (4, 8), (2, 4), (1, 2)) for y in range(start, height, step)]
    table = bytes(sum(palette, ()))
    file = b"GIF89a" + struct.pack("<HHBBB", *size, 0x01 if local else 0x81, background, 0) + (b"" if local else table)
    if transparent is not None:
        file += b"!\xf9\4" + struct.pack("<BHB", 1, 0, transparent) + b"\0"
    file += b"," + struct.pack("<HHHHB", *at, width, height, (0x81 if local else 0) | 0x40 * interlaced)
    file += table if local else b""
    # A clear code before every second pixel keeps codes at 3 bits.
    codes = [
        code
        for k, index in enumerate([i for y in order for i in indices[y]])
        for code in ((4, index) if k % 2 == 0 else (index,))
    ]
    bits = "".join(f"{code:03b}"[::-1] for code in [*codes, 5])
    bits += "0" * (-len(bits) % 8)
    packed = bytes(int(bits[k : k + 8][::-1], 2) for k in range(0, len(bits), 8))
    return file + b"\2" + bytes((len(packed),)) + packed + b"\0;"


def gif_pixels(indices, size, at=(0, 0), transparent=None, palette=COLOURS):
    canvas = [[CLEAR] * size[0] for _ in range(size[1])]
    for y, row in enumerate(indices):
        for x, index in enumerate(row):
            canvas[at[1] + y][at[0] + x] = (*palette[index], 0 if index == transparent else 255)
    return canvas


INDICES = [[0, 1, 2], [3, 2, 1], [1, 1, 0]]
GREYS = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)]
for transparent in (None, 0, 1, 2, 3):
    for palette in (COLOURS, GREYS):
        for local in (False, True):
            for interlaced in (False, True):
                for size, at in (((3, 3), (0, 0)), ((6, 5), (2, 1)), ((3, 4), (0, 0))):
                    name = (
                        f"GIF {'grey' if palette is GREYS else 'colour'} transparent {transparent} of {size} at {at}"
                        f"{' local palette' * local}{' interlaced' * interlaced}"
                    )
                    CASES[name] = (
                        gif(INDICES, size, at, transparent, palette, background=2, local=local, interlaced=interlaced),
                        gif_pixels(INDICES, size, at, transparent, palette),
                    )


# --- BMP -------------------------------------------------------------------------------------------------------------


def bmp(words, bits, masks=None, header=124, compression=None, top_down=False):
    """A BMP of rows of 16- or 32-bit pixels; `masks` are of red, green, blue and perhaps alpha."""
    height, width = len(words), len(words[0])
    compression = (3 if masks else 0) if compression is None else compression
    info = struct.pack(
        "<IiiHHIIiiII", header, width, -height if top_down else height, 1, bits, compression, 0, 2835, 2835, 0, 0
    )
    info += struct.pack(f"<{len(masks or ())}I", *(masks or ()))
    if header in (108, 124):
        info = info.ljust(56, b"\0") + b"sRGB"[::-1]
    info = info.ljust(header, b"\0")
    ordered = words if top_down else words[::-1]
    rows = b""
    for row in ordered:
        packed = struct.pack(f"<{width}{'H' if bits == 16 else 'I'}", *row)
        rows += packed + bytes(-len(packed) % 4)
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(rows), 0, 0, 14 + len(info)) + info + rows


def word(pixel, masks):
    """The stored word of 8-bit red, green, blue, alpha, whose masks have any number of bits."""
    value = 0
    for sample, mask in zip(pixel, masks, strict=False):
        if mask:
            shift = (mask & -mask).bit_length() - 1
            value |= round(sample * (mask >> shift) / 255) << shift
    return value


def read_back(value, masks):
    found = []
    for mask in (*masks, 0)[:4]:
        if not mask:
            found.append(255)
            continue
        shift = (mask & -mask).bit_length() - 1
        found.append(round(((value & mask) >> shift) * 255 / (mask >> shift)))
    return tuple(found)


SCENE = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(10, 20, 30), (200, 100, 50), (255, 255, 255)]]
LAYOUTS = {
    "ARGB 8888": (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    "ABGR 8888": (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
    "RGBA 8888": (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
    "BGRA 8888": (32, (0xFF00, 0xFF0000, 0xFF000000, 0xFF)),
    "ARGB 2-10-10-10": (32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
    "ARGB 4444": (16, (0xF00, 0xF0, 0xF, 0xF000)),
    "ARGB 1555": (16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    "RGB 565": (16, (0xF800, 0x7E0, 0x1F, 0)),
    "XRGB 8888": (32, (0xFF0000, 0xFF00, 0xFF, 0)),
}
ALPHAS = {
    "clear": [[0, 0, 0], [0, 0, 0]],
    "opaque": [[255, 255, 255], [255, 255, 255]],
    "one pixel": [[0, 0, 0], [0, 255, 0]],
    "steps": [[0, 85, 170], [255, 85, 0]],
}
for layout, (bits, masks) in LAYOUTS.items():
    for kind, alphas in ALPHAS.items():
        words = [
            [word((*p, a), masks) for p, a in zip(row, alpha, strict=True)]
            for row, alpha in zip(SCENE, alphas, strict=True)
        ]
        opaque = not any(value & masks[3] for row in words for value in row)
        visible = (*masks[:3], 0) if opaque else masks
        for header in (56, 108, 124):
            for top_down in (False, True):
                CASES[f"BMP {layout} {kind} header {header}{' top down' * top_down}"] = (
                    bmp(words, bits, masks, header, top_down=top_down),
                    [[read_back(value, visible) for value in row] for row in words],
                )
        # 40 or 52 bytes of header have three masks: the rest of the pixel is no alpha, whatever it contains.
        for header in (40, 52):
            CASES[f"BMP {layout} {kind} header {header}"] = (
                bmp(words, bits, masks[:3], header),
                [[read_back(value, (*masks[:3], 0)) for value in row] for row in words],
            )
        CASES[f"BMP {layout} {kind} of Windows CE"] = (
            bmp(words, bits, masks, 40, compression=6),
            [[read_back(value, visible) for value in row] for row in words],
        )

CASES["BMP RGB 565 with alpha in bits that are not there"] = (
    bmp([[0xF800, 0x07E0, 0x001F]], 16, (0xF800, 0x7E0, 0x1F, 0xFF000000)),
    [[(255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)]],
)

# BI_RGB: "The high byte in each DWORD is not used" (BITMAPINFOHEADER, BITMAPV4HEADER).
for header in (40, 52, 56, 108, 124):
    for kind, alphas in ALPHAS.items():
        words = [
            [word((*p, a), LAYOUTS["ARGB 8888"][1]) for p, a in zip(row, alpha, strict=True)]
            for row, alpha in zip(SCENE, alphas, strict=True)
        ]
        CASES[f"BMP BI_RGB 32 {kind} header {header}"] = (
            bmp(words, 32, None, header),
            [[(*p, 255) for p in row] for row in SCENE],
        )
    CASES[f"BMP BI_RGB 16 header {header}"] = (
        bmp([[0x8000 | 0x7C00, 0x03E0, 0x8000 | 0x1F]], 16, None, header),
        [[(255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)]],
    )


def rle(codes, size, bits):
    """A BMP of run-length codes over a palette."""
    info = struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, 1 if bits == 8 else 2, len(codes), 0, 0, 4, 0)
    table = b"".join(bytes((b, g, r, 0)) for r, g, b in COLOURS)
    offset = 14 + len(info) + len(table)
    return b"BM" + struct.pack("<IHHI", offset + len(codes), 0, 0, offset) + info + table + codes


R, G, B, Y = ((*colour, 255) for colour in COLOURS)
END_OF_ROW, END = b"\0\0", b"\0\1"
CASES["BMP RLE8 whole"] = (
    rle(b"\3\0" + END_OF_ROW + b"\0\3\1\2\3\0" + END_OF_ROW + END, (3, 2), 8),
    [[G, B, Y], [R, R, R]],
)
CASES["BMP RLE4 whole"] = (
    rle(b"\3\1" + END_OF_ROW + b"\0\3\x12\x30" + END_OF_ROW + END, (3, 2), 4),
    [[G, B, Y], [R, G, R]],
)
# Pixels that no code writes are transparent in Chromium and Firefox.
CASES["BMP RLE8 short row"] = (
    rle(b"\2\1" + END_OF_ROW + b"\3\2" + END_OF_ROW + END, (3, 2), 8),
    [[B, B, B], [G, G, CLEAR]],
)
CASES["BMP RLE8 empty row"] = rle(END_OF_ROW + b"\3\2" + END, (3, 2), 8), [[B, B, B], [CLEAR] * 3]
CASES["BMP RLE8 step"] = rle(b"\1\1\0\2\1\1\1\2" + END, (3, 2), 8), [[CLEAR, CLEAR, B], [G, CLEAR, CLEAR]]
CASES["BMP RLE4 step"] = rle(b"\1\x10\0\2\1\1\1\x20" + END, (3, 2), 4), [[CLEAR, CLEAR, B], [G, CLEAR, CLEAR]]
CASES["BMP RLE8 early end"] = rle(b"\1\1" + END, (3, 2), 8), [[CLEAR] * 3, [G, CLEAR, CLEAR]]


# --- WebP ------------------------------------------------------------------------------------------------------------


def chunk(name, payload):
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def riff(*chunks):
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def vp8l(pixel, size, alpha_used=True):
    """A lossless picture of one colour: five prefix codes of one symbol each, so that pixels take no bits."""
    bits = f"{size[0] - 1:014b}"[::-1] + f"{size[1] - 1:014b}"[::-1] + str(int(alpha_used)) + "000"
    bits += "000"  # no transform, no colour cache, no meta prefix codes
    red, green, blue, alpha = pixel
    for symbol in (green, red, blue, alpha):
        bits += "1" + "0" + "1" + f"{symbol:08b}"[::-1]  # simple code, one symbol, of 8 bits
    bits += "1" + "0" + "0" + "0"  # distance code: symbol 0
    bits += "0" * (-len(bits) % 8)
    return b"\x2f" + bytes(int(bits[k : k + 8][::-1], 2) for k in range(0, len(bits), 8))


def u24(value):
    return value.to_bytes(3, "little")


def vp8x(size, flags):
    return chunk(b"VP8X", bytes((flags, 0, 0, 0)) + u24(size[0] - 1) + u24(size[1] - 1))


def animated(size, frame, at, pixel, flags, background=(9, 9, 9, 255)):
    anmf = u24(at[0] // 2) + u24(at[1] // 2) + u24(frame[0] - 1) + u24(frame[1] - 1) + u24(100) + b"\0"
    anmf += chunk(b"VP8L", vp8l(pixel, frame, alpha_used=pixel[3] < 255))
    red, green, blue, alpha = background
    anim = chunk(b"ANIM", bytes((blue, green, red, alpha)) + b"\0\0")
    return riff(vp8x(size, flags), anim, chunk(b"ANMF", anmf), chunk(b"ANMF", anmf))


for alpha in (0, 1, 128, 255):
    pixel = (200, 100, 50, alpha)
    CASES[f"WebP lossless alpha {alpha}"] = riff(chunk(b"VP8L", vp8l(pixel, (2, 2)))), [[pixel] * 2] * 2
    CASES[f"WebP lossless VP8X alpha {alpha}"] = (
        riff(vp8x((2, 2), 0x10), chunk(b"VP8L", vp8l(pixel, (2, 2)))),
        [[pixel] * 2] * 2,
    )
for flags in (0x02, 0x12):
    for pixel in ((200, 100, 50, 255), (200, 100, 50, 100)) if flags == 0x12 else ((200, 100, 50, 255),):
        CASES[f"WebP animated flags {flags:#x} alpha {pixel[3]}"] = (
            animated((4, 4), (2, 2), (2, 0), pixel, flags),
            [[CLEAR, CLEAR, pixel, pixel]] * 2 + [[CLEAR] * 4] * 2,
        )
        CASES[f"WebP animated whole flags {flags:#x} alpha {pixel[3]}"] = (
            animated((2, 2), (2, 2), (0, 0), pixel, flags),
            [[pixel] * 2] * 2,
        )


def lossy(alphas, size):
    """A lossy picture of one grey, with alpha that is stored as it is (ALPH, no compression, no filter)."""
    file = io.BytesIO()
    Image.new("RGB", size, (128, 128, 128)).save(file, "WEBP", quality=100)
    vp8 = file.getvalue()
    start = vp8.index(b"VP8 ")
    return riff(vp8x(size, 0x10), chunk(b"ALPH", b"\0" + bytes(alphas)), vp8[start:])


CASES["WebP lossy with alpha"] = (
    lossy([0, 255, 128, 1], (2, 2)),
    [[(128, 128, 128, 0), (128, 128, 128, 255)], [(128, 128, 128, 128), (128, 128, 128, 1)]],
)


@pytest.mark.parametrize("case", CASES)
def test_a_picture_over_a_background_shows_what_its_formats_rules_say(case):
    data, pixels = CASES[case]
    for background in ((0, 0, 0), (255, 255, 255), (16, 200, 48)):
        found = np.array(rendered(data, "#{:02x}{:02x}{:02x}".format(*background)))

        expected = np.array([[over(pixel, background) for pixel in row] for row in pixels])
        assert found.shape == expected.shape
        # Blending in 8 bits may round to the next level; what is opaque or clear is exact.
        partly = np.array([[0 < pixel[3] < 255 for pixel in row] for row in pixels])
        assert np.abs(found - expected)[partly].max(initial=0) <= 1
        assert np.abs(found - expected)[~partly].max(initial=0) < 0.5


@given(
    st.sampled_from([1, 2, 4, 8, 16]).flatmap(
        lambda depth: st.tuples(
            st.just(depth),
            st.lists(st.integers(0, 2**depth - 1), min_size=1, max_size=12),
            st.integers(0, 2**depth - 1),
            st.booleans(),
        )
    )
)
def test_any_grey_png_hides_exactly_the_samples_of_its_key(case):
    depth, samples, key, interlaced = case
    rows = [[(sample,) for sample in samples]] * 2

    found = rendered(png(rows, depth, 0, trns(key), interlaced=interlaced))

    assert found == [[over(pixel) for pixel in row] for row in grey_pixels(rows, depth, key)]


@given(st.data())
def test_any_layout_of_bit_masks_is_read(data):
    bits = data.draw(st.sampled_from([16, 32]))
    cuts = data.draw(st.lists(st.integers(0, bits), min_size=4, max_size=8, unique=True).map(sorted))
    fields = [(1 << high) - (1 << low) for low, high in pairwise(cuts)]
    masks = data.draw(st.permutations([*fields, 0, 0, 0]))[:4]
    if not any(masks[:3]):
        masks = (*LAYOUTS["XRGB 8888" if bits == 32 else "RGB 565"][1][:3], 0)
    words = data.draw(st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=3, max_size=3), min_size=1, max_size=3))

    found = rendered(bmp(words, bits, masks, top_down=data.draw(st.booleans())))

    has_alpha = any(value & masks[3] for row in words for value in row)
    for row, shown in zip(words, found, strict=True):
        for value, colour in zip(row, shown, strict=True):
            pixel = read_back(value, masks if has_alpha else (*masks[:3], 0))
            colours = [part if mask else 0 for part, mask in zip(pixel, masks[:3], strict=False)]
            assert np.abs(np.array(colour) - over((*colours, pixel[3]))).max() <= 1


def test_an_alpha_of_more_than_eight_bits_is_set_where_any_bit_is():
    ((colour,),) = rendered(bmp([[4]], 16, (1, 2, 0, 0x7FC)))  # 1 of 511

    assert np.abs(np.array(colour) - over((0, 0, 0, 0))).max() <= 1


@pytest.mark.parametrize(
    "masks",
    [(0xFF0000, 0xFF00, 0xFF, 0xFF), (0xFF0000, 0x1FF00, 0xFF, 0), (0xF0F000, 0xF00, 0xF, 0)],
    ids=["alpha over blue", "green over red", "a hole in red"],
)
def test_a_bmp_whose_masks_contradict_each_other_is_corrupt(masks):
    with pytest.raises(ImageUnreadableError, match="bit masks overlap or have holes"):
        rendered(bmp([[1, 2]], 32, masks))


@pytest.mark.parametrize(
    "case", [name for name in CASES if (name.startswith("BMP") and "clear" in name) or "RLE" in name]
)
def test_a_bmp_that_ends_before_its_pixels_is_truncated(case):
    data, _ = CASES[case]

    for length in range(30, len(data) - (6 if "RLE" in case else 0)):
        with pytest.raises(ImageUnreadableError):
            rendered(data[:length])


def test_a_damaged_colour_key_is_corrupt():
    data = png([[(1,), (2,)]], 8, 0, trns(1))
    at = data.index(b"tRNS")

    with pytest.raises(ImageUnreadableError, match="checksum"):
        rendered(data[: at + 5] + b"\2" + data[at + 6 :])


# --- run-length encoding, against a decoder that reads one code after the other ---------------------------------------


def read_codes(  # noqa: C901 - the whole format in one place
    code: bytes, width: int, height: int, bits: int
) -> tuple[list[list[int]], list[list[bool]]] | None:
    """Indices, and where one was written, by the words of BITMAPINFOHEADER's page; None if the code ends too early."""
    picture, written = [[0] * width for _ in range(height)], [[False] * width for _ in range(height)]
    x = y = at = 0

    def put(index: int) -> None:
        nonlocal x
        if x < width:
            picture[y][x], written[y][x] = index, True
            x += 1

    while y < height:
        if at + 2 > len(code):
            return (picture, written) if (x, y) == (width, height - 1) else None
        count, value = code[at : at + 2]
        at += 2
        if count:
            for k in range(count):
                put(value if bits == 8 else (value >> 4, value & 15)[k % 2])
        elif value == 0:
            x, y = 0, y + 1
        elif value == 1:
            break
        elif value == 2:
            if at + 2 > len(code):
                return None
            x, y, at = min(x + code[at], width), y + code[at + 1], at + 2
        else:
            num_bytes = (value * bits + 7) // 8
            held = code[at : at + num_bytes]
            if len(held) < num_bytes:
                return None
            for k in range(value):
                put(held[k] if bits == 8 else (held[k // 2] >> 4, held[k // 2] & 15)[k % 2])
            at += num_bytes + num_bytes % 2
    return picture, written


CODES = st.one_of(
    st.tuples(st.integers(1, 255) | st.integers(1, 3), st.integers(0, 255)).map(bytes),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 255)).map(bytes), min_size=17, max_size=60).map(b"".join),
    st.binary(min_size=3, max_size=9).map(lambda held: bytes((0, len(held))) + held + bytes(len(held) % 2)),
    st.tuples(st.integers(0, 9), st.integers(0, 2)).map(lambda step: b"\0\2" + bytes(step)),
    st.sampled_from([END_OF_ROW, END_OF_ROW, END]),
)


@given(code=st.lists(CODES, max_size=12).map(b"".join), size=st.tuples(st.integers(1, 90), st.integers(1, 4)))
@settings(deadline=None)
def test_run_length_codes_are_read_as_one_after_the_other(code: bytes, size: tuple[int, int]) -> None:
    for bits in (8, 4):
        expected = read_codes(code, *size, bits)
        try:
            indices, written = bitmaps._codes(code, 0, *size, bits)
        except IncompleteError:
            assert expected is None
            continue
        assert expected is not None
        assert list(indices) == [index for row in expected[0] for index in row]
        assert [bool(flag) for flag in written] == [flag for row in expected[1] for flag in row]


def test_codes_that_do_not_advance_are_refused_before_they_take_long() -> None:
    step, most = b"\0\2\0\0", bitmaps.MAX_IDLE_CODES + 2  # two rows
    for number in (most - 1, most):
        assert images.decode(
            rle(step * number + b"\3\1" + END, (3, 2), 8), max_pixels=6, background="#000000"
        ).size == (3, 2)

    with pytest.raises(ImageUnreadableError, match="a BMP whose run-length code does not advance"):
        images.decode(rle(step * (most + 1) + b"\3\1" + END, (3, 2), 8), max_pixels=6, background="#000000")
