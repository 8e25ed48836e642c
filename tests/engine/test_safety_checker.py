"""The safety checker flags what the published one flags, and is refused where its files are not complete."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from safety_checkers import pictures, preprocessor, safety_checker, save

from pia_batch.config import SafetyConfig
from pia_batch.engine import safety_checker as module
from pia_batch.engine.safety_checker import SafetyChecker
from pia_batch.errors import ConfigError


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("special", [0.9, 0.2])
def test_flags_are_those_of_the_published_checker(seed: int, special: float) -> None:
    network, images = safety_checker(seed, threshold=0.0, special=special), pictures(12, seed)
    median = float(np.median(SafetyChecker(network, preprocessor()).scores(images)))
    network.concept_embeds_weights.data.fill_(median)

    scores = SafetyChecker(network, preprocessor()).scores(images)

    pixels = preprocessor()([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    blackened, flags = network(pixels, [image.astype(np.float32) for image in images])
    assert (scores > 0).tolist() == flags
    assert any(flags)
    assert not all(flags)
    assert len(blackened) == 12


def test_a_score_is_the_largest_cosine_above_its_threshold() -> None:
    network, images = safety_checker(special=0.9), pictures(5)
    rng = np.random.default_rng(1)
    thresholds = rng.uniform(0, 0.4, 17)
    network.concept_embeds_weights.data[:] = torch.tensor(thresholds)

    scores = SafetyChecker(network, preprocessor()).scores(images)

    for image, score in zip(images, scores, strict=True):
        pixels = preprocessor()(Image.fromarray(image), return_tensors="pt").pixel_values
        with torch.no_grad():
            feature = network.visual_projection(network.vision_model(pixels)[1])[0].double().numpy()
        concepts = network.concept_embeds.detach().double().numpy()
        cosines = concepts @ feature / np.linalg.norm(concepts, axis=1) / np.linalg.norm(feature)
        assert score == pytest.approx((cosines - thresholds).max(), abs=6e-4)


def test_images_are_scored_in_batches_and_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    checker, images = SafetyChecker(safety_checker(), preprocessor()), pictures(7)
    before = [image.copy() for image in images]
    together = checker.scores(images)

    monkeypatch.setattr(module, "BATCH_IMAGES", 3)

    assert np.allclose(checker.scores(images), together, atol=1.1e-3)
    assert all(np.array_equal(*pair) for pair in zip(images, before, strict=True))
    assert checker.scores([]).shape == (0,)


@pytest.mark.parametrize("alone", [True, False])
def test_both_layouts_load_with_the_same_scores(tmp_path: Path, alone: bool) -> None:
    network, images = safety_checker(3), pictures(4)
    folder = save(tmp_path / "checker", network, alone=alone)

    loaded = SafetyChecker.load(SafetyConfig(checker=str(folder)), "cpu")

    assert loaded is not None
    assert loaded.scores(images).tolist() == SafetyChecker(network, preprocessor()).scores(images).tolist()


def test_the_names_of_the_first_publication_load_too(tmp_path: Path) -> None:
    folder = save(tmp_path, safety_checker(3))
    tensors = load_file(folder / "model.safetensors")
    named = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): value.half() for name, value in tensors.items()
    }
    named["vision_model.vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    save_file(named, folder / "model.safetensors", {"format": "pt"})

    loaded = SafetyChecker.load(SafetyConfig(checker=str(folder)), "cpu")

    assert loaded is not None
    known = SafetyChecker(safety_checker(3), preprocessor()).scores(pictures(3))
    assert np.allclose(loaded.scores(pictures(3)), known, atol=5e-3)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_tensor(name: str, value: float | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensor = tensors.pop(name)
        if value is not None:
            tensor.view(-1)[0] = value
            tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def of_another_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPModel"]}))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (without("preprocessor_config.json"), r"has no preprocessor_config\.json; copy it there"),
        (without("config.json"), r"has no config\.json"),
        (without("model.safetensors"), r"model\.safetensors"),
        (with_tensor("concept_embeds", None), "has no tensor 'concept_embeds'"),
        (with_tensor("visual_projection.weight", None), r"tensors are missing or have no place.*visual_projection"),
        (with_tensor("concept_embeds", float("nan")), "concept_embeds holds NaN or infinity"),
        (of_another_class, "is a CLIPModel, not a StableDiffusionSafetyChecker"),
    ],
)
def test_a_checker_that_is_not_complete_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], problem: str
) -> None:
    folder = save(tmp_path)
    damage(folder)

    with pytest.raises(ConfigError, match=problem):
        SafetyChecker.load(SafetyConfig(checker=str(folder)), "cpu")


def test_without_a_checker_none_is_loaded() -> None:
    assert SafetyChecker.load(SafetyConfig(), "cpu") is None
