"""Write a manifest of real photographs: those in scikit-image, as 24 requests with different settings.

    python jobs/photographs.py s3://pia/photographs
    pia-batch run --manifest s3://pia/photographs/manifest --output s3://pia/out

Writes `images/*.png` and a manifest partitioned by `subject`, for the embedded model. The embedded model cannot animate
photographs, but sizes, formats, cropping and settings are those of a real job. Needs scikit-image
(`pip install 'pia-batch[test]'`).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import skimage.data
from PIL import Image

from pia_batch.storage import store_uris

SUBJECTS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "hubble_deep_field")
"""Photographs in the scikit-image wheel; others would be downloads. `camera` is grey, the others are RGB."""

VARIATIONS: tuple[dict[str, Any], ...] = (
    {"prompt": "{} moving left", "motion_scale": 0, "format": "mp4", "num_frames": 8, "width": 64, "height": 64},
    {"prompt": "{} growing", "motion_scale": 2, "format": "gif", "num_frames": 6, "width": 96, "height": 64},
    {"prompt": "{} spinning", "motion_scale": 5, "format": "webp", "num_frames": 16, "width": 64, "height": 64},
    {
        "prompt": "{} standing still",
        "motion_scale": None,
        "format": "png_zip",
        "num_frames": 4,
        "width": 64,
        "height": 96,
    },
)
"""Settings of the four requests for each photograph; the values differ so that batches are mixed."""


def main(folder_uri: str, subjects: Sequence[str] = SUBJECTS) -> None:
    """Write images and manifest under `folder_uri`, and print the manifest's URI."""
    folder_uri = store_uris.absolute(folder_uri).rstrip("/")
    filesystem, root = fsspec.url_to_fs(folder_uri)
    rows = []
    for subject in subjects:
        image = f"{root}/images/{subject}.png"
        filesystem.makedirs(f"{root}/images", exist_ok=True)
        filesystem.pipe_file(image, _png(getattr(skimage.data, subject)()))
        for number, variation in enumerate(VARIATIONS):
            settings = variation | {"prompt": variation["prompt"].format(subject.replace("_", " "))}
            rows.append(
                {
                    "request_id": f"{subject}-{number}",
                    "image": f"{folder_uri}/images/{subject}.png",
                    "guidance_scale": (1.0, 2.0, 3.5, 1.5)[number],
                    "num_inference_steps": (4, 6, 8, 5)[number],
                    "strength": (1.0, 1.0, 0.75, 1.0)[number],
                    "seed": None if number == 0 else number,
                    "subject": subject,
                    **settings,
                }
            )
    ds.write_dataset(
        pa.Table.from_pylist(rows),
        f"{root}/manifest",
        filesystem=filesystem,
        format="parquet",
        partitioning=ds.partitioning(pa.schema([("subject", pa.string())]), flavor="hive"),
        existing_data_behavior="overwrite_or_ignore",
    )
    print(f"{len(rows)} requests in {folder_uri}/manifest")


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


if __name__ == "__main__":
    main(sys.argv[1])
