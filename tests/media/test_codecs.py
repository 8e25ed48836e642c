import io
import json
import time
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import skimage
from PIL import Image, ImageSequence

from pia_batch.config import FORMATS, EncodingConfig
from pia_batch.errors import EncodingError
from pia_batch.media import codecs

CONFIG = EncodingConfig()
EXACT = EncodingConfig(webp_lossless=True)
COFFEE = Path(skimage.__file__).parent / "data" / "coffee.png"


def clip(num_frames=8, width=64, height=64):
    """A slow pan over a photograph, uint8 (F, H, W, 3)."""
    with Image.open(COFFEE) as photograph:
        scaled = photograph.convert("RGB").resize((width + 40, height + 40), Image.Resampling.LANCZOS)
    return np.stack([np.asarray(scaled.crop((k, k // 2, k + width, k // 2 + height))) for k in range(num_frames)])


def flat(*colours, side=64, repeat=1):
    return np.stack([np.full((side, side, 3), colour, np.uint8) for colour in colours for _ in range(repeat)])


def psnr_db(one, other):
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


class Pillow:
    """Animated images, read without the module under test."""

    def __init__(self, data):
        self.frames, self.delays_ms = [], []
        with Image.open(io.BytesIO(data)) as file:
            self.loop = file.info.get("loop")
            for image in ImageSequence.Iterator(file):
                self.frames.append(np.asarray(image.convert("RGB")))
                self.delays_ms.append(image.info["duration"])


class Pipe:
    """A file that can only be read on, as over a connection without range requests."""

    def __init__(self, data):
        self._file = io.BytesIO(data)

    def read(self, size=-1):
        return self._file.read(size)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("num_frames", [1, 2, 16])
def test_what_goes_in_is_what_probe_finds(fmt, num_frames):
    info = codecs.probe(codecs.encode(clip(num_frames, 96, 40), fmt, 8, CONFIG), fmt)

    assert (info.width, info.height, info.num_frames) == (96, 40, num_frames)
    assert info.duration_s == pytest.approx(num_frames / 8, abs=0.0051 if fmt == "gif" else 1e-9)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [(64, 64), (96, 40), (40, 96), (8, 8), (136, 72)])
def test_decoding_gives_the_frames_back(fmt, size):
    frames = clip(5, *size)

    decoded = codecs.decode(codecs.encode(frames, fmt, 8, EXACT), fmt)

    assert (decoded.dtype, decoded.shape) == (np.uint8, frames.shape)
    if fmt in ("webp", "png_zip"):
        assert np.array_equal(decoded, frames)
    else:
        assert psnr_db(decoded, frames) > 28


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_same_frames_give_the_same_bytes(fmt):
    first = codecs.encode(clip(16, 96, 64), fmt, 7.5, CONFIG)

    assert codecs.encode(clip(16, 96, 64), fmt, 7.5, CONFIG) == first


def test_an_mp4_does_not_depend_on_what_lay_in_memory_before():
    frames = clip(16, 96, 64)
    random = np.random.default_rng(0)
    found = set()

    for _ in range(100):
        filled = [np.full(random.integers(100, 120_000), random.integers(256), np.uint8) for _ in range(40)]
        held = filled[::3]
        del filled  # leaves holes of old bytes between what is held
        found.add(codecs.encode(frames, "mp4", 7.5, CONFIG))
        del held

    assert len(found) == 1


def test_no_file_says_when_it_was_written():
    mp4 = codecs.encode(clip(2), "mp4", 8, CONFIG)
    for box in (b"mvhd", b"tkhd", b"mdhd"):
        start = mp4.index(box) + 8  # name, version and flags
        assert mp4[start : start + 8] == b"\0" * 8
    with zipfile.ZipFile(io.BytesIO(codecs.encode(clip(2), "png_zip", 8, CONFIG))) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_view_with_another_memory_order_is_encoded_alike(fmt):
    frames = clip(4)
    view = np.ascontiguousarray(frames.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)

    assert codecs.encode(view, fmt, 8, CONFIG) == codecs.encode(frames, fmt, 8, CONFIG)


@pytest.mark.parametrize("fmt", FORMATS)
def test_identical_frames_are_all_kept(fmt):
    frames = flat((200, 30, 120), repeat=12)

    data = codecs.encode(frames, fmt, 8, CONFIG)

    assert codecs.probe(data, fmt) == codecs.MediaInfo(width=64, height=64, num_frames=12, duration_s=1.5)
    assert np.abs(codecs.decode(data, fmt).astype(int) - frames).max() <= 4


@pytest.mark.parametrize("fmt", FORMATS)
def test_colours_survive(fmt):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (17, 200, 199)]
    frames = flat(*colours)

    decoded = codecs.decode(codecs.encode(frames, fmt, 8, EXACT), fmt)

    assert np.abs(decoded.astype(int) - frames).max() <= (5 if fmt == "gif" else 2)


@pytest.mark.parametrize("fps", [1, 7.5, 8, 23.976, 24000 / 1001, 29.97, 30, 50, 60])
@pytest.mark.parametrize("num_frames", [1, 16])
def test_an_mp4_has_the_rate_the_frame_count_and_the_duration_that_were_asked_for(fps, num_frames):
    data = codecs.encode(clip(num_frames, 32, 32), "mp4", fps, CONFIG)

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        rate = Fraction(fps).limit_denominator(1001)
        assert (stream.average_rate, stream.frames) == (rate, num_frames)
        assert stream.duration * stream.time_base == num_frames / rate
        assert container.duration == pytest.approx(1e6 * num_frames / fps, abs=1)
        assert times == [number / rate for number in range(num_frames)]
    assert codecs.probe(data, "mp4").duration_s == pytest.approx(num_frames / fps, rel=1e-9)


def test_an_mp4_is_what_every_player_takes():
    with av.open(io.BytesIO(codecs.encode(clip(), "mp4", 8, CONFIG))) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1, 1)


@pytest.mark.parametrize("num_frames", [1, 32, 300])
def test_an_mp4_plays_from_a_stream_that_cannot_seek(num_frames):
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, 16, 16, 3), dtype=np.uint8)
    data = codecs.encode(noise, "mp4", 8, CONFIG)

    with av.open(Pipe(data)) as container:
        assert sum(1 for _ in container.decode(video=0)) == num_frames
    assert data.index(b"moov") < data.index(b"mdat")
    assert b"moof" not in data


