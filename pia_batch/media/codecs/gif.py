"""GIF: one palette for all frames, so that what does not move does not flicker."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from PIL import GifImagePlugin, Image

from pia_batch.config import EncodingConfig
from pia_batch.media.codecs.codec import (
    AnyFrames,
    Codec,
    Frames,
    FrameStream,
    Playback,
    decode_with_pillow,
    frame_delays,
    require,
)
from pia_batch.media.metadata import Metadata, gif_blocks, gif_comments, walk_gif

_PALETTE_SAMPLES = 2**18
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], dtype=np.int16) - 8
"""Ordered dithering, -8 to 7 of 255. Unlike error diffusion it gives the same dots in every frame."""

_TICKS_PER_SECOND = 100


def _encode(frames: AnyFrames, playback: Playback, config: EncodingConfig, metadata: Metadata | None) -> bytes:
    if isinstance(frames, FrameStream):  # the palette is that of all frames
        frames = frames.array()
    num_frames, height, width, _ = frames.shape
    dots = np.zeros((height, width, 3), np.int16)
    if config.gif_dither:
        dots += np.tile(_BAYER, (-(-height // 4), -(-width // 4)))[:height, :width, None]
    up, down = np.maximum(dots, 0).astype(np.uint8), np.maximum(-dots, 0).astype(np.uint8)

    def dithered(frame: Frames) -> Frames:
        """Return the clipped sum of a frame and its dots, in a fifth of np.clip's time."""
        return np.minimum(np.maximum(frame, down) - down, 255 - up) + up if config.gif_dither else frame

    step = max(1, round(math.sqrt(frames.size / 3 / _PALETTE_SAMPLES)))
    sample = np.stack([dithered(frame)[::step, ::step] for frame in frames]).reshape(-1, 1, 3)
    palette = Image.fromarray(sample).quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    # Look the nearest palette entry of every 5-bit colour up once, instead of searching for every pixel.
    cube = (np.indices((32, 32, 32), dtype=np.uint8) * 8 + 4).reshape(3, -1).T[:, None]
    cells = Image.fromarray(np.ascontiguousarray(cube))
    nearest = np.asarray(cells.quantize(palette=palette, dither=Image.Dither.NONE)).ravel()
    parts: list[bytes] = []
    blocks = [gif_blocks(metadata)] if metadata else []
    for frame, delay in zip(frames, frame_delays(num_frames, playback.fps, _TICKS_PER_SECOND), strict=True):
        red, green, blue = np.moveaxis(dithered(frame) >> 3, -1, 0).astype(np.uint16)
        picture = Image.fromarray(nearest[red << 10 | green << 5 | blue])
        picture.putpalette(palette.getpalette() or [])
        # Assembled here, because Image.save drops frames that equal the previous one.
        parts = parts or GifImagePlugin.getheader(picture.copy(), info=_loop(playback) | {"duration": 10})[0] + blocks
        parts += GifImagePlugin.getdata(picture, duration=10 * delay)
    return b"".join([*parts, b";"])


def _loop(playback: Playback) -> dict[str, int]:
    """Return what Pillow writes as NETSCAPE extension: the number of repetitions after the first pass; 0: for ever.

    A file without the extension plays once.
    """
    if playback.loop_count == 0:
        return {"loop": 0}
    return {"loop": playback.loop_count - 1} if playback.loop_count > 1 else {}


def _decode(data: bytes, take: Callable[[Frames], None]) -> Fraction:
    *_, (_, _, end) = walk_gif(data)
    require(end == len(data), f"the trailer ends at byte {end} of {len(data)}")
    return decode_with_pillow(data, "GIF", take)


GIF = Codec(
    format="gif",
    extension="gif",
    signature=(0, b"GIF8"),
    encode=_encode,
    decode=_decode,
    comments=gif_comments,
    player="image",
    bytes_per_pixel=(0.33, 0.60),
)
