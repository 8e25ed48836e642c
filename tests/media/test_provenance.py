"""What a file tells of how it was made: whole, for every prompt, without secrets, and enough to make it again."""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import ENGINE_ID, FakeEngine, animate_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import png

from pia_batch import __version__
from pia_batch.config import FORMATS, Format, RunConfig
from pia_batch.journal.layout import animation_name
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.validation import check
from pia_batch.media import codecs, provenance
from pia_batch.media.provenance import DIGITAL_SOURCE_TYPE, Provenance
from pia_batch.pipeline.stages import Arrange, FetchImages, Validate
from pia_batch.schema.columns import EFFECTIVE, Row
from pia_batch.storage.object_store import Store

ENGINES = {"default": "e" * 32, "other": "d" * 32}
SHA256 = "ab" * 32
FRAMES = np.zeros((2, 16, 16, 3), np.uint8)
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"

SPECIAL = "\"'<>&\\\n\r\t\x00\x07\x1b\x7f\x85\u2028\ufeff\ufffe]é🐱{}"
hostile = st.text(max_size=300) | st.text(alphabet=SPECIAL, max_size=80)


def config_of(**overrides: Any) -> RunConfig:
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return RunConfig.load(None, {"manifest": "m", "output": "o", "models": {"other": {}}} | dotted)


CONFIG = config_of()


def effective(row: Row, config: RunConfig = CONFIG) -> Row:
    """A manifest's row as `Animate` has it."""
    checked = check(pa.Table.from_pylist([row]), config, ENGINES)
    assert checked.rejected.to_pylist() == []
    made: Row = checked.requests.to_pylist()[0]
    if made["size"] == "auto":
        made |= {"width": 512, "height": 384}
    del made["image_bytes"]
    return made | {"fetched_sha256": SHA256}


def request(**columns: Any) -> Row:
    return {"request_id": "r1", "image": "images/cat.png", "prompt": "a cat wakes up"} | columns


def told_by(row: Row, config: RunConfig = CONFIG, fmt: Format = "gif") -> Provenance:
    """What a file says that was made of a row, read out of its bytes."""
    made = effective(row | {"format": fmt}, config)
    data = codecs.encode(FRAMES, fmt, 8, config.encoding, provenance.metadata_of(made, config, ENGINES[made["model"]]))
    told = Provenance.found_in(codecs.comments(data))
    assert told is not None
    return told


def key_of_row(row: Row, folder: Path, config: RunConfig = CONFIG) -> str:
    """The key of the only row of a JSONL manifest."""
    (folder / "again.jsonl").write_text(json.dumps(row) + "\n")
    (batch,) = Manifest.open(str(folder / "again.jsonl")).batches()
    checked = check(batch.table, config, ENGINES)
    assert checked.rejected.to_pylist() == []
    key: str = checked.requests["key"][0].as_py()
    return key


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_file_tells_everything_that_it_was_made_of(fmt: Format) -> None:
    row = request(seed=2**63 - 1, motion_curve=[1.0, 0.25], negative_prompt="blurry", guidance_scale=7.1)

    told = told_by(row, fmt=fmt)

    assert (told.request_id, told.prompt, told.image, told.model) == (
        "r1",
        "a cat wakes up",
        "images/cat.png",
        "default",
    )
    assert told.software == f"pia_batch {__version__}"
    assert told.key == effective(row | {"format": fmt})["key"]
    assert (told.engine_id, told.base, told.image_sha256) == ("e" * 32, "embedded", SHA256)
    assert told.encoder == CONFIG.encoding.identity(fmt)
    wanted = {"seed": 2**63 - 1, "motion_curve": [1.0, 0.25], "negative_prompt": "blurry", "guidance_scale": 7.1}
    assert wanted.items() <= told.settings.items()


def test_a_file_tells_by_which_preset_of_speed_it_was_drawn() -> None:
    fast = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"speed": "fast"})})

    assert [told_by(request(), config).speed for config in (CONFIG, fast)] == ["exact", "fast"]


