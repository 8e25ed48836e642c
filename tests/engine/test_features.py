"""Agreement with float32, feature by feature, on the fake GPU: no feature mixes devices or precisions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fake_cuda import CUDA, FakeCuda

from pia_batch.config import ModelConfig
from pia_batch.engine import PiaEngine
from pia_batch.engine.benchmark import features
from pia_batch.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.long
def test_every_feature_is_compared_in_both_precisions_of_a_gpu(tmp_path: Path) -> None:
    asked: list[str] = []
    with FakeCuda() as cuda:

        def load(model: ModelConfig) -> PiaEngine:
            """Load on the CPU, and move the networks to the fake GPU in the precision that a real one would have."""
            asked.append(model.dtype)
            dtype = torch.float32 if model.dtype == "float32" else torch.float16
            engine = PiaEngine.load(model.model_copy(update={"dtype": "float32"}), "cpu")
            parts = engine._parts
            for network in (parts.unet, parts.vae, parts.text_encoder, parts.image_encoder):
                if network is not None:
                    cuda.place(network, dtype)
            return PiaEngine(dataclasses.replace(parts, device=CUDA, dtype=dtype), lambda: "")

        found = features.measure("tiny", "embedded", tmp_path, lambda _: None, load=load)

    assert {name: one["error"] for name, one in found.items() if "error" in one} == {}
    assert len(found) >= 30
    assert asked.count("float32") == asked.count("auto")


def test_a_feature_that_fails_does_not_stop_the_others_and_is_tried_again(tmp_path: Path) -> None:
    def load(_: ModelConfig) -> PiaEngine:
        raise ConfigError("no such weights")

    reports: list[int] = []
    known = {"guided": {"psnr_db": 60.0}, "loop": {"error": "out of memory"}}
    found = features.measure("tiny", "embedded", tmp_path, lambda it: reports.append(len(it)), known, load)

    assert found["guided"] == {"psnr_db": 60.0}
    assert "no such weights" in found["loop"]["error"]
    assert reports == list(range(2, len(found) + 1))
