"""The stages over blocks of requests, without Ray."""

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from animated import animated, fetched, stored, validated
from inputs import png, requests_table
from PIL import Image
from s3_recorder import recording

from pia_batch.config import RunConfig
from pia_batch.errors import StorageError
from pia_batch.manifest.reader import Manifest
from pia_batch.media import codecs
from pia_batch.pipeline.stages import Arrange, DropFinished, FetchImages
from pia_batch.schema.keys import KeySet, keys_from_hex

MakeConfig = Callable[..., RunConfig]


def test_validate_drops_what_the_manifest_rules_out_and_fills_in_defaults(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, motion_scale=pa.array([None, 99, 3]), num_frames=[16, 16, 16]))

    requests = validated(config)

    assert requests["request_id"].to_pylist() == ["r000", "r002"]
    assert requests["motion_scale"].to_pylist() == [config.defaults.motion_scale, 3]
    assert all(len(key) == 32 for key in requests["key"].to_pylist())


def test_drop_finished_keeps_the_others_in_order(make_config: MakeConfig) -> None:
    requests = validated(make_config(requests_table(5)))
    finished = KeySet.of(keys_from_hex(requests["key"].take([3, 1])))

    left = DropFinished(finished)(requests)

    assert left["request_id"].to_pylist() == ["r000", "r002", "r004"]
    assert left.schema == requests.schema
    assert DropFinished(KeySet.of(keys_from_hex(requests["key"])))(requests).num_rows == 0
    assert DropFinished(finished)(requests.slice(0, 0)).num_rows == 0


def test_fetched_pixels_are_rgb_of_the_size_asked_for(make_config: MakeConfig) -> None:
    config = make_config(requests_table(2, width=[64, 24], height=[32, 40]))

    rows = fetched(config).to_pylist()

    assert [len(row["pixels"]) for row in rows] == [64 * 32 * 3, 24 * 40 * 3]
    assert "image_bytes" not in rows[0]
    assert [row["fetched_sha256"] for row in rows] == [hashlib.sha256(png(k)).hexdigest() for k in range(2)]


def test_each_kind_of_bad_image_fails_its_own_row_and_no_other(make_config: MakeConfig) -> None:
    sha256 = hashlib.sha256(png(0)).hexdigest()
    images = {
        "images/0.png": None,
        "images/gone.png": "image_unavailable",
        "images": "image_unavailable",
        "requests.parquet": "image_unreadable",
        "https://169.254.169.254/latest": "image_not_allowed",
        "s3://key:secret@bucket/x.png": "image_unavailable",
        "images/1.png": "image_mismatch",
        "s3://[bucket/x.png": "image_unavailable",
        "images/2.png": None,
    }
    promised = pa.array([sha256.upper() if name in ("images/0.png", "images/1.png") else None for name in images])
    config = make_config(requests_table(len(images), image=list(images), image_sha256=promised, format=["gif"] * 9))

    rows = animated(config)

    assert {row["image"]: row["error_kind"] for row in rows.values()} == {
        name.replace("key:secret@", ""): kind for name, kind in images.items()
    }
    for row in rows.values():
        assert row["status"] == ("failed" if row["error_kind"] else "succeeded")
        assert bool(row["error"]) == (row["animation_uri"] is None) == (row["status"] == "failed")
        assert "secret" not in str(row)
    mismatch = rows["r006"]
    assert mismatch["image_sha256"] == hashlib.sha256(png(1)).hexdigest()
    assert sha256 in mismatch["error"]
    assert mismatch["image_sha256"] in mismatch["error"]
    assert len(stored(config)) == 2


def test_an_image_above_the_caps_is_refused(make_config: MakeConfig) -> None:
    config = make_config(requests_table(1), images__max_bytes=100, images__max_pixels=10)
    (row,) = fetched(config).to_pylist()
    assert (row["error_kind"], row["pixels"]) == ("image_unavailable", None)
    assert "more than 100 bytes" in row["error"]

    config = make_config(requests_table(1), images__max_pixels=10)
    (row,) = fetched(config).to_pylist()
    assert (row["error_kind"], row["pixels"]) == ("image_unreadable", None)


def test_images_inside_the_manifest_are_animated(make_config: MakeConfig) -> None:
    data = [png(9), b"no image", None]
    table = requests_table(3, image=pa.array([None, None, "images/0.png"]), image_bytes=pa.array(data, pa.binary()))
    config = make_config(table, defaults__format="gif")

    rows = animated(config)

    assert [rows[f"r{k:03d}"]["error_kind"] for k in range(3)] == [None, "image_unreadable", None]
    assert rows["r000"]["image_sha256"] == hashlib.sha256(png(9)).hexdigest()
    assert rows["r000"]["image"] is None


