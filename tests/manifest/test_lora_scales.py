"""Column `lora_scales`: its forms, its checks against each row's model, and what decides the key."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.config.model_limits import NO_LIMITS, Limits, ModelLimits
from pia_batch.errors import ConfigError
from pia_batch.manifest.validation import check
from pia_batch.schema.lora_scales import LORA_SCALES_TYPE

PATHS = {"manifest": "m.parquet", "output": "out", "model.base": "some/model"}
LORAS = [{"source": "weights/zoom.safetensors", "scale": 0.5}, {"source": "hub/style", "name": "ink"}]


def checked(column: pa.Array, limits: Limits = NO_LIMITS, **settings: Any) -> Any:
    written = {name.replace("__", "."): value for name, value in settings.items()}
    config = RunConfig.load(None, PATHS | {"model.loras": LORAS} | written)
    table = requests_table(len(column)).append_column("lora_scales", column)
    return check(table, config, dict.fromkeys(config.all_models, "e" * 32), limits)


def listed(*rows: dict[str, float] | None) -> pa.Array:
    values = [None if row is None else [{"name": name, "scale": scale} for name, scale in row.items()] for row in rows]
    return pa.array(values, LORA_SCALES_TYPE)


@pytest.mark.parametrize(
    "column",
    [
        listed({"zoom": 2, "ink": 0}),
        pa.array(
            [[{"scale": 0, "name": "ink"}, {"scale": 2, "name": "zoom"}]],
            pa.list_(pa.struct([("scale", pa.int32()), ("name", pa.large_string())])),
        ),
        pa.array([[("zoom", 2.0), ("ink", 0.0)]], pa.map_(pa.string(), pa.float32())),
        pa.array(['{"zoom": 2, "ink": 0}']),
        pa.array(['[{"name": "zoom", "scale": 2.0}, {"name": "ink", "scale": 0}]']),
    ],
    ids=["list", "other types", "map", "JSON object", "JSON list"],
)
def test_all_forms_are_one_request(column):
    found = checked(column).requests

    assert found["lora_scales"].to_pylist() == [[{"name": "ink", "scale": 0.0}, {"name": "zoom", "scale": 2.0}]]
    assert found["key"].to_pylist() == checked(listed({"ink": 0, "zoom": 2})).requests["key"].to_pylist()


def test_what_the_config_has_anyway_decides_nothing():
    keys = checked(listed(None, {}, {"zoom": 0.5}, {"zoom": 0.5, "ink": 1.0})).requests
    plain = checked(pa.nulls(4, LORA_SCALES_TYPE)).requests

    assert keys["lora_scales"].to_pylist() == [None] * 4
    assert keys["key"].to_pylist() == plain["key"].to_pylist()


def test_a_default_holds_where_a_row_gives_none():
    found = checked(listed(None, {"ink": 0.25}), defaults__lora_scales={"zoom": 1.5}).requests

    assert found["lora_scales"].to_pylist() == [[{"name": "zoom", "scale": 1.5}], [{"name": "ink", "scale": 0.25}]]


@pytest.mark.parametrize(
    ("column", "settings", "message"),
    [
        (listed({"pan": 1}), {}, "names of LoRAs of model 'default' (ink, zoom)"),
        (listed({"zoom": 1}), {"model__fuse_loras": True}, "null where model 'default' has fuse_loras: true"),
        (listed({"zoom": 1}), {"model__loras": []}, "null; model 'default' has no LoRAs"),
        (listed({"zoom": 1}), {"model__loras": [LORAS[0], LORAS[0]]}, "none is unique); set `name` in its `loras`"),
        (listed({"zoom": 11}), {}, "numbers from -10 to 10"),
        (listed({"zoom": float("nan")}), {}, "numbers from -10 to 10"),
        (pa.array([[("zoom", 1.0), ("zoom", 2.0)]], pa.map_(pa.string(), pa.float64())), {}, "each once"),
        (pa.array(["zoom=1"]), {}, "names of the model's `loras`"),
        (pa.array([[1.0]]), {}, "names of the model's `loras`"),
    ],
)
def test_what_cannot_be_scaled_is_rejected_with_what_is_allowed(column, settings, message):
    (error,) = checked(column, **settings).rejected["error"].to_pylist()

    assert error.startswith("column 'lora_scales': ")
    assert message in error


def test_the_scale_of_a_lora_that_is_merged_into_the_weights_is_refused_by_name():
    limits = {"default": ModelLimits(fixed_loras=frozenset({"ink"}))}

    found = checked(listed({"zoom": 1}, {"ink": 0.5, "zoom": 1}), limits)

    assert found.rows.tolist() == [0]
    (error,) = found.rejected["error"].to_pylist()
    assert "ink of model 'default' has layers of another kind (LoHa, LoKr, DoRA, Tucker, full differences)" in error


def test_a_bad_default_is_an_error_of_the_config():
    with pytest.raises(ConfigError, match=r"defaults\.lora_scales.*from -10 to 10"):
        checked(listed(None), defaults__lora_scales={"zoom": 11})