@settings(max_examples=50, deadline=None)
@given(prompt=hostile, negative=hostile, request_id=st.text(min_size=1, max_size=100), fmt=st.sampled_from(FORMATS))
def test_any_text_comes_back_as_it_was_from_every_kind_of_file(
    prompt: str, negative: str, request_id: str, fmt: Format
) -> None:
    made = effective(request(format=fmt)) | {"prompt": prompt, "negative_prompt": negative, "request_id": request_id}
    tags = provenance.metadata_of(made, CONFIG, "e" * 32)
    assert tags is not None

    data = codecs.encode(FRAMES, fmt, 8, CONFIG.encoding, tags)

    told = Provenance.found_in(codecs.comments(data))
    assert told is not None
    assert (told.prompt, told.settings["negative_prompt"], told.request_id) == (prompt, negative, request_id)
    assert codecs.probe(data, fmt).num_frames == 2
    assert tags.comment.isascii()
    assert tags.comment.isprintable()
    (description,) = ET.fromstring(tags.xmp.decode()).iter(f"{RDF}Description")  # noqa: S314 - our own
    assert description.get(f"{IPTC}DigitalSourceType") == DIGITAL_SOURCE_TYPE
    assert description.get(f"{IPTC}AISystemVersionUsed") == __version__
    assert b"\0" not in tags.xmp


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("text", ["\x07" * 8192, "é" * 4096, "🐱" * 2048, '"<&>' * 2048])
def test_the_longest_prompts_that_are_allowed_fit(fmt: Format, text: str) -> None:
    told = told_by(request(prompt=f"a{text[1:]}", negative_prompt=text), fmt=fmt)

    assert told.settings["negative_prompt"] == text


motions = st.one_of(
    st.fixed_dictionaries({"motion_scale": st.integers(0, 8)}),
    st.fixed_dictionaries({"motion": st.sampled_from(["small", "medium", "large"]), "loop": st.booleans()}),
    st.fixed_dictionaries({"motion": st.sampled_from(["small", "medium", "large"]), "style": st.booleans()}),
    st.fixed_dictionaries({"motion_curve": st.lists(st.floats(0, 1), min_size=1, max_size=4)}),
    st.just({}),
)
sizes = st.one_of(
    st.fixed_dictionaries({"size": st.just("auto"), "long_side": st.sampled_from([64, 512])}),
    st.fixed_dictionaries({"width": st.sampled_from([64, 136]), "height": st.sampled_from([64, 512])}),
    st.just({}),
)
others = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "negative_prompt": hostile,
        "guidance_scale": st.floats(0, 100),
        "num_inference_steps": st.integers(2, 1000),
        "num_frames": st.integers(4, 32),
        "cond_frame": st.integers(0, 3),
        "clip_skip": st.integers(0, 11),
        "eta": st.floats(0, 1),
        "free_init_iters": st.integers(0, 10),
        "free_init_fast": st.booleans(),
        "free_init_spatial_stop": st.floats(0, 1),
        "fps": st.floats(1, 50),
        "format": st.sampled_from(FORMATS),
        "model": st.sampled_from(["default", "other"]),
        "image_sha256": st.just(SHA256),
    },
)


@pytest.mark.long
@settings(max_examples=30, deadline=None)
@given(
    row=st.builds(lambda *parts: {k: v for part in parts for k, v in part.items()}, motions, sizes, others),
    prompt=hostile.filter(str.strip),
)
def test_the_row_that_a_file_gives_back_has_its_key_whatever_the_config_defaults_to(
    tmp_path_factory: pytest.TempPathFactory, row: Row, prompt: str
) -> None:
    config = config_of(
        defaults__motion="large", defaults__loop=True, defaults__size="auto", defaults__num_inference_steps=9
    )
    folder = tmp_path_factory.getbasetemp()
    for chosen in (CONFIG, config):
        if chosen is config and (row.get("style") or row.get("motion_scale", 0) > 5):
            continue  # contradicts the default of a loop
        made = effective(request(prompt=prompt, **row), chosen)
        told = Provenance.of(made, chosen, ENGINES[made["model"]])

        assert key_of_row(told.manifest_row(), folder, chosen) == told.key == made["key"]


def test_the_row_of_an_image_that_the_manifest_held_needs_a_file_with_its_sha256(tmp_path: Path) -> None:
    row = {"request_id": "r1", "image_bytes": b"a picture", "prompt": "p"}
    made = effective(row)
    made["fetched_sha256"] = sha256 = hashlib.sha256(b"a picture").hexdigest()

    again = Provenance.of(made, CONFIG, "e" * 32).manifest_row()

    assert "image" not in again
    assert again["image_sha256"] == sha256
    assert key_of_row(again | {"image": "picture.png"}, tmp_path) == made["key"]


def test_no_credential_gets_in_and_the_file_says_that_something_is_missing() -> None:
    signed = "https://user:hunter2@host/cat.png?X-Amz-Signature=hunter2"
    config = config_of(model__base="s3://key:hunter2@bucket/base")
    made = effective(request()) | {"image": signed, "ip_adapter_image": "s3://key:hunter2@bucket/style.png"}

    told = Provenance.of(made, config, "e" * 32)

    assert "hunter2" not in told.comment
    assert b"hunter2" not in told.metadata.xmp
    assert told.image == "https://host/cat.png"
    assert list(told.withheld) == ["image", "ip_adapter_image"]
    assert list(Provenance.of(effective(request()), CONFIG, "e" * 32).withheld) == []


