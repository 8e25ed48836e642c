from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from pia_batch.config import RunConfig
from pia_batch.config.messages import nearest
from pia_batch.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("placement.batchsize", "placement.batch_size"),
        ("placment", "placement"),
        ("modle", "model"),
        ("fps", "defaults.fps"),
        ("batch_size", "placement.batch_size"),
        ("defaults.batch_size", "placement.batch_size"),
        ("model.fps", "defaults.fps"),
        ("limits.max_fail", "limits.max_failed"),
        ("model.loras.0.scal", "model.loras.0.scale"),
        ("models.anime.bse", "models.anime.base"),
        ("models.anime.scheduler.nmae", "models.anime.scheduler.name"),
        ("model.ip_adapter.sorce", "model.ip_adapter.source"),
        ("zebra", None),
        ("", None),
        ("model..", "model"),
    ],
)
def test_the_key_that_was_meant_is_found(typed: str, meant: str | None) -> None:
    assert nearest(typed.split("."), RunConfig) == meant


def test_every_mistake_of_a_config_is_told_at_once_and_without_secrets() -> None:
    wrong = {
        "manifest": "m",
        "placement.batchsize": 2,
        "defaults.width": 65,
        "images.allow": ["ftp://user:hunter2@host/"],
        "model.loras": [{"source": "s3://key:hunter2@bucket/x", "scal": 1, "scale": 99}],
    }
    with pytest.raises(ConfigError) as told:
        RunConfig.load(None, wrong)

    text = str(told.value)
    assert text.startswith("command line: ")
    assert "placement.batchsize: unknown key; did you mean 'placement.batch_size'?" in text
    assert "output: required, and not given; give --output, or a config that has it" in text
    assert "defaults.width: must be a multiple of 8 (got 65)" in text
    assert "model.loras.0.scal: unknown key; did you mean 'model.loras.0.scale'?" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "defaults.motion_curve: must have at least 1 item (got [])"),
        ([0.5] * 2000, "defaults.motion_curve: must have at most 1024 items (got 2000)"),
        ([2], "defaults.motion_curve.0: must be less than or equal to 1 (got 2)"),
        ([0.5, None], "defaults.motion_curve.1: must be a number (got null)"),
    ],
)
def test_a_list_is_refused_for_its_length_or_for_its_items_and_not_for_what_follows(
    value: list[float | None], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.load(None, {"manifest": "m", "output": "o", "defaults.motion_curve": value})

    assert str(refused.value) == f"command line: {message}"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("placement.num_gpus", "none", "must be a number (got 'none')"),
        ("placement.batch_size", 4.5, "must be a whole number (got 4.5)"),
        ("placement.batch_size", "four", "must be a whole number (got 'four')"),
        ("placement.batch_size", 99, "must be less than or equal to 64 (got 99)"),
        ("defaults.loop", "perhaps", "must be true or false (got 'perhaps')"),
        ("defaults.format", "avi", "must be 'mp4', 'gif', 'webp', 'png_zip' or 'webm' (got 'avi')"),
        ("images.allow", "s3://photos", "must be a list, such as [a, b] (got 's3://photos')"),
        ("model", "SG161222/Realistic", "must be a section, with its keys below it (got 'SG161222/Realistic')"),
        ("model.sha256", "0f", "must be a mapping of names to values (got '0f')"),
        ("run_id", 7, "must be a text (got 7); in YAML, write such a text in quotes"),
        ("images.background", None, "must be a text (got null); in YAML, write a text that begins with # in quotes"),
        (
            "run_date",
            "tomorrow",
            "must be a date such as 2026-11-22, or an hour such as 2026-11-22T05 (got 'tomorrow')",
        ),
    ],
)
def test_a_wrong_value_is_told_in_the_words_of_a_config(key: str, value: object, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RunConfig.load(None, {"manifest": "m", "output": "o", key: value})
    assert str(raised.value) == f"command line: {key}: {told}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


WRONG = (
    "!? \x01",
    "ftp://x",
    "",
    -1e9,
    True,
    None,
    [],
    [["?"]],
    {"x y": ""},
    {"a": [1]},
    {"promt": "b"},
    {"status": "b"},
)
ABOUT_OTHER_KEYS = ("unknown key", "required, and not given", "has no effect without upscale.model")


@pytest.mark.parametrize("key", list(_keys(RunConfig)))
def test_every_refusal_of_a_value_shows_the_value(key: str) -> None:
    for value in WRONG:
        try:
            RunConfig.load(None, {"manifest": "m", "output": "o", key: value})
        except ConfigError as refused:
            line = str(refused)
            assert "(got " in line or any(words in line for words in ABOUT_OTHER_KEYS), line
            assert "\n" not in line


def test_a_path_that_is_no_text_in_the_encoding_of_the_process_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"manifest: not text in the encoding of this process, .*; set PYTHONUTF8=1"):
        RunConfig.load(None, {"manifest": "/gr\udcc3\udcb6.jsonl", "output": "out"})