def test_importing_the_stages_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys, pia_batch.pipeline.stages;"
        "print(sorted({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def arranged(config: RunConfig) -> pa.Table:
    return Arrange(config.images, Manifest.open(config.manifest).folder)(validated(config))


def write_png(config: RunConfig, name: str, width: int, height: int, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(io.BytesIO(png(0, width, height)))
    image.save(Path(config.manifest) / "images" / name, exif=exif)


def test_what_can_share_a_batch_stands_together_and_otherwise_nothing_moves(make_config: MakeConfig) -> None:
    table = requests_table(6, num_frames=[4, 8, 4, 8, 4, 8], width=[64, 64, 128, 64, 64, None])

    rows = arranged(make_config(table)).to_pylist()

    assert [(row["request_id"], row["num_frames"], row["width"]) for row in rows] == [
        ("r000", 4, 64),
        ("r004", 4, 64),
        ("r002", 4, 128),
        ("r001", 8, 64),
        ("r003", 8, 64),
        ("r005", 8, 64),
    ]


def test_rows_of_any_length_that_share_unet_calls_stand_together(make_config: MakeConfig) -> None:
    context = [None, "windows", "freenoise", None, "chain", "windows"]
    table = requests_table(6, num_frames=[16, 100, 17, 24, 40, 64], context=context, context_length=[16] * 6)

    rows = arranged(make_config(table)).to_pylist()

    assert [(row["request_id"], row["num_frames"]) for row in rows] == [
        ("r000", 16),
        ("r004", 40),
        ("r005", 64),
        ("r001", 100),
        ("r002", 17),
        ("r003", 24),
    ]


def test_a_size_from_the_image_keeps_its_shape_and_is_the_same_however_it_was_found(make_config: MakeConfig) -> None:
    config = make_config(
        requests_table(4, image=[f"images/{name}.png" for name in ("wide", "upright", "small", "gone")]),
        defaults__size="auto",
        defaults__long_side=256,
        defaults__num_frames=2,
        defaults__format="png_zip",
    )
    write_png(config, "wide.png", 640, 330)
    write_png(config, "upright.png", 300, 200, orientation=6)
    write_png(config, "small.png", 30, 60)
    wanted = {"r000": (256, 128), "r001": (192, 256), "r002": (64, 64), "r003": (None, None)}

    early = {row["request_id"]: (row["width"], row["height"]) for row in arranged(config).to_pylist()}
    late = {row["request_id"]: (row["width"], row["height"]) for row in fetched(config).to_pylist()}
    rows = animated(config)

    assert early == late == wanted
    assert {name: (row["width"], row["height"]) for name, row in rows.items()} == wanted
    assert (rows["r003"]["error_kind"], rows["r000"]["size"], rows["r000"]["long_side"]) == (
        "image_unavailable",
        "auto",
        256,
    )
    frames = codecs.decode(stored(config)[rows["r001"]["animation_uri"]], "png_zip")
    assert frames.shape == (2, 256, 192, 3)


def test_the_originals_sizes_are_the_images_own_in_steps_of_8(make_config: MakeConfig) -> None:
    config = make_config(
        requests_table(2, image=["images/wide.png"] * 2, model=["default", "paper"]),
        defaults__size="auto",
        defaults__long_side=256,
        models__paper__arithmetic="original",
    )
    write_png(config, "wide.png", 640, 420)
    wanted = [("default", 256, 192, 256 * 192 * 3), ("paper", 256, 168, 256 * 168 * 3)]
    folder = Manifest.open(config.manifest).folder
    early = Arrange(config.images, folder, config.original_models)(validated(config))
    late = FetchImages(config.images, folder, config.original_models)(early)

    assert [(row["model"], row["width"], row["height"], len(row["pixels"])) for row in late.to_pylist()] == wanted


def test_images_in_the_manifest_have_the_same_cap_as_others(make_config: MakeConfig) -> None:
    table = requests_table(2, image=[None, None], image_bytes=[png(0), png(1) + bytes(9000)], format=["gif"] * 2)

    rows = animated(make_config(table, images__max_bytes=max(len(png(0)), len(png(1)))))

    assert [rows[name]["error_kind"] for name in sorted(rows)] == [None, "image_unavailable"]
    assert "images.max_bytes" in rows["r001"]["error"]


def test_a_store_that_refuses_every_image_ends_the_stage_and_fails_no_request(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording() as server:
        server.refusal = (400, "ExpiredToken")
        keys = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        images = [f"s3://photos/{k}.png" for k in range(3)]
        config = make_config(requests_table(3, image=images), images__allow=["s3://photos"])

        with pytest.raises(StorageError, match=r"s3://photos/\d\.png .*ExpiredToken.*renew them"):
            fetched(config)
