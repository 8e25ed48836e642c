"""Engines are the expected ones, pass their self-test, get the right shots and are ended where they exceed limits."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from animated import Died, Poisoned, animated, committed, fetched
from fakes import ENGINE_ID, FakeEngine, FakeShelf, animate_stage
from inputs import png, requests_table
from PIL import Image

from pia_batch.config import RunConfig
from pia_batch.errors import BrokenDeviceError, ConfigError
from pia_batch.manifest.reader import Manifest
from pia_batch.pipeline.animate import WorkerProcess
from pia_batch.pipeline.stages import FetchImages, Validate

MakeConfig = Callable[..., RunConfig]


def test_an_engine_with_other_weights_is_refused_with_the_remedy(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"got engine 0{32}, expected f{32}\); give every node the same weights"):
        animate_stage(make_config(), FakeEngine(engine_id="0" * 32))


def test_an_image_prompt_reaches_the_engine_whole_and_a_bad_one_fails_its_row(make_config: MakeConfig) -> None:
    table = requests_table(3, ip_adapter_image=["images/2.png", None, "requests.parquet"], format=["gif"] * 3)
    config, engine = make_config(table, model__ip_adapter={"source": "adapter.safetensors"}), FakeEngine()

    rows = animated(config, engine)

    ((first, second),) = engine.calls
    assert np.array_equal(np.asarray(first.ip_adapter_image), np.asarray(Image.open(io.BytesIO(png(2)))))
    assert first.ip_adapter_scale == 1.0
    assert not hasattr(second, "ip_adapter_image")
    assert rows["r002"]["error_kind"] == "image_unreadable"
    assert rows["r002"]["error"].startswith("column 'ip_adapter_image': ")
    assert rows["r000"]["ip_adapter_image"] == "images/2.png"


def test_each_request_is_animated_by_its_own_model_and_says_so(make_config: MakeConfig) -> None:
    table = requests_table(4, model=["toon", None, "toon", "default"], format=["gif"] * 4)
    config = make_config(table, models__toon={"base": "toon/base"})
    ids = {"default": ENGINE_ID, "toon": "a" * 32}
    found = Manifest.open(config.manifest)
    requests = Validate(config, ids)(next(iter(found.batches())).table)
    requests = FetchImages(config.images, found.folder)(requests)
    engines = {"default": FakeEngine(), "toon": FakeEngine(engine_id="a" * 32)}
    shelf = FakeShelf(engines=engines)

    animate_stage(config, shelf=shelf, engine_ids=ids)(requests)

    assert {name: row["engine_id"] for name, row in committed(config).items()} == {
        f"r{k:03d}": ids[model] for k, model in enumerate(["toon", "default", "toon", "default"])
    }
    assert [len(call) for call in engines["toon"].calls] == [len(call) for call in engines["default"].calls] == [2]
    assert shelf.asked == ["default", "toon", "default"]  # the first is loaded before there is work


def test_an_engine_is_checked_whenever_it_was_loaded_and_only_then(make_config: MakeConfig) -> None:
    @dataclass
    class Checked(FakeEngine):
        checks: int = 0

        def check(self) -> None:
            self.checks += 1

    config, engine = make_config(requests_table(2, format=["gif"] * 2)), Checked()
    shelf = FakeShelf(engine)
    animator = animate_stage(config, shelf=shelf)
    requests = fetched(config)
    animator(requests.slice(0, 1))
    again = shelf.default = Checked()
    animator(requests.slice(1))

    assert (engine.checks, again.checks) == (1, 1)


def test_a_broken_device_ends_the_run_before_it_generates(make_config: MakeConfig) -> None:
    class Broken(FakeEngine):
        def check(self) -> None:
            raise BrokenDeviceError("cuda:0 generates another clip than it should")

    with pytest.raises(BrokenDeviceError, match="cuda:0"):
        animate_stage(make_config(), Broken())


def test_a_device_that_breaks_ends_the_worker_and_blames_no_request(make_config: MakeConfig) -> None:
    config = make_config(requests_table(2, prompt=["fine", "raises"], format=["gif"] * 2))
    engine = Poisoned()

    def die() -> None:
        raise Died

    mortal = animate_stage(config, engine, process=WorkerProcess(exit=die))
    engine.sick = True

    with pytest.raises(Died):
        mortal(fetched(config))
    assert committed(config) == {}


def test_a_deadline_grows_with_the_work(make_config: MakeConfig) -> None:
    animator = animate_stage(make_config(limits__timeout_s=100))
    row = {
        "num_inference_steps": 25,
        "num_frames": 16,
        "width": 512,
        "height": 512,
        "free_init_iters": 0,
        "loop": False,
    }
    row |= {"context": None, "context_length": None, "context_overlap": None, "context_stride": None}
    windows = {"num_frames": 48, "context": "windows", "context_length": 16, "context_overlap": 4}

    assert animator.guard.deadline_s([row | {"width": 64}]) == 100
    assert animator.guard.deadline_s([row] * 4) == 400
    assert animator.guard.deadline_s([row | {"free_init_iters": 3}]) == 300
    assert animator.guard.deadline_s([row | windows]) == 400, "four windows of 16 frames"
    assert animator.guard.deadline_s([row | {"width": None}]) == 100
