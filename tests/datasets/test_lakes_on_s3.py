"""Lance, Delta and Iceberg on a real S3 server: read as sources, and written as targets of an export."""

from __future__ import annotations

import os
from pathlib import Path

import foreign_datasets as foreign
import lance
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from finished_outputs import animation, make_output
from inputs import png
from pyiceberg.catalog.sql import SqlCatalog

from pia_batch import export
from pia_batch.datasets.kinds import kind_of
from pia_batch.datasets.sources import Place, ReadOptions
from pia_batch.storage.object_store import Store

pytestmark = pytest.mark.s3


def storage() -> dict[str, str]:
    """Return the server as the libraries of Lance and Delta name it."""
    return {
        "aws_endpoint": os.environ["AWS_ENDPOINT_URL"],
        "allow_http": "true",
        "aws_region": "us-east-1",
        "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
    }


def upload(folder: Path, uri: str) -> str:
    store = Store(uri)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.replace(str(path.relative_to(folder)), path.read_bytes())
    return uri


def images_of(uri: str) -> tuple[str, dict[str, bytes]]:
    place = Place.of(uri)
    kind = kind_of(place, None)
    source = kind.open(place, ReadOptions())
    rows = [row for piece in source.pieces for some in source.read(piece) for row in some.table.to_pylist()]
    return kind.name, {row["id"]: row["image_bytes"] for row in rows}


EXPECTED = {f"row-{k}": png(k) for k in (0, 2, 3)}


@pytest.mark.long
def test_lance_and_delta_are_read_from_s3_without_their_deleted_rows(s3: str, tmp_path: Path) -> None:
    assert images_of(upload(foreign.write_lance(tmp_path / "a"), f"{s3}/a.lance")) == ("lance", EXPECTED)
    assert images_of(upload(foreign.write_delta(tmp_path / "b"), f"{s3}/b")) == ("delta", EXPECTED)


def test_iceberg_is_read_from_s3_without_its_deleted_rows(s3: str, tmp_path: Path) -> None:
    options = {
        "s3.endpoint": os.environ["AWS_ENDPOINT_URL"],
        "s3.region": "us-east-1",
        "s3.access-key-id": os.environ["AWS_ACCESS_KEY_ID"],
        "s3.secret-access-key": os.environ["AWS_SECRET_ACCESS_KEY"],
    }
    catalog = SqlCatalog("test", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=s3, **options)
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.photos", schema=foreign.image_table(4).schema)
    table.append(foreign.image_table(4))
    table.delete("id = 'row-1'")
    assert images_of(f"{s3}/shop/photos") == ("iceberg", EXPECTED)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("s3", "local_ray")  # in this order: workers need the keys of the server
def test_lance_and_delta_are_written_to_s3_and_read_by_their_libraries(s3: str, tmp_path: Path) -> None:
    """On the Ray of the tests: one of the export's own has a token, and Ray cannot start without one later."""
    output = str(tmp_path / "out")
    make_output(Store(output), ["mp4"] * 4)
    for name in ("lance", "delta"):
        assert export(output, f"{s3}/{name}", name, shard_size="3").rows == 4
    dataset = lance.dataset(f"{s3}/lance", storage_options=storage())
    assert [blob.readall() for blob in dataset.take_blobs("video", indices=[0, 3])] == [
        animation(0, "mp4"),
        animation(3, "mp4"),
    ]
    table = DeltaTable(f"{s3}/delta", storage_options=storage())
    rows = pa.table(table.to_pyarrow_dataset().to_table()).sort_by("request_id").to_pylist()
    assert [row["video"] for row in rows] == [animation(k, "mp4") for k in range(4)]