def test_an_mp4_is_decoded_alike_by_a_plain_reader():
    frames = flat((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 30, 120))
    with av.open(io.BytesIO(codecs.encode(frames, "mp4", 8, CONFIG))) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    assert np.abs(decoded.astype(int) - frames).max() <= 4  # 20 and more with another matrix or range


@pytest.mark.parametrize(
    ("fps", "delays_ms"),
    [
        (7.5, [130, 140, 130] * 5 + [130]),
        (8, [130, 120] * 8),
        (23.976, None),
        (30, [30, 40, 30] * 5 + [30]),
        (50, [20] * 16),
    ],
)
def test_gif_delays_add_up_to_the_duration(fps, delays_ms):
    data = codecs.encode(clip(16), "gif", fps, CONFIG)

    read = Pillow(data)
    assert len(read.frames) == 16
    assert delays_ms is None or read.delays_ms == delays_ms
    assert max(read.delays_ms) - min(read.delays_ms) <= 10
    assert sum(read.delays_ms) == pytest.approx(16_000 / fps, abs=5)
    assert codecs.probe(data, "gif").duration_s == sum(read.delays_ms) / 1000


@pytest.mark.parametrize("fps", [7.5, 8, 23.976, 30, 50, 60])
def test_webp_delays_add_up_to_the_duration(fps):
    read = Pillow(codecs.encode(clip(16), "webp", fps, CONFIG))

    assert len(read.frames) == 16
    assert max(read.delays_ms) - min(read.delays_ms) <= 1
    assert sum(read.delays_ms) == pytest.approx(16_000 / fps, abs=0.5)


