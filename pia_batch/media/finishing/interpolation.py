"""Interpolation of frames by motion compensation, with the filter `minterpolate` of FFmpeg, from PyAV's wheel.

The filter takes luma and up to three more planes, and estimates motion from luma only. It is given the luma of each
frame and its R, G and B as three further planes: no colour is converted, so that frames keep every bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
"""(H, W, 3) RGB, 0-255."""

_FILTER = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:scd=none"
"""Overlapped block motion compensation with variable block sizes, from estimates in both directions, never a cut."""

_FORMAT = "yuva444p"
_LUMA = np.array([13933, 46871, 4732], np.uint32)
"""Luma of BT.709 in 65,536ths."""

_LEAST_SIDE = 32
"""Least width and height of the filter's frames, two of its blocks; smaller ones are padded, and cut again."""

_AHEAD = 2
"""Number of further frames that the filter wants before it returns what comes before a frame."""


def interpolated(frames: Iterable[Picture], times: int, *, closing: bool) -> Iterator[Picture]:
    """Yield frames with `times` - 1 more between neighbours. Frame i x `times` is frame i of the input.

    F frames become (F - 1) x `times` + 1; those of a loop F x `times`, because its end is followed by its start.
    About four frames are held at a time.

    Args:
        frames: Frames, uint8, of one shape (H, W, 3), RGB, 0-255.
        times: Factor of the frame rate, 1 or more.
        closing: True: the frames are a loop.
    """
    if times == 1:
        yield from frames
        return
    kept: list[Picture] = []
    count = 0

    def counted() -> Iterator[Picture]:
        nonlocal count
        for frame in frames:
            if count < _AHEAD:
                kept.append(frame)
            count += 1
            yield frame
        # What follows the last frame: in a loop the first ones, else the last one, which ends the filter's look-ahead.
        following = itertools.cycle(kept) if closing else itertools.repeat(frame)
        yield from itertools.islice(following, _AHEAD)

    for number, frame in enumerate(_filtered(counted(), times)):
        if number < times * count - (0 if closing else times - 1):
            yield frame


def _filtered(frames: Iterator[Picture], times: int) -> Iterator[Picture]:
    """Yield what the filter makes of `frames`, and only then take the next of them."""
    first = next(frames, None)
    if first is None:
        return
    height, width, _ = first.shape
    graph = av.filter.Graph()
    size = f"{max(width, _LEAST_SIDE)}x{max(height, _LEAST_SIDE)}"
    source = graph.add("buffer", f"video_size={size}:pix_fmt={_FORMAT}:time_base=1/1:frame_rate=1/1")
    between = graph.add("minterpolate", f"fps={times}:{_FILTER}")
    sink = graph.add("buffersink")
    source.link_to(between)
    between.link_to(sink)
    graph.configure()
    for number, picture in enumerate(itertools.chain([first], frames)):
        source.push(_filter_frame(picture, number))
        yield from _available(sink, height, width)
    source.push(None)
    yield from _available(sink, height, width)


def _available(sink: av.filter.context.FilterContext, height: int, width: int) -> Iterator[Picture]:
    """Yield the frames that the filter has ready."""
    while True:
        try:
            frame = sink.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes[1:]]
        yield np.stack([plane[:height, :width] for plane in planes], axis=-1)


def _filter_frame(picture: Picture, number: int) -> av.VideoFrame:
    """Return luma, R, G and B of a picture as the planes of a frame at second `number`."""
    missing = [max(0, _LEAST_SIDE - side) for side in picture.shape[:2]]
    if any(missing):
        picture = np.pad(picture, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    height, width, _ = picture.shape
    frame = av.VideoFrame(width, height, _FORMAT)
    luma = (picture.astype(np.uint32) @ _LUMA + 2**15) >> 16
    for plane, values in zip(frame.planes, [luma, *np.moveaxis(picture, -1, 0)], strict=True):
        np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, :width] = values
    frame.pts, frame.time_base = number, Fraction(1)
    return frame
