"""Evaluations of outputs with clips of known content: every row, every error, and what a killed one leaves."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluated import Frames, key_of, publish_output, shifted, texture, write_clip, write_dino
from PIL import Image

import pia_batch
from pia_batch import __version__, cli
from pia_batch.config import ImagesConfig
from pia_batch.errors import ConfigError
from pia_batch.evaluation import job, network_files, publication, work
from pia_batch.evaluation.actor import EvaluateActor, piece_row
from pia_batch.evaluation.clips import ClipReader
from pia_batch.evaluation.evaluator import Evaluator
from pia_batch.evaluation.flow import FlowMeasures
from pia_batch.evaluation.network_files import NetworkSource
from pia_batch.evaluation.pixels import pixel_measures
from pia_batch.evaluation.work import RunResults
from pia_batch.journal import layout
from pia_batch.journal.garbage_collection import find_garbage
from pia_batch.journal.log import Journal
from pia_batch.pipeline.attempts import AttemptTracker
from pia_batch.storage.object_store import Store

CLIPS: dict[str, Frames | None] = {
    "moving": shifted(8, 64, (2, 1)),
    "still": np.repeat(texture(64, 3)[None], 8, axis=0),
    "flickering": np.stack([texture(64, 4) // 2 + 60 * (k % 2) for k in range(6)]).astype(np.uint8),
    "one frame": shifted(1, 64, seed=5),
    "failed": None,
    "wide": shifted(5, 64, (1, 0), seed=6)[:, :32],
}


@pytest.fixture
def output(store: Store) -> Store:
    publish_output(store, CLIPS)
    return store


def rows_of(store: Store, evaluation_id: str) -> list[dict[str, Any]]:
    folder = Path(store.uri.removeprefix("file://"), "evaluations", evaluation_id)
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_every_request_gets_one_row_with_its_measures(output: Store) -> None:
    seen = []
    found = pia_batch.evaluate(output.uri, on_progress=seen.append)

    rows = {row["request_id"]: row for row in rows_of(output, found.evaluation_id)}
    assert [row["request_id"] for row in rows_of(output, found.evaluation_id)] == sorted(CLIPS)
    flow = FlowMeasures()
    for request_id, frames in CLIPS.items():
        row = rows[request_id]
        assert row["key"] == key_of(f"{output.uri} {request_id}")
        if frames is None:
            assert row["error_kind"] == "not_animated"
            assert {row[name] for name in found.measures} == {None}
        else:
            assert {name: row[name] for name in found.measures} == pixel_measures(frames) | flow(frames, 8.0)
            assert row["error_kind"] is None
    assert (seen[0].done, seen[-1].done, seen[-1].requests) == (0, 6, 6)
    assert found.summary["errors"] == {"not_animated": 1}
    assert found.summary["measures"]["flicker"]["count"] == 4
    assert pia_batch.evaluate(output.uri) == found  # complete: nothing is measured again


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_an_evaluation_that_was_killed_continues_and_ends_with_the_same_rows(output: Store) -> None:
    job.evaluate(output.uri, evaluation_id="killed", flow=False)
    whole = rows_of(output, "killed")
    for name in ("_SUCCESS.json", "summary.json", "part-00000.parquet"):
        output.delete(f"evaluations/killed/{name}")
    kept = layout.evaluation_piece("killed", 2)
    before = output.stat(kept).modified_s
    for number in (0, 3, 5):
        output.delete(layout.evaluation_piece("killed", number))

    seen = []
    job.evaluate(output.uri, evaluation_id="killed", flow=False, on_progress=seen.append)

    assert rows_of(output, "killed") == whole
    assert seen[0].done == 3
    assert output.stat(kept).modified_s == before


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_a_clip_that_cannot_be_read_is_a_row_with_its_kind(output: Store, tmp_path: Path) -> None:
    def name(request_id: str) -> str:
        return layout.animation_name(key_of(f"{output.uri} {request_id}"), "zip")

    output.delete(name("moving"))
    output.replace(name("still"), output.read(name("still"))[:-9])
    damaged = bytearray(output.read(name("flickering")))
    damaged[200:210] = b"0123456789"
    output.replace(name("flickering"), bytes(damaged))
    (tmp_path / "manifest" / "wide.png").unlink()
    clip = write_clip(tmp_path / "clip")

    found = job.evaluate(output.uri, clip=str(clip), flow=False)

    rows = {row["request_id"]: row for row in rows_of(output, found.evaluation_id)}
    kinds = {request_id: row["error_kind"] for request_id, row in rows.items()}
    assert kinds == {
        "moving": "missing",
        "still": "size",
        "flickering": "content",
        "one frame": None,
        "failed": "not_animated",
        "wide": "image_unavailable",
    }
    assert rows["wide"]["clip_i"] is None
    assert rows["wide"]["clip_t"] is not None
    assert rows["wide"]["flicker"] is not None


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("dino"))


def test_the_networks_measure_what_transformers_computes(output: Store, clip_folder: Path, dino_folder: Path) -> None:
    import torch  # noqa: PLC0415 - slow
    from transformers import (  # noqa: PLC0415
        BitImageProcessorPil,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTokenizerFast,
        ViTModel,
    )

    results = RunResults.open(output, None)
    sources = [NetworkSource("clip", str(clip_folder)), NetworkSource("dino", str(dino_folder))]
    files = {source.role: network_files.find(source) for source in sources}
    names = [*job.EvaluationRequest("", "", flow=False, networks={"clip": {}, "dino": {}}).names]
    networks = {role: (each.pinned(), each.identity()) for role, each in files.items()}
    evaluator = Evaluator(ClipReader(output, results.folder, ImagesConfig()), names, networks, "cpu", 2, 3)  # type: ignore[arg-type]

    rows = {row["request_id"]: row for row in evaluator(results.read(results.parts[0][0])).to_pylist()}

    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizerFast.from_pretrained(clip_folder)
    dino = ViTModel.from_pretrained(dino_folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": 32}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for request_id, frames in CLIPS.items():
        if frames is None:
            continue
        pictures = [Image.fromarray(frame) for frame in frames]
        with torch.no_grad():
            pixels = CLIPImageProcessorPil(**size)(pictures, return_tensors="pt").pixel_values
            vectors = model.get_image_features(pixel_values=pixels).pooler_output.double().numpy()
            text = tokenizer([f"a picture of {request_id}"], return_tensors="pt")
            prompt = model.get_text_features(**text).pooler_output.double().numpy()[0]
            prepare = BitImageProcessorPil(**size, image_mean=mean, image_std=std)
            tokens = dino(pixel_values=prepare(pictures, return_tensors="pt").pixel_values).last_hidden_state
        classes = tokens[:, 0].double().numpy()
        image, alike = vectors[0], [_cos(vectors[0], vector) for vector in vectors]  # the image is the first frame
        expected = {
            "clip_i": np.mean(alike),
            "clip_i_min": min(alike),
            "clip_t": np.mean([_cos(prompt, vector) for vector in vectors]),
        }
        if len(frames) > 1:
            steps = [max(0, _cos(a, b)) for a, b in itertools.pairwise(classes)]
            likeness = max(max(0, _cos(classes[0], each)) for each in classes)
            expected |= {
                "clip_i_rest": np.mean(alike[1:]),
                "subject_consistency": np.mean([_both(vectors, t) for t in range(1, len(frames))]),
                "dino_subject_consistency": np.mean([_both(classes, t) for t in range(1, len(frames))]),
                "dino_i2v": 0.4 * likeness + 0.3 * np.mean(steps) + 0.3 * min(steps),
            }
        assert _cos(image, image) == pytest.approx(1)
        found = {name: rows[request_id][name] for name in expected}
        assert found == pytest.approx(expected, abs=2e-6), request_id


def _cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _both(vectors: np.ndarray, t: int) -> float:
    return (max(0, _cos(vectors[t - 1], vectors[t])) + max(0, _cos(vectors[0], vectors[t]))) / 2


def test_a_row_does_not_depend_on_the_clips_next_to_it(output: Store, clip_folder: Path) -> None:
    results = RunResults.open(output, None)
    files = network_files.find(NetworkSource("clip", str(clip_folder)))
    reader = ClipReader(output, results.folder, ImagesConfig())
    names = ["flicker", "clip_i", "clip_t"]
    networks = {"clip": (files.pinned(), files.identity())}
    together = Evaluator(reader, names, networks, "cpu", 3, 8)(results.read(results.parts[0][0]))
    alone = Evaluator(reader, names, networks, "cpu", 1, 1)
    for at, row in enumerate(together.to_pylist()):
        single = alone(results.read(results.parts[0][0]).slice(at, 1)).to_pylist()[0]
        assert {name: single[name] for name in names} == pytest.approx({name: row[name] for name in names}, abs=1e-6)


def test_the_id_follows_what_is_measured(output: Store, clip_folder: Path) -> None:
    clip = network_files.find(NetworkSource("clip", str(clip_folder))).identity()
    plain = job.EvaluationRequest("run", "digest", flow=True)
    others = [
        job.EvaluationRequest("run-2", "digest", flow=True),
        job.EvaluationRequest("run", "other", flow=True),
        job.EvaluationRequest("run", "digest", flow=False),
        job.EvaluationRequest("run", "digest", flow=True, networks={"clip": clip}),
        job.EvaluationRequest("run", "digest", flow=True, networks={"clip": clip | {"others": {}}}),
    ]
    assert len({each.default_id() for each in [plain, *others]}) == 6
    assert plain.default_id() == job.EvaluationRequest("run", "digest", flow=True).default_id()
    assert work.begin(output, "named", plain, 6, 1) == work.begin(output, "named", plain, 600, 4)
    with pytest.raises(ConfigError, match="evaluation named measures something else: other measures"):
        work.begin(output, "named", others[2], 6, 1)


def test_a_clip_that_ends_its_worker_every_time_is_a_row_and_its_neighbours_are_measured(output: Store) -> None:
    results = RunResults.open(output, None)
    table = results.read(results.parts[0][0])
    control = AttemptTracker(job.MAX_ATTEMPTS, returns_outcomes=False)
    arguments = {"reader": ClipReader(output, "", ImagesConfig()), "names": ["flicker"], "networks": {}}
    actor = EvaluateActor(__version__, output, "e", control, 60, device="cpu", threads=1, batch_size=1, **arguments)
    killer = key_of(f"{output.uri} moving")
    control.begin(["piece 0"])  # by a worker that died
    for _ in range(job.MAX_ATTEMPTS - 1):  # and so did those which measured this clip alone
        control.begin([killer])
        control.begin_alone(killer)

    done = actor(pa.Table.from_pylist([piece_row(0, table)]))

    committed = pq.read_table(pa.BufferReader(output.read(layout.evaluation_piece("e", 0))))
    rows = {row["request_id"]: row for row in committed.to_pylist()}
    assert done.to_pylist() == [{"number": 0, "rows": 6, "frames": 28, "errors": 1}]
    assert rows["moving"]["error_kind"] == "worker_crash"
    assert rows["still"]["flicker"] == 1.0


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("local_ray")
def test_a_clip_that_hangs_is_a_row_and_its_neighbours_are_measured(output: Store) -> None:
    pipe = Path(output.uri.removeprefix("file://"), layout.animation_name(key_of(f"{output.uri} moving"), "zip"))
    pipe.unlink()
    os.mkfifo(pipe)  # who opens it for reading waits for a writer, without end

    found = job.evaluate(output.uri, flow=False, clip_timeout_s=2)

    rows = {row["request_id"]: row for row in rows_of(output, found.evaluation_id)}
    assert list(rows) == sorted(CLIPS)
    assert (rows["moving"]["error_kind"], rows["moving"]["flicker"]) == ("timeout", None)
    assert "took over 2 s, 3 times; raise --clip-timeout" in rows["moving"]["error"]
    assert found.summary["errors"] == {"not_animated": 1, "timeout": 1}


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_time_limit_is_above_zero(output: Store, seconds: float) -> None:
    with pytest.raises(ConfigError, match="--clip-timeout: invalid value"):
        job.evaluate(output.uri, clip_timeout_s=seconds)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"run_id": "never"}, "run 'never' has no published results"),
        ({"evaluation_id": "../up"}, "--id: invalid value"),
        ({"clip": "/nowhere/clip"}, "--clip: there is no folder or file"),
        ({"dino": "{clip}"}, "--dino: .* is of another kind .got model_type 'clip', expected a ViTModel"),
        ({"clip": "{dino}"}, "--clip: .* is of another kind .got model_type 'vit', expected a CLIPModel"),
        ({"clip": "{bare}"}, "has no tokenizer.json, nor vocab.json and merges.txt"),
        ({"clip": "{clip}/model.safetensors"}, "is a file; name the folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_ray_starts(
    arguments: dict[str, str], problem: str, output: Store, clip_folder: Path, dino_folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((clip_folder / name).read_bytes())
    folders = {"clip": clip_folder, "dino": dino_folder, "bare": bare}
    given = {name: value.format(**folders) for name, value in arguments.items()}

    with pytest.raises(ConfigError, match=problem):
        job.evaluate(output.uri, **given)  # type: ignore[arg-type]


def test_only_unused_objects_of_evaluations_are_garbage(output: Store) -> None:
    for name in ("_evaluation.json", "part-00000.parquet", "summary.json", "_SUCCESS.json", "_pieces/00000000.parquet"):
        output.replace(f"evaluations/done/{name}", b"x")
    for name in ("_evaluation.json", "_pieces/00000000.parquet"):
        output.replace(f"evaluations/left/{name}", b"x")

    def found(before_s: float) -> list[str]:
        items = find_garbage(Journal(output), before_s)
        return sorted(item.info.name for item in items if item.kind == "evaluations")

    assert found(0) == []
    assert found(float("inf")) == [
        "evaluations/done/_pieces/00000000.parquet",
        "evaluations/left/_evaluation.json",
        "evaluations/left/_pieces/00000000.parquet",
    ]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_the_command_prints_the_figures(output: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", output.uri, "--no-flow", "--json", "--set", "placement.max_engines=2"])

    payload = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert payload["requests"] == 6
    assert publication.find(output, None).evaluation_id == payload["evaluation_id"]
    assert list(payload["measures"]) == ["flicker", "second_difference", "loop_gap"]


def test_only_the_placement_can_be_set(output: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", output.uri, "--set", "model.base=x"])

    assert end.value.code == 2
    assert "only keys of placement." in capsys.readouterr().err
