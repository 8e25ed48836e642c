"""`weights.pipeline_index`: a folder of a pipeline that PIA cannot be built on is refused by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from pia_batch import tiny
from pia_batch.config import ModelConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import pipeline_index
from pia_batch.weights.resolve import resolve


def index(folder: Path, **changes: Any) -> Path:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads((tiny.PATH / "model_index.json").read_text()) | changes))
    return path


OTHERS = {
    "RectifiedFlowPipeline": "InstaFlow",
    "StableDiffusionInstructPix2PixPipeline": "edits images and has eight input channels",
    "StableDiffusionUpscalePipeline": "enlarges images",
    "StableDiffusionLatentUpscalePipeline": "enlarges images",
    "StableDiffusionDepth2ImgPipeline": "depth",
    "StableDiffusionImageVariationPipeline": "reads images in the place of text",
    "StableUnCLIPPipeline": "reads images in the place of text",
    **dict.fromkeys(
        (
            "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "AnimateDiffSDXLPipeline", "FluxPipeline",
            "StableDiffusion3Pipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline", "KandinskyV22Pipeline",
            "StableCascadePipeline", "StableVideoDiffusionPipeline", "HunyuanDiTPipeline", "IFPipeline",
        ),
        "of another family",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("custom", [False, True])
def test_another_pipeline_is_refused_by_its_name(tmp_path, name, custom):
    path = index(tmp_path, _class_name=["pipeline", name] if custom else name)

    with pytest.raises(ConfigError, match=rf"model\.base: .*model_index\.json is of a {name}: .*{OTHERS[name]}.*; set"):
        pipeline_index.check(path)


def test_a_pipeline_with_a_transformer_has_no_unet(tmp_path):
    content = {"_class_name": "NewPipeline", "transformer": ["diffusers", "NewTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(content))

    with pytest.raises(ConfigError, match="NewPipeline: it has a transformer in the place of a UNet"):
        pipeline_index.check(tmp_path / "model_index.json")


OURS = [
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "PIAPipeline",
    "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", "AnimateDiffPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionPanoramaPipeline", "AnimateDiffVideoToVideoPipeline",
]  # fmt: skip


@pytest.mark.parametrize("name", [*OURS, "MyOwnPipeline", None, 5])
def test_a_pipeline_of_the_same_networks_is_a_base(tmp_path, name):
    pipeline_index.check(index(tmp_path, _class_name=name))


def test_the_names_are_those_of_diffusers():
    known = set(dir(diffusers))
    assert {*OTHERS, *OURS} - {"RectifiedFlowPipeline", "StableCascadePipeline"} <= known


def test_a_folder_is_refused_before_its_parts_are_looked_at(tmp_path):
    base = shutil.copytree(tiny.PATH, tmp_path / "base")
    shutil.rmtree(base / "unet")
    index(base, _class_name="PixArtAlphaPipeline")

    with pytest.raises(ConfigError, match="PixArtAlphaPipeline: it is of another family"):
        resolve(ModelConfig(base=str(base)))