@pytest.mark.parametrize("fmt", ["gif", "webp"])
@pytest.mark.parametrize("num_frames", [1, 2, 16])
def test_gif_and_webp_loop_forever(fmt, num_frames):
    assert Pillow(codecs.encode(clip(num_frames), fmt, 8, CONFIG)).loop == 0


def test_another_reader_sees_the_same_gif():
    data = codecs.encode(clip(16, 96, 40), "gif", 8, CONFIG)

    with av.open(io.BytesIO(data)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    assert np.array_equal(frames, Pillow(data).frames)


@pytest.mark.parametrize("dither", [False, True])
def test_what_stands_still_does_not_flicker_in_a_gif(dither):
    frames = clip(8)
    frames[:, :, :32] = frames[0, :, :32]

    decoded = codecs.decode(codecs.encode(frames, "gif", 8, EncodingConfig(gif_dither=dither)), "gif")

    assert (decoded[:, :, :32] == decoded[0, :, :32]).all()


def test_dithering_hides_the_bands_of_a_smooth_sky():
    y, x = np.mgrid[0:128, 0:128] / 127
    sky = np.stack([np.stack([90 + 60 * y, 140 + 50 * y, 200 + 40 * y + 10 * x], axis=-1).astype(np.uint8)] * 2)

    def seen_from_afar(frames):
        return frames.reshape(2, 16, 8, 16, 8, 3).mean(axis=(2, 4))

    plain, dithered = (
        codecs.decode(codecs.encode(sky, "gif", 8, EncodingConfig(gif_dither=dither)), "gif")
        for dither in (False, True)
    )
    assert psnr_db(seen_from_afar(dithered), seen_from_afar(sky)) > psnr_db(seen_from_afar(plain), seen_from_afar(sky))


def test_a_gif_costs_less_than_a_tenth_of_pillows_own():
    frames = clip(4, 256, 256)
    images = [Image.fromarray(frame) for frame in frames]

    def cpu_seconds(work, times):
        spent = []
        for _ in range(times):
            start = time.thread_time()
            work()
            spent.append(time.thread_time() - start)
        return min(spent)

    ours = cpu_seconds(lambda: codecs.encode(frames, "gif", 8, CONFIG), 4)
    pillows = cpu_seconds(lambda: images[0].save(io.BytesIO(), "GIF", save_all=True, append_images=images[1:]), 1)

    assert ours < pillows / 10  # a twentieth where nothing else runs


def test_encoding_settings_reach_the_encoder():
    frames = clip(8, 96, 96)

    def num_bytes(fmt, **settings):
        return len(codecs.encode(frames, fmt, 8, EncodingConfig(**settings)))

    assert num_bytes("mp4", mp4_crf=10) > num_bytes("mp4", mp4_crf=30)
    assert num_bytes("mp4", mp4_preset="ultrafast") != num_bytes("mp4", mp4_preset="slow")
    assert num_bytes("webp", webp_quality=95) > num_bytes("webp", webp_quality=40)
    assert num_bytes("webp", webp_lossless=True, webp_method=0) > num_bytes("webp", webp_lossless=True, webp_method=6)


def test_a_png_zip_holds_numbered_frames_and_the_rate():
    frames = clip(12)
    with zipfile.ZipFile(io.BytesIO(codecs.encode(frames, "png_zip", 7.5, CONFIG))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["animation.json", *(f"{number:04d}.png" for number in range(12))]
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(archive.read("animation.json")) == {"fps": 7.5, "num_frames": 12}
        for number, frame in enumerate(frames):
            assert np.array_equal(np.asarray(Image.open(archive.open(f"{number:04d}.png"))), frame)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_file_cut_anywhere_is_refused(fmt):
    data = codecs.encode(clip(6), fmt, 8, CONFIG)

    for length in {0, 1, 4, 12, 13, 40, *range(0, len(data), max(1, len(data) // 40)), len(data) - 22, len(data) - 1}:
        with pytest.raises(EncodingError):
            codecs.probe(data[:length], fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_bytes_after_the_end_are_refused(fmt):
    data = codecs.encode(clip(6), fmt, 8, CONFIG)

    for tail in (b"\0", b";", b"\0" * 8, data[-50:], data):
        with pytest.raises(EncodingError):
            codecs.probe(data + tail, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_damaged_bytes_decode_or_are_an_encoding_error_and_nothing_else(fmt):
    frames = clip(4, 32, 32)
    data = codecs.encode(frames, fmt, 8, CONFIG)
    random = np.random.default_rng(len(fmt))
    refused = 0

    for _ in range(60):
        damaged = bytearray(data)
        damaged[random.integers(len(data))] ^= 1 << random.integers(8)
        try:
            assert codecs.decode(bytes(damaged), fmt).dtype == np.uint8
        except EncodingError:
            refused += 1

    assert refused >= {"mp4": 5, "gif": 5, "webp": 0, "png_zip": 50, "webm": 3}[fmt]


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_file_of_another_format_is_refused(fmt):
    for other in FORMATS:
        if other != fmt:
            with pytest.raises(EncodingError):
                codecs.decode(codecs.encode(clip(2), other, 8, CONFIG), fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
    ],
    ids=["no frames", "four channels", "one frame alone", "no rows", "floats"],
)
def test_frames_of_another_kind_are_refused(fmt, frames):
    with pytest.raises(EncodingError, match="uint8 of shape"):
        codecs.encode(frames, fmt, 8, CONFIG)


@pytest.mark.parametrize(("fmt", "fps"), [("gif", 51), ("mp4", 61), ("webp", float("nan")), ("png_zip", 0)])
def test_a_rate_that_the_format_cannot_play_is_refused(fmt, fps):
    with pytest.raises(EncodingError, match="frames per second"):
        codecs.encode(clip(2), fmt, fps, CONFIG)


def test_what_the_encoder_refuses_is_an_encoding_error():
    with pytest.raises(EncodingError, match=r"multiples of 2 \(got 9 x 8\)"):
        codecs.encode(np.zeros((2, 8, 9, 3), np.uint8), "mp4", 8, CONFIG)
    with pytest.raises(EncodingError, match="webp"):
        codecs.encode(np.zeros((1, 8, 16384, 3), np.uint8), "webp", 8, CONFIG)


def test_every_format_has_a_codec_with_an_extension_and_a_media_type_of_its_own():
    found = codecs.CODECS.values()

    assert tuple(codecs.CODECS) == FORMATS == tuple(codec.format for codec in found)
    assert len({codec.extension for codec in found}) == len({codec.media_type for codec in found}) == len(FORMATS)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_file_bears_the_signature_of_its_codec_alone(fmt):
    data = codecs.encode(clip(1), fmt, 8, CONFIG)

    bears = [c.format for c in codecs.CODECS.values() if data[c.signature[0] :].startswith(c.signature[1])]
    assert bears == [fmt]


@pytest.mark.parametrize("num_frames", [1, 4])
@pytest.mark.parametrize(("count", "webp", "gif"), [(0, 0, 0), (1, 1, None), (2, 2, 1), (65535, 65535, 65534)])
def test_a_file_plays_as_often_as_it_is_asked_to(num_frames, count, webp, gif):
    """WebP records the number of passes; GIF that of repetitions after the first pass, and without it plays once."""
    frames = clip(num_frames)

    assert Pillow(codecs.encode(frames, "webp", 8, CONFIG, loop_count=count)).loop == webp
    assert Pillow(codecs.encode(frames, "gif", 8, CONFIG, loop_count=count)).loop == gif
    for fmt in FORMATS:
        played = codecs.encode(frames, fmt, 8, EXACT, loop_count=count)
        assert np.array_equal(codecs.decode(played, fmt), codecs.decode(codecs.encode(frames, fmt, 8, EXACT), fmt))