def test_columns_of_the_manifests_own_stay_out() -> None:
    assert "north" not in told_by(request(shop="north")).comment


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("SG161222/Realistic_Vision", "SG161222/Realistic_Vision"),
        ("s3://models/rv6/model.safetensors", "s3://models/rv6/model.safetensors"),
        ("/home/someone/models/rv6.safetensors", "rv6.safetensors"),
        ("~/models/rv6", "rv6"),
        ("file:///mnt/models/rv6", "rv6"),
    ],
)
def test_the_model_is_named_without_the_folders_of_a_machine(base: str, told: str) -> None:
    assert Provenance.of(effective(request()), config_of(model__base=base), "e" * 32).base == told


def test_nothing_is_told_where_the_config_says_so_and_that_is_another_key() -> None:
    silent = config_of(encoding__provenance=False)

    assert provenance.metadata_of(effective(request(), silent), silent, "e" * 32) is None
    assert effective(request(), silent)["key"] != effective(request())["key"]


def test_the_same_request_gives_the_same_tags_and_another_one_others() -> None:
    one, other = (provenance.metadata_of(effective(request(seed=seed)), CONFIG, "e" * 32) for seed in (1, 2))

    assert provenance.metadata_of(effective(request(seed=1)), CONFIG, "e" * 32) == one
    assert one != other


def test_every_column_that_decides_an_animation_is_told() -> None:
    told = set(Provenance.model_fields) | set(told_by(request(), fmt="mp4").settings)
    nulls = {name for name, value in effective(request()).items() if value is None}

    assert set(EFFECTIVE.names) - told - nulls - {"image_bytes"} == set()


@pytest.mark.parametrize("comments", [[], ["", "hello"], ['{"prompt":"p"}', "[1]", "7", "[" * 100_000, "\ud800"]])
def test_comments_of_others_are_passed_over(comments: list[str]) -> None:
    assert Provenance.found_in(comments) is None


def test_ours_is_found_among_others_also_with_names_of_a_later_version() -> None:
    mine = Provenance.of(effective(request()), CONFIG, "e" * 32)
    longer = json.loads(mine.comment)
    longer["pia_batch"]["mood"] = "cheerful"

    assert Provenance.found_in(["isom", json.dumps(longer)]) == mine


@pytest.mark.parametrize(
    "change", [{"schema_version": 2}, {"key": 7}, {"settings": []}, {"prompt": None}, {"withheld": "image"}]
)
def test_what_this_version_cannot_understand_is_refused_by_name(change: dict[str, Any]) -> None:
    told = json.loads(Provenance.of(effective(request()), CONFIG, "e" * 32).comment)
    told["pia_batch"] |= change

    with pytest.raises(ValueError, match=re.escape(next(iter(change)))):
        Provenance.found_in([json.dumps(told)])


@pytest.mark.parametrize("columns", [{}, {"image": None, "image_bytes": png(1)}, {"size": "auto", "long_side": 64}])
def test_what_the_stages_store_tells_the_key_that_they_committed(
    make_config: Callable[..., RunConfig], columns: Row
) -> None:
    table = pa.Table.from_pylist([request(image="images/1.png", format="webp", shop="north") | columns])
    config = make_config(table, defaults__num_inference_steps=1)
    manifest = Manifest.open(config.manifest)
    engines = {"default": ENGINE_ID}
    (batch,) = manifest.batches()
    requests = Arrange(config.images, manifest.folder)(Validate(config, engines)(batch.table))
    animate = animate_stage(config, FakeEngine(), engine_ids=engines)

    animate(FetchImages(config.images, manifest.folder)(requests))

    (stored,) = Store(config.output).list("animations/")
    told = Provenance.found_in(codecs.comments(Store(config.output).read(stored.name)))
    assert told is not None
    assert stored.name == animation_name(told.key, "webp")
    assert told.image_sha256 == hashlib.sha256(png(1)).hexdigest()
    row = {"image": "images/1.png"} | told.manifest_row()
    assert check(pa.Table.from_pylist([row]), config, engines).requests["key"].to_pylist() == [told.key]


def test_prompts_by_frame_are_in_the_file_in_words_and_give_the_same_key() -> None:
    keys = [{"frame": 0, "prompt": "a red circle"}, {"frame": 3, "prompt": "a blue square"}]
    made = effective(request() | {"prompt": None, "prompts": keys, "prompt_hold": 0.5})
    told = Provenance.found_in([Provenance.of(made, CONFIG, "e" * 32).comment])

    assert told is not None
    assert told.prompt is None
    assert told.settings["prompts"] == keys
    assert told.metadata.description == "0: a red circle / 3: a blue square"
    row = told.manifest_row()
    assert "prompt" not in row
    assert row["prompts"] == keys
    damaged = json.loads(told.comment)
    damaged["pia_batch"]["settings"]["prompts"] = [5]
    with pytest.raises(ValueError, match=re.escape("settings.prompts")):
        Provenance.found_in([json.dumps(damaged)])
