"""Picture of the demo, docs/demo.gif: `pia-batch demo --output outputs/demo`, then `python docs/demo.py outputs/demo`.

A tile for each animation of the newest results, in the order of the sample manifest, with its prompt and motion scale.
All tiles play together; those of fewer frames begin again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageSequence

from pia_batch import tiny
from pia_batch.journal.results import read_latest
from pia_batch.storage.object_store import Store

PICTURE = Path(__file__).with_name("demo.gif")
COLUMNS, SIDE, CAPTION, MARGIN = 4, 128, 32, 8
COLOURS, STEP, FRAME_MS = 128, 6, 130


def caption(row: dict[str, Any]) -> str:
    """Return two lines: what happens, and the motion scale with the method of a long clip."""
    texts = [row["prompt"]] if row["prompt"] else [key["prompt"] for key in row["prompts"]]
    shape, *motions = texts[0].removeprefix("a ").removeprefix("an ").rsplit(" moving ", 1)
    motions += [text.rsplit(" ", 1)[1] for text in texts[1:]]
    first = f"{shape} {', then '.join(motions)}".strip().replace("standing still", "still")
    how = [f"scale {row['motion_scale']}", *["loop"] * bool(row["loop"]), *filter(None, [row["context"]])]
    return f"{first}\n{', '.join(how)}"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    newest = read_latest(Store(str(output)))
    if newest is None:
        parser.error(f"{output} has no results; run `pia-batch demo --output {output}` first")
    results = ds.dataset(output / "results" / newest["run_id"]).to_table(["request_id", "key"])
    keys = {row["request_id"]: row["key"] for row in results.to_pylist()}
    sample = pq.read_table(tiny.SAMPLE / "requests.parquet").to_pylist()
    clips = []
    for row in sample:
        key = keys[row["request_id"]]
        with Image.open(output / "animations" / key[:2] / f"{key}.gif") as file:
            size = (SIDE, SIDE)
            clips.append(
                [frame.convert("RGB").resize(size, Image.Resampling.BICUBIC) for frame in ImageSequence.Iterator(file)]
            )
    width, height = SIDE + 2 * MARGIN, SIDE + CAPTION + MARGIN
    sheets = []
    for number in range(max(map(len, clips))):
        sheet = Image.new("RGB", (COLUMNS * width, -(-len(clips) // COLUMNS) * height), "white")
        for index, (row, clip) in enumerate(zip(sample, clips, strict=True)):
            left, top = index % COLUMNS * width + MARGIN, index // COLUMNS * height + MARGIN
            sheet.paste(clip[number % len(clip)], (left, top))
            ImageDraw.Draw(sheet).text((left, top + SIDE + 2), caption(row), fill="black", font_size=11)
        sheets.append(sheet)
    palette = Image.new("RGB", (sheets[0].width, sheets[0].height * len(sheets[::STEP])))
    for part, sheet in enumerate(sheets[::STEP]):
        palette.paste(sheet, (0, part * sheet.height))
    colours = palette.quantize(COLOURS, method=Image.Quantize.FASTOCTREE)
    frames = [sheet.quantize(palette=colours, dither=Image.Dither.NONE) for sheet in sheets]
    frames[0].save(PICTURE, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, optimize=True)


if __name__ == "__main__":
    main()
