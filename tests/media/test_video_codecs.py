"""AV1 in MP4, and VP9 in WebM: read by OpenCV and by Chromium, whose decoders are not ours."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from playwright.sync_api import Browser, Page
from skimage import data as photographs

from pia_batch.config import EncodingConfig
from pia_batch.errors import EncodingError
from pia_batch.media import codecs
from pia_batch.media.metadata import Metadata

CONFIG = EncodingConfig()
HERE = Path(__file__).parent
VIDEOS = [("mp4", "av1"), ("webm", "h264")]
"""Format and `codec` of each kind of video; a WebM is VP9 whatever `codec` is."""

ABOUT = Metadata(comment="a comment", description="ein Café", software="pia_batch", xmp=b"<x:xmpmeta/>")


def clip(num_frames: int = 8, width: int = 64, height: int = 64) -> npt.NDArray[np.uint8]:
    """Return a slow pan over a photograph, uint8, shape (F, H, W, 3)."""
    photograph = cv2.resize(photographs.coffee(), (width + 40, height + 40), interpolation=cv2.INTER_AREA)
    return np.stack(
        [photograph[at // 4 : at // 4 + height, at // 2 : at // 2 + width] for at in np.arange(num_frames) % 80]
    )


def encoded(frames: npt.NDArray[np.uint8], kind: tuple[Any, Any], fps: float = 8, **options: Any) -> bytes:
    return codecs.encode(frames, kind[0], fps, EncodingConfig(**options), video_codec=kind[1])


def psnr_db(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize("kind", VIDEOS[1:], ids="-".join)  # OpenCV's wheel does not decode AV1
@pytest.mark.parametrize("fps", [7.5, 24])
def test_another_library_decodes_the_same_frames_at_the_same_rate(
    kind: tuple[str, str], fps: float, tmp_path: Path
) -> None:
    frames, path = clip(16, 96, 64), tmp_path / f"clip.{kind[0]}"
    path.write_bytes(encoded(frames, kind, fps))

    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    read = []
    while True:
        more, frame = video.read()
        if not more:
            break
        read.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))

    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(fps, abs=0.01)
    assert np.stack(read).shape == frames.shape
    assert psnr_db(np.stack(read), frames) > 30


@pytest.mark.parametrize("kind", VIDEOS, ids="-".join)
@pytest.mark.parametrize("num_frames", [2, 5, 200])
@pytest.mark.parametrize("size", [(64, 64), (136, 72)])
def test_the_same_frames_give_the_same_bytes_whatever_lay_in_memory_before(
    kind: tuple[str, str], num_frames: int, size: tuple[int, int]
) -> None:
    frames = clip(num_frames, *size)

    files = set()
    for level in (0, 85, 255):
        dirt = [np.full(2**18, level, np.uint8) for _ in range(40)]
        del dirt
        files.add(encoded(frames, kind, 7.5))

    (data,) = files
    info = codecs.probe(data, kind[0])  # type: ignore[arg-type]
    assert (info.num_frames, (info.width, info.height)) == (num_frames, size)
    assert info.duration_s == pytest.approx(num_frames / 7.5, abs=1e-9)


@pytest.mark.parametrize("kind", VIDEOS, ids="-".join)
def test_another_process_with_other_processors_writes_the_same_bytes_and_prints_nothing(kind: tuple[str, str]) -> None:
    program = (
        "import sys, os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        f"sys.path[:0] = {[str(HERE), str(HERE.parent / 'support')]!r}\n"
        "from test_video_codecs import clip, encoded\n"
        f"sys.stdout.buffer.write(encoded(clip(), {kind!r}))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert (other.stdout, other.stderr) == (encoded(clip(), kind), b"")


@pytest.mark.parametrize("kind", VIDEOS, ids="-".join)
def test_a_file_says_how_it_was_made(kind: Any) -> None:
    data = codecs.encode(clip(), kind[0], 8, CONFIG, ABOUT, video_codec=kind[1])

    assert {"a comment", "ein Café"} <= set(codecs.comments(data))
    assert ABOUT.xmp in data
    assert np.array_equal(codecs.decode(data, kind[0]), codecs.decode(encoded(clip(), kind), kind[0]))


@pytest.mark.parametrize("kind", VIDEOS, ids="-".join)
def test_a_file_cut_anywhere_is_refused(kind: Any) -> None:
    data = encoded(clip(), kind)

    for cut in [*range(1, len(data), len(data) // 40), len(data) - 1]:
        with pytest.raises(EncodingError):
            codecs.decode(data[:cut], kind[0])


@pytest.mark.parametrize("name", ["av1_crf", "webm_crf"])
def test_a_higher_crf_is_smaller(name: str) -> None:
    kind = {"av1": ("mp4", "av1"), "webm": ("webm", "h264")}[name.partition("_")[0]]

    assert len(encoded(clip(), kind, **{name: 50})) < 0.7 * len(encoded(clip(), kind))


@pytest.mark.parametrize(("name", "slow", "fast"), [("av1_preset", 3, 12), ("webm_speed", 0, 8)])
def test_the_effort_reaches_the_encoder(name: str, slow: Any, fast: Any) -> None:
    kind = {"av1": ("mp4", "av1"), "webm": ("webm", "h264")}[name.partition("_")[0]]

    assert encoded(clip(), kind, **{name: slow}) != encoded(clip(), kind, **{name: fast})


PAINTED = """async ({ source, frames, fps }) => {
  const video = document.createElement("video");
  video.muted = true;
  const loaded = new Promise((done) => { video.onloadeddata = () => done(true); video.onerror = () => done(false); });
  video.src = source;
  if (!(await loaded)) return null;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const context = canvas.getContext("2d");
  const painted = [];
  for (let k = 0; k < frames; k++) {
    await new Promise((done) => { video.onseeked = done; video.currentTime = (k + 0.5) / fps; });
    await new Promise((done) => setTimeout(done, 60));
    context.drawImage(video, 0, 0);
    painted.push([...context.getImageData(0, 0, canvas.width, canvas.height).data]);
  }
  return { painted, duration: video.duration };
}"""


@pytest.fixture(scope="module")
def page(chromium: Browser) -> Iterator[Page]:
    with chromium.new_context() as context:
        yield context.new_page()


@pytest.mark.parametrize("kind", [("mp4", "h264"), *VIDEOS], ids="-".join)
def test_chromium_plays_every_frame(kind: tuple[str, str], page: Page) -> None:
    frames = clip(32, 96, 64)[::8]
    media_type = codecs.CODECS[kind[0]].media_type  # type: ignore[index]
    source = f"data:{media_type};base64,{base64.b64encode(encoded(frames, kind, 8)).decode()}"

    shown = page.evaluate(PAINTED, {"source": source, "frames": 4, "fps": 8})

    pixels = np.array(shown["painted"], dtype=np.uint8).reshape(4, 64, 96, 4)[..., :3]
    assert shown["duration"] == pytest.approx(0.5, abs=0.002)
    assert psnr_db(pixels, frames) > 30
    assert all(psnr_db(pixels[k], frames[k]) > psnr_db(pixels[k], frames[k - 1]) + 1 for k in range(1, 4))


@pytest.mark.parametrize("kind", VIDEOS, ids="-".join)
@pytest.mark.parametrize("size", [(8, 8), (16, 40)])
def test_small_and_short_clips_are_whole(kind: Any, size: tuple[int, int]) -> None:
    frames = clip(1, *size)

    assert codecs.decode(encoded(frames, kind), kind[0]).shape == frames.shape


def test_a_lossless_webm_keeps_grey_to_the_level() -> None:
    grey = np.repeat(clip()[..., :1], 3, axis=3)

    difference = np.abs(codecs.decode(encoded(grey, VIDEOS[1], webm_lossless=True), "webm").astype(int) - grey)

    assert difference.max() <= 1  # limited range has 219 levels for 256
