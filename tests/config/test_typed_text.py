from typing import Any, get_origin

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from pia_batch.cli.options import overrides
from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError, PiaBatchError


def value_of(key: str, text: str) -> Any:
    return overrides(None, None, [f"{key}={text}"])[key]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        # Keys of text: as written, whatever YAML would read.
        ("images.background", "#00ff80", "#00ff80"),
        ("run_id", "007", "007"),
        ("run_id", "2026-11-22", "2026-11-22"),
        ("run_id", "1e3", "1e3"),
        ("run_id", "on", "on"),
        ("run_id", "true", "true"),
        ("run_id", "~", "~"),
        ("run_id", "{date}", "{date}"),
        ("run_id", "null", None),
        ("run_id", "", None),
        ("run_date", "2026-11-22", "2026-11-22"),
        ("run_date", "2026-11-22T05", "2026-11-22T05"),
        ("budget.deadline", "06:00", "06:00"),
        ("budget.deadline", "2026-11-22T06:00:00Z", "2026-11-22T06:00:00Z"),
        ("budget.deadline", "null", None),
        ("budget.priority", "yes", "yes"),
        ("defaults.negative_prompt", "blurry: [low], #1 {x}", "blurry: [low], #1 {x}"),
        ("defaults.negative_prompt", "", ""),
        ("defaults.negative_prompt", "null", None),
        ("defaults.negative_prompt", " two  words ", " two  words "),
        ("manifest", "s3://bucket/{date:%Y}/a b#1.parquet", "s3://bucket/{date:%Y}/a b#1.parquet"),
        ("manifest", "[x]", "[x]"),
        ("output", "@out", "@out"),
        ("output", "*out", "*out"),
        ("output", "!out", "!out"),
        ("output", "'quoted'", "'quoted'"),
        ("params.country", "no", "no"),
        ("params.version", "1.10", "1.10"),
        ("params.id", "null", "null"),
        ("model.revision", "0123456", "0123456"),
        ("model.revision", "1e10", "1e10"),
        ("model.dtype", "float16", "float16"),
        ("model.name", "0x10", "0x10"),
        ("models.toon.base", "a: b", "a: b"),
        ("models.toon.revision", "null", None),
        ("model.sha256.unet", "0000", "0000"),
        ("model.ip_adapter.revision", "007", "007"),
        ("placement.ray_address", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("on_finish.webhook", "$HOOK", "$HOOK"),
        ("on_finish.headers.X-Token", "TOKEN", "TOKEN"),
        # Numbers and booleans: YAML, or the text for the message.
        ("placement.batch_size", "4", 4),
        ("placement.batch_size", "007", 7),
        ("placement.batch_size", " 4 ", 4),
        ("placement.batch_size", "#4", "#4"),
        ("placement.batch_size", "", ""),
        ("placement.batch_size", "null", None),
        ("placement.batch_size", "2026-11-22", "2026-11-22"),
        ("placement.batch_size", "[4]", "[4]"),
        ("placement.batch_size", "a: b: c", "a: b: c"),
        ("placement.max_models", "null", None),
        ("placement.max_models", "~", None),
        ("placement.max_models", "", None),
        ("limits.lease_wait_s", ".inf", float("inf")),
        ("budget.sample", "1%", "1%"),
        ("budget.sample", "0.5", 0.5),
        ("defaults.loop", "true", True),
        ("defaults.loop", "#on", "#on"),
        ("model.compile", "auto", "auto"),
        ("model.compile", "false", False),
        ("model.scheduler.settings.eta", "0.5", 0.5),
        ("model.scheduler.settings.name", "#x", "#x"),
        ("model.scheduler.settings.clip_sample", "false", False),
        # Lists, mappings and sections: YAML, with their texts as written.
        ("images.allow", "[s3://photos/, /mnt/007]", ["s3://photos/", "/mnt/007"]),
        ("images.allow", "s3://photos/", "s3://photos/"),
        ("images.allow", "#photos", "#photos"),
        ("on_finish.command", "[notify, 007, 2026-11-22]", ["notify", "007", "2026-11-22"]),
        ("on_finish.command", "[on, null, '#1']", ["on", "null", "#1"]),
        ("on_finish.on", "[failure]", ["failure"]),
        ("defaults.motion_curve", "[0, 0.5, 1]", [0, 0.5, 1]),
        ("defaults.motion_curve", "null", None),
        ("params", "{country: no, version: 1.10}", {"country": "no", "version": "1.10"}),
        ("params", "{5: a}", {"5": "a"}),
        ("model.sha256", "{model.safetensors: 0000}", {"model.safetensors": "0000"}),
        ("model.loras", "[{source: a, revision: 007, scale: 2}]", [{"source": "a", "revision": "007", "scale": 2}]),
        ("model.ip_adapter", "null", None),
        ("model.ip_adapter", "{source: a, revision: null}", {"source": "a", "revision": None}),
        ("images", "{background: '#00ff80', threads: 4}", {"background": "#00ff80", "threads": 4}),
        ("defaults.motion_curve", "", None),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_keys_own_type(key: str, text: str, value: Any) -> None:
    found = value_of(key, text)

    assert found == value
    assert type(found) is type(value)


def text_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        if field.annotation is str:
            keys.append(prefix + name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += text_keys(field.annotation, f"{prefix}{name}.")
        elif get_origin(field.annotation) is dict and name != "models":
            keys += [] if "bool" in str(field.annotation) else [f"{prefix}{name}.entry"]
    return keys


TEXT_KEYS = text_keys(RunConfig)
PRINTABLE = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))


