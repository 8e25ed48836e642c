"""`weights.config_values`: a config of a model with any value in any place is accepted, or refused in one line.

The network of an accepted config is built, as the engine builds it.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pia_batch import tiny
from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.engine import loading, network_files
from pia_batch.errors import ConfigError
from pia_batch.weights import networks, sd15
from pia_batch.weights.resolve import Weights, resolve

CONFIGS = {
    **{name: f"{name}/config.json" for name in ("unet", "vae", "text_encoder", "motion_adapter")},
    "scheduler": "scheduler/scheduler_config.json",
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 10**30, 0.5, 2.5, math.nan, math.inf, "", "x", [], [1], ["x"], {}, {"a": 1}]),
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(tiny.PATH, tmp_path / "base")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny.PATH, tmp_path_factory.mktemp("shared") / "base")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("part", CONFIGS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_any_setting_is_accepted_and_built_or_refused_in_one_line(part, data, shared):
    path, whole = shared / CONFIGS[part], (tiny.PATH / CONFIGS[part]).read_text()
    key = data.draw(st.sampled_from(sorted(json.loads(whole))))
    edit(path, **{key: data.draw(VALUES)})
    try:
        found = accepted(ModelConfig(base=str(shared)))
        if found is not None and part == "scheduler":
            loading.build_scheduler(SchedulerConfig(), loading._shipped_scheduler(found))
        elif found is not None:
            network_files._empty(part, found.components[part])
    finally:
        path.write_text(whole)


def accepted(model: ModelConfig) -> Weights | None:
    try:
        return resolve(model)
    except ConfigError as err:
        if "\n" in str(err):
            raise AssertionError(str(err)) from err
        return None


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"act_fn": "tanh"}, r"config\.json: invalid act_fn \(got 'tanh', expected one of silu, .*correct it"),
        ("unet", {"norm_num_groups": 7}, r"norm_num_groups \(got 7, expected a divisor of all block_out_channels\)"),
        ("unet", {"conv_in_kernel": None}, r"conv_in_kernel \(got None, expected a whole number above 0\)"),
        ("unet", {"num_attention_heads": 8}, "num_attention_heads .*attention_head_dim has their number"),
        ("vae", {"scaling_factor": "0.18215"}, r"scaling_factor \(got '0\.18215', expected a number above 0\)"),
        ("vae", {"shift_factor": 0.0609}, r"shift_factor \(got 0\.0609, expected null"),
        ("vae", {"scaling_factor": math.nan}, "scaling_factor"),
        ("text_encoder", {"hidden_act": "quick"}, "hidden_act .*quick_gelu"),
        ("text_encoder", {"num_attention_heads": 5}, "a divisor of hidden_size"),
        ("motion_adapter", {"motion_norm_num_groups": 0}, "motion_norm_num_groups"),
        ("scheduler", {"beta_schedule": "cosine"}, "invalid beta_schedule"),
        ("scheduler", {"num_train_timesteps": 1000.0}, r"num_train_timesteps \(got 1000\.0"),
    ],
)  # fmt: skip
def test_a_value_that_no_library_uses_is_named_before_a_run(base, part, changes, message):
    edit(base / CONFIGS[part], **changes)

    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(base=str(base)))


def test_counts_without_end_are_refused(base):
    edit(base / CONFIGS["text_encoder"], num_hidden_layers=10**30)

    with pytest.raises(ConfigError, match=f"has more than {networks.MAX_TENSORS} tensors"):
        resolve(ModelConfig(base=str(base)))
    for part in ("unet", "vae", "text_encoder", "motion_adapter"):
        config = json.loads((sd15.PATH / CONFIGS[part]).read_text())
        assert 100 < len(networks.shapes_of(part, config)) < networks.MAX_TENSORS / 50
