"""Upscaling: every architecture as spandrel's own call, tiles as one call, and half precision that loses no frame."""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import import_utils
from upscalers import NETWORKS, network, save

from pia_batch.config import UpscaleConfig
from pia_batch.engine.upscaling import Upscaler, _spandrel, _spans
from pia_batch.errors import ConfigError
from pia_batch.weights import upscaler_files

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def loaded(path: Path, device: str = "cpu", dtype: str = "float32") -> Upscaler:
    found = Upscaler.load(UpscaleConfig(model=str(path)), device, dtype)
    assert found is not None
    return found


def own(name: str, picture: np.ndarray) -> np.ndarray:
    """What the network makes of a whole picture, called as spandrel calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        described = _spandrel().ModelLoader().load_from_state_dict(dict(network(name).state_dict())).eval()
    with torch.inference_mode():
        found = described(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)[0]
    return found.permute(1, 2, 0).mul(255).round().numpy().astype(np.uint8)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_picture_is_that_of_spandrels_own_call(name: str, tmp_path: Path) -> None:
    upscaler = loaded(save(tmp_path / "x.safetensors", name))

    found = upscaler(PICTURE, upscaler.scale)

    assert upscaler.scale == int(name.split("x")[1][0])
    assert found.shape == (40 * upscaler.scale, 56 * upscaler.scale, 3)
    assert np.array_equal(found, own(name, PICTURE))
    assert found.std() > 1  # random weights, but no even picture


@pytest.mark.parametrize(("name", "radius"), [("ESRGAN x2", 24), ("Compact x2", 8), ("SPAN x2", 24)])
def test_tiles_make_the_picture_of_one_call(name: str, radius: int, tmp_path: Path) -> None:
    """Of networks whose receptive field is smaller than the overlap: up to the last bit of the arithmetic."""
    saved = upscaler_files.resolve(UpscaleConfig(model=str(save(tmp_path / "x.safetensors", name))))
    assert saved is not None
    described = _spandrel().ModelLoader().load_from_file(saved.path)
    picture = np.random.default_rng(1).integers(0, 256, (96, 120, 3), np.uint8)

    tiled = Upscaler(described, "cpu", torch.float32, tile=2 * radius + 16, overlap=radius)(picture, 2)

    assert np.abs(tiled.astype(int) - own(name, picture)).max() <= 1


@pytest.mark.parametrize(("length", "tile", "overlap"), [(64, 64, 8), (65, 64, 8), (512, 256, 32), (1, 256, 32)])
def test_parts_of_a_side_follow_one_another_and_fit_a_tile(length: int, tile: int, overlap: int) -> None:
    spans = list(_spans(length, tile, overlap))

    assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), length]
    for start, end in spans:
        assert min(length, end + overlap) - max(0, start - overlap) <= tile


def test_what_one_call_reads_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    upscaler = loaded(save(tmp_path / "x.safetensors", "Compact x2"))
    read: list[tuple[int, ...]] = []
    network_of = upscaler._network
    upscaler._network = lambda unit: (read.append(tuple(unit.shape)), network_of(unit))[1]  # type: ignore[func-returns-value]

    found = upscaler(np.zeros((300, 700, 3), np.uint8), 2)

    assert found.shape == (600, 1400, 3)
    assert len(read) == 8
    assert max(max(shape[2:]) for shape in read) <= 256


def test_a_smaller_factor_is_the_picture_reduced_by_lanczos(tmp_path: Path) -> None:
    upscaler = loaded(save(tmp_path / "x.safetensors", "Compact x4"))

    found = upscaler(PICTURE, 3)

    whole = Image.fromarray(own("Compact x4", PICTURE))
    assert np.array_equal(found, np.asarray(whole.resize((168, 120), Image.Resampling.LANCZOS)))


def test_half_precision_is_near_and_its_overflow_is_computed_again(tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["body.0.weight"] *= 1e3
        tensors["body.2.weight"] *= 1e3
        tensors["body.6.weight"] /= 1e6

    plain = loaded(save(tmp_path / "plain.safetensors", "ESRGAN x2"), dtype="bfloat16")(PICTURE, 2)
    large = save(tmp_path / "large.safetensors", "Compact x2", enlarge)
    upscaler = loaded(large, dtype="float16")

    assert np.abs(plain.astype(int) - own("ESRGAN x2", PICTURE)).mean() < 3
    assert np.abs(upscaler(PICTURE, 2).astype(int) - loaded(large)(PICTURE, 2)).max() <= 2  # rounded weights
    assert next(upscaler._network.model.parameters()).dtype == torch.float16


def test_weights_beyond_half_precision_stay_in_float32(tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["body.0.weight"] *= 1e6
        tensors["body.6.weight"] /= 1e6

    path = save(tmp_path / "x.safetensors", "Compact x2", enlarge)

    assert np.array_equal(loaded(path, dtype="float16")(PICTURE, 2), loaded(path)(PICTURE, 2))


def test_an_architecture_without_half_precision_uses_float32(tmp_path: Path) -> None:
    upscaler = loaded(save(tmp_path / "x.safetensors", "SwinIR x2"), dtype="float16")

    assert np.array_equal(upscaler(PICTURE, 2), own("SwinIR x2", PICTURE))


def test_a_network_that_is_not_finite_is_refused_and_so_is_its_picture(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["body.0.weight"][0, 0, 0, 0] = float("nan")

    def overflow(tensors: dict[str, Any]) -> None:
        tensors["body.0.weight"] *= 1e30
        tensors["body.2.weight"] *= 1e30

    with pytest.raises(ConfigError, match=r"body\.0\.weight holds NaN or infinity"):
        loaded(save(tmp_path / "x.safetensors", "Compact x2", spoil))
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        loaded(save(tmp_path / "y.safetensors", "Compact x2", overflow))(PICTURE, 2)


def test_what_spandrel_refuses_names_the_file(tmp_path: Path) -> None:
    path = save(
        tmp_path / "x.safetensors", "ESRGAN x2", lambda tensors: tensors.pop("model.1.sub.0.RDB2.conv1.0.weight")
    )

    with pytest.raises(ConfigError, match=r"spandrel cannot load .*x\.safetensors"):
        loaded(path)


def test_no_placeholder_of_torchvision_is_left() -> None:
    _spandrel()

    installed = import_utils._is_package_available("torchvision")[0]
    assert import_utils.is_torchvision_available() == installed
    assert any(name.startswith("torchvision") for name in sys.modules) <= installed
