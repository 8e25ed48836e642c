"""Datasets as other programs write them, by their own libraries where there are any."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from inputs import png

from pia_batch.config import yaml_text


def write_photographs(folder: Path, count: int = 4) -> Path:
    """Write images into nested folders with spaces in their names, with captions for all but the last."""
    for k in range(count):
        path = folder / f"trip {k % 2}" / "day one" / f"IMG {k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(k))
        if k < count - 1:
            path.with_suffix(".txt").write_text(f"a photograph, number {k}\n")
    return folder


def write_webdataset(folder: Path, shards: int = 2, samples: int = 3) -> Path:
    """Write shards by the library webdataset: keys repeat from shard to shard; .txt and .json members."""
    import webdataset  # noqa: PLC0415 - slow

    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"shard-{shard:05d}.tar")) as writer:
            for k in range(samples):
                described = {"aesthetic": 5 + k, "width": 640, "tags": ["a", "b"]}
                writer.write(
                    {"__key__": f"{k:04d}", "png": png(10 * shard + k), "txt": f"cat {shard}-{k}", "json": described}
                )
    return folder


def write_img2dataset(folder: Path, output_format: str = "webdataset") -> Path:
    """Write what img2dataset 1.47 writes for four URLs of which two failed, in one of its formats.

    Tar files and folders have successes only; the Parquet file next to them has a row for every URL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k, status in enumerate(["success", "failed_to_download", "success", "failed_to_resize"]):
        rows.append(
            {
                "url": f"https://example.org/{k}.jpg",
                "caption": f"a lighthouse {k}",
                "key": f"{k:09d}",
                "status": status,
                "error_message": None if status == "success" else "HTTP Error 404: Not Found",
                "width": 256 if status == "success" else None,
                "height": 256 if status == "success" else None,
                "original_width": 1024 if status == "success" else None,
                "original_height": 768 if status == "success" else None,
                "exif": "{}" if status == "success" else None,
                "sha256": "0" * 64 if status == "success" else None,
            }
        )
    done = [row for row in rows if row["status"] == "success"]
    images = {row["key"]: png(k) for k, row in enumerate(rows)}
    if output_format == "webdataset":
        with tarfile.open(folder / "00000.tar", "w") as archive:
            for row in done:
                members = {"jpg": images[row["key"]], "txt": row["caption"].encode(), "json": json.dumps(row).encode()}
                add_members(archive, {f"{row['key']}.{name}": data for name, data in members.items()})
    elif output_format == "files":
        (folder / "00000").mkdir()
        for row in done:
            (folder / "00000" / f"{row['key']}.jpg").write_bytes(images[row["key"]])
            (folder / "00000" / f"{row['key']}.txt").write_text(row["caption"])
            (folder / "00000" / f"{row['key']}.json").write_text(json.dumps(row))
    else:
        rows = [row | {"jpg": images[row["key"]] if row["status"] == "success" else None} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    statistics = {"count": 4, "successes": 2, "failed_to_download": 1, "failed_to_resize": 1}
    (folder / "00000_stats.json").write_text(json.dumps(statistics))
    return folder


def add_members(archive: tarfile.TarFile, members: Mapping[str, bytes]) -> None:
    """Add files to an archive, in order."""
    for name, data in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def image_table(count: int = 6, **columns: Any) -> pa.Table:
    """Return a table of images as bytes, with captions and numbers."""
    table: dict[str, Any] = {
        "id": [f"row-{k}" for k in range(count)],
        "image_bytes": pa.array([png(k) for k in range(count)], pa.binary()),
        "caption": [f"a cat, number {k}" for k in range(count)],
        "score": [k / 2 for k in range(count)],
    }
    return pa.table(table | columns)


def write_hugging_face(folder: Path, count: int = 6) -> Path:
    """Write Parquet files with an Image feature by the library datasets."""
    import datasets  # noqa: PLC0415 - slow

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {
        "image": [{"bytes": png(k), "path": f"{k}.png"} for k in range(count)],
        "caption": [f"a boat, number {k}" for k in range(count)],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        dataset.shard(2, shard).to_parquet(str(folder / f"train-{shard:05d}-of-00002.parquet"))
    return folder


def write_lance(folder: Path) -> Path:
    """Write a Lance dataset of two fragments, in two versions, with a deleted row."""
    import lance  # noqa: PLC0415 - an optional library

    lance.write_dataset(image_table(4), str(folder), max_rows_per_file=2)
    lance.dataset(str(folder)).delete("id = 'row-1'")
    return folder


def write_delta(folder: Path) -> Path:
    """Write a partitioned Delta table from which a row was deleted."""
    import deltalake  # noqa: PLC0415 - an optional library

    deltalake.write_deltalake(str(folder), image_table(4, style=["ink", "oil"] * 2), partition_by=["style"])
    deltalake.DeltaTable(str(folder)).delete("id = 'row-1'")
    return folder


def write_iceberg(folder: Path) -> Path:
    """Write an Iceberg table of two snapshots, of which the second deletes a row, and return its folder."""
    from pyiceberg.catalog.sql import SqlCatalog  # noqa: PLC0415 - an optional library

    folder.mkdir(parents=True, exist_ok=True)
    catalog = SqlCatalog("test", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}")
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.photos", schema=image_table(4).schema)
    table.append(image_table(4))
    table.delete("id = 'row-1'")
    return folder / "shop" / "photos"


ANIMATE_BENCH = ("MoonFile", "film", "lyriel", "majicmix", "rcnzCartoon", "realistic_vision", "toonyou")


def write_animatebench(folder: Path) -> Path:
    """Write a folder in the layout of the dataset ymzhang319/AnimateBench, with other images and prompts."""
    (folder / "configs").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- image animation\n---\n")
    for name in ANIMATE_BENCH:
        (folder / "img" / name).mkdir(parents=True)
        for number in range(1, 6):
            (folder / "img" / name / f"{number}.{'png' if number < 4 else 'jpg'}").write_bytes(png(number))
        texts = [[f"{name} image {number}, prompt {k}, lowres,watermark" for k in (1, 2, 3)] for number in range(1, 6)]
        config = {
            "base": "example/config/base.yaml",
            "prompts": texts,
            "n_prompt": ["wrong white balance, dark, sketches"],
            "validation_data": {"validation_input_path": "img", "mask_sim_range": [0, 1, 2]},
            "generate": {"global_seed": 10021403011302841249, "db_path": f"models/DreamBooth_LoRA/{name}.safetensors"},
        }
        (folder / "configs" / f"{name}.yaml").write_text(yaml_text.dump(config))
    return folder
