"""Upscalers are found, recognised by their headers as spandrel recognises them, and refused with a remedy."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from upscalers import NETWORKS, NO_UPSCALERS, network, save

from pia_batch.config import RunConfig, UpscaleConfig
from pia_batch.driver.preflight.storage import check_upscaler
from pia_batch.errors import ConfigError
from pia_batch.weights.components import sha256_of
from pia_batch.weights.upscaler_files import resolve, with_upscaler
from pia_batch.weights.upscaler_headers import recognise


def found(path: Path, **options: Any) -> Any:
    return resolve(UpscaleConfig(model=str(path), **options))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_recognised_by_its_header(name: str, tmp_path: Path) -> None:
    upscaler = found(save(tmp_path / "x.safetensors", name))

    assert f"{upscaler.network.architecture} x{upscaler.network.scale}" == name.split(",", maxsplit=1)[0]
    assert upscaler.network.channels == (3, 3)
    assert upscaler.network.parameters == sum(tensor.numel() for tensor in network(name).state_dict().values())
    assert upscaler.sha256 == sha256_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "netG."])
def test_a_prefix_of_all_names_is_no_part_of_them(prefix: str) -> None:
    shapes = {f"{prefix}{key}": tuple(tensor.shape) for key, tensor in network("Compact x4").state_dict().items()}

    assert recognise(shapes).scale == 4


@pytest.mark.parametrize("problem", NO_UPSCALERS)
def test_a_network_that_enlarges_no_colours_is_refused(problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"upscale\.model: .*x\.safetensors is no upscaler .*{problem}"):
        found(save(tmp_path / "x.safetensors", problem))


def test_another_network_is_refused_with_the_names_of_those_that_are_supported(tmp_path: Path) -> None:
    def replace(tensors: dict[str, Any]) -> None:
        tensors.clear()
        tensors["unet.weight"] = torch.zeros(2)

    with pytest.raises(ConfigError, match=r"no supported upscaler \(DAT, SwinIR, ESRGAN, SPAN, Compact\); use another"):
        found(save(tmp_path / "x.safetensors", "Compact x2", replace))
    with pytest.raises(ConfigError, match="not those of a complete Compact"):
        found(save(tmp_path / "y.safetensors", "Compact x2", lambda tensors: tensors.pop("body.6.bias")))


def test_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    def quantize(tensors: dict[str, Any]) -> None:
        tensors["body.2.weight"] = tensors["body.2.weight"].to(torch.int8)

    with pytest.raises(ConfigError, match="tensors of type I8; convert them"):
        found(save(tmp_path / "x.safetensors", "Compact x2", quantize))


def test_a_folder_has_exactly_one_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no safetensors file; name one"):
        found(tmp_path)
    (tmp_path / "x.pth").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"only x\.pth; pickled weights are refused"):
        found(tmp_path)
    with pytest.raises(ConfigError, match="is a pickle, which is refused"):
        found(tmp_path / "x.pth")
    path = save(tmp_path / "a.safetensors", "Compact x2")
    assert found(tmp_path).path == path
    save(tmp_path / "b.safetensors", "Compact x4")
    with pytest.raises(ConfigError, match=r"2 safetensors files \(a\.safetensors, b\.safetensors\); name one"):
        found(tmp_path)
    assert found(tmp_path / "b.safetensors").network.scale == 4
    with pytest.raises(ConfigError, match=r"upscale\.model: there is no folder or file"):
        found(tmp_path / "none")


@dataclass
class Hub:
    """Hub with one repository, which remembers the revisions that it was asked for."""

    folder: Path
    asked: list[str | None] = field(default_factory=list)

    def names(self, repo_id: str, revision: str | None) -> list[str]:
        del repo_id
        self.asked.append(revision)
        return [path.name for path in self.folder.iterdir()]

    def download(self, repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
        del repo_id, patterns
        self.asked.append(revision)
        return self.folder


def test_a_repository_of_the_hub_is_read_at_its_revision(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", "Compact x2")
    hub = Hub(tmp_path)

    upscaler = resolve(UpscaleConfig(model="owner/upscaler", revision="abc"), hub)

    assert upscaler is not None
    assert upscaler.path == tmp_path / "x.safetensors"
    assert hub.asked == ["abc", "abc"]


def run_config(**upscale: Any) -> RunConfig:
    keys = {f"upscale.{name}": value for name, value in upscale.items()}
    return RunConfig.load(None, {"manifest": "m", "output": "o"} | keys)


def test_workers_learn_the_hash_and_the_factor_of_the_plans_file(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", "Compact x4")

    config = with_upscaler(run_config(model=str(path)))

    assert (config.upscale.sha256, config.upscale.scale) == (sha256_of(path), 4)
    assert with_upscaler(run_config(model=str(path), scale=3)).upscale.scale == 3
    assert with_upscaler(run_config()) == run_config()
    save(path, "Compact x2")  # on another node, so to speak
    with pytest.raises(ConfigError, match=r"upscale\.sha256: .* is another file .*give every node the same one"):
        resolve(config.upscale)


def test_a_factor_is_kept_to_that_of_the_network(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", "SwinIR x3, direct")

    for scale in (1, 2, 3):
        assert found(path, scale=scale).network.scale == 3
    with pytest.raises(ConfigError, match=r"upscale\.scale: out of range \(got 4, expected at most 3"):
        found(path, scale=4)


def test_without_spandrel_the_plan_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.safetensors", "Compact x2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=r"install `pia-batch\[upscale\]` here and on every node"):
        with_upscaler(run_config(model=str(path)))


def test_doctor_names_the_network_or_what_is_wrong(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", "Compact x2")

    (good,) = check_upscaler(UpscaleConfig(model=str(path)))
    (bad,) = check_upscaler(UpscaleConfig(model=str(tmp_path / "none")))

    assert (good.state, good.message) == ("ok", f"Compact, 2 times, sha256 {sha256_of(path)}")
    assert bad.state == "fail"
    assert not list(check_upscaler(UpscaleConfig()))


@pytest.mark.parametrize("given", [{"scale": 2}, {"revision": "main"}, {"sha256": "0" * 64}])
def test_what_has_no_effect_without_a_model_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"upscale.*{next(iter(given))}: has no effect without upscale\.model"):
        run_config(**given)