def test_the_keys_of_text_are_found() -> None:
    assert {"manifest", "output", "images.background", "params.entry", "on_finish.headers.entry"} <= set(TEXT_KEYS)


@given(st.sampled_from(TEXT_KEYS), PRINTABLE)
@example("images.background", "#00ff80")
@example("manifest", "a=b")
def test_every_printable_text_arrives_unchanged_at_a_key_of_text(key: str, text: str) -> None:
    assert value_of(key, text) == text


@given(PRINTABLE.filter(lambda text: text not in ("", "null")))
def test_so_it_does_at_a_key_of_text_that_may_be_null(text: str) -> None:
    assert value_of("run_id", text) == text


@given(st.lists(PRINTABLE, max_size=4))
def test_quoted_texts_arrive_unchanged_in_a_list(texts: list[str]) -> None:
    quoted = ", ".join("'" + text.replace("'", "''") + "'" for text in texts)

    assert value_of("on_finish.command", f"[{quoted}]") == texts


ANY_KEYS = ["placement.batch_size", "defaults.loop", "budget.sample", "images.allow", "params", "model", "model.loras"]


@given(st.sampled_from([*ANY_KEYS, "model.compile", "unknown.key", "model.scheduler.settings.x"]), PRINTABLE)
@example("params", "{[a]: b}")
@example("params", "{{a: b}: c}")
@example("params", "!!python/none x")
@example("images.allow", "[*a]")
@example("placement.batch_size", "2026-13-45")
@example("placement.batch_size", "9" * 5000)
@example("images.allow", "[" * 3000)
@example("params", "{a: 1, a: 2}")
@example("params", "{1: 1, '1': 2}")
@example("params", "{<<: {a: 1}, b: 2}")
@example("images.allow", "!!set {a}")
@example("images.allow", "!!omap [a: 1]")
@example("images.allow", "&a [*a]")
@example("params", "&a {b: *a}")
@example("model", "--- {}\n--- {}")
def test_no_text_ends_in_anything_but_a_value_or_a_message(key: str, text: str) -> None:
    try:
        config = RunConfig.load(None, {"manifest": "m", "output": "o"} | overrides(None, None, [f"{key}={text}"]))
    except PiaBatchError as err:
        assert str(err)  # noqa: PT017 - both outcomes are right
    else:
        assert config.manifest == "m"


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("placement.batch_size", "#4", "placement.batch_size: must be a whole number (got '#4')"),
        ("placement.batch_size", "", "placement.batch_size: must be a whole number (got '')"),
        ("placement.batch_size", "null", "placement.batch_size: must be a whole number (got null)"),
        ("placement.batch_size", "2026-11-22", "must be a whole number (got '2026-11-22')"),
        ("placement.num_gpus", "a: b", "placement.num_gpus: must be a number (got 'a: b')"),
        ("defaults.loop", "#on", "defaults.loop: must be true or false (got '#on')"),
        ("images.background", "red", "must be a colour such as '#ff8000'"),
        ("images.background", "'#00ff80'", "(got \"'#00ff80'\"); in a file, in quotes"),
        ("placement.batch_size", "true", "placement.batch_size: must be a number (got true)"),
        ("limits.lease_ttl_s", "False", "limits.lease_ttl_s: must be a number (got false)"),
        ("defaults.motion_curve", "[true, 0.5]", "defaults.motion_curve: must be numbers (got [true, 0.5])"),
        ("model.compile", "null", "model.compile: must be true or false or 'auto' (got null)"),
        (
            "model.scheduler.settings.x",
            "~",
            "settings.x: must be true or false or a whole number or a number or a text",
        ),
        ("images.allow", "#photos", "images.allow: must be a list, such as [a, b] (got '#photos')"),
        ("images.allow", "[photos, #1]", "--set images.allow=[photos, #1]: invalid YAML value: "),
        ("params", "a", "params: must be a mapping of names to values (got 'a')"),
        ("manifest", "", "manifest: must have at least 1 character (got '')"),
        ("placement.batchsize", "#4", "did you mean 'placement.batch_size'?"),
    ],
)
def test_a_message_shows_what_was_written(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.load(None, {"manifest": "m", "output": "o"} | overrides(None, None, [f"{key}={text}"]))

    assert message in str(refused.value)
