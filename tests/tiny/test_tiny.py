"""The embedded checkpoint, its sample manifest and its world."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import world
from diffusers import MotionAdapter, PIAPipeline
from PIL import Image
from safetensors import safe_open

from pia_batch import tiny
from pia_batch.config import RunConfig
from pia_batch.config.layers import embedded


@pytest.fixture(scope="module")
def pipeline():
    """The unmodified pipeline, loaded as its documentation says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline class is deprecated
        adapter = MotionAdapter.from_pretrained(tiny.PATH / "motion_adapter", dtype=torch.float32)
        pipe = PIAPipeline.from_pretrained(tiny.PATH, motion_adapter=adapter, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def animate(pipeline):
    """Draws a clip of a case, uint8 (frames, 64, 64, 3), with the model's own defaults."""
    settings = embedded()["defaults"]

    def draw(image, prompt, motion_scale=1):
        frames = pipeline(
            image=Image.fromarray(image),
            prompt=prompt,
            motion_scale=motion_scale,
            num_frames=settings["num_frames"],
            width=settings["width"],
            height=settings["height"],
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            generator=torch.Generator("cpu").manual_seed(3),
            output_type="np",
        ).frames[0]
        return world.to_uint8(frames)

    return draw


def test_the_checkpoint_is_complete_and_takes_at_most_12_mb():
    files = {str(path.relative_to(tiny.PATH)) for path in tiny.PATH.rglob("*") if path.is_file()}

    assert {
        "model_index.json",
        "motion_adapter/config.json",
        "motion_adapter/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    } <= files
    assert sum((tiny.PATH / name).stat().st_size for name in files) <= 12_000_000


def test_every_weight_is_float16():
    for path in tiny.PATH.rglob("*.safetensors"):
        with safe_open(path, "np") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - no mapping
        assert kinds <= {"F16", "I64"}, path


def test_the_motion_adapter_carries_pias_first_layer():
    config = json.loads((tiny.PATH / "motion_adapter" / "config.json").read_text())
    unet = json.loads((tiny.PATH / "unet" / "config.json").read_text())

    assert (config["conv_in_channels"], unet["in_channels"]) == (9, 4)


def test_the_package_is_imported_without_torch():
    code = "import sys, pia_batch.tiny; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_the_defaults_are_a_valid_config_and_fresh_every_time():
    embedded()["defaults"]["width"] = 8

    config = RunConfig.load(overrides={"manifest": "m", "output": "o"})

    assert (config.defaults.width, config.model.scheduler.name) == (64, "checkpoint")


def test_the_sample_manifest_has_distinct_requests_whose_images_are_there():
    table = pq.read_table(tiny.SAMPLE / "requests.parquet")

    assert len(set(table["request_id"].to_pylist())) == table.num_rows == len(world.SAMPLE_ROWS)
    for name in table["image"].to_pylist():
        with Image.open(tiny.SAMPLE / name) as image:
            assert image.mode == "RGB"


def test_the_sample_manifest_is_what_its_code_writes(tmp_path):
    world.write_sample(tmp_path)

    assert pq.read_table(tmp_path / "requests.parquet").equals(pq.read_table(tiny.SAMPLE / "requests.parquet"))
    for written in (tmp_path / "images").iterdir():
        shipped = np.asarray(Image.open(tiny.SAMPLE / "images" / written.name))
        assert np.array_equal(np.asarray(Image.open(written)), shipped), written.name


def test_a_seed_names_a_case():
    one, same, other = (world.random_case(np.random.default_rng(seed)) for seed in (5, 5, 6))

    assert one == same
    assert one != other
    assert np.array_equal(one.clip(), same.clip())


@pytest.mark.parametrize("motion", world.MOTIONS)
@pytest.mark.parametrize("kind", world.KINDS)
def test_a_true_clip_begins_with_its_image_and_does_what_it_is_called(motion, kind):
    shape = world.Shape(kind, "red", 32, 32, 9)
    case = world.Case("", motion, 1, (shape,), world.Background((255, 255, 255), (255, 255, 255)))

    clip = world.to_uint8(case.clip())

    assert np.array_equal(clip[0], case.image())
    assert np.array_equal(clip[0], clip[-1]) == (motion == "still" or (motion == "spinning" and kind == "circle"))


def test_larger_motion_scales_travel_further_and_loops_come_back():
    shape = world.Shape("circle", "red", 40, 32, 9)
    ends = [world.moved(shape, "left", scale, 7).x for scale in (0, 1, 2)]

    assert 40 > ends[0] > ends[1] > ends[2]
    for scale in (3, 4, 5):
        assert world.moved(shape, "left", scale, 7).x < 35
        assert world.moved(shape, "left", scale, 15).x == pytest.approx(40)


def test_the_tokenizer_keeps_the_words_of_the_world_whole(pipeline):
    for prompt in ("a red circle moving left", "one yellow star spinning", "the blue square standing still"):
        assert [token.removesuffix("</w>") for token in pipeline.tokenizer.tokenize(prompt)] == prompt.split()
    assert pipeline.tokenizer.tokenize("zebra"), "an unknown word falls into pieces, never into nothing"


def test_the_stock_pipeline_draws_finite_frames_of_the_asked_size(animate):
    clip = animate(np.full((64, 64, 3), 200, np.uint8), "a red circle moving left")

    assert clip.shape == (8, 64, 64, 3)


def _case(prompt, motion_scale=1, kind="circle", colour="red"):
    shape = world.Shape(kind, colour, 32, 32, 11)
    return world.Case(prompt, "still", motion_scale, (shape,), world.Background((245, 245, 245), (225, 235, 245), 1.57))


def _pixels_of(frame, colour):
    """Where a frame is nearer to a colour than to the pale background."""
    distance = np.linalg.norm(frame.astype(float) - np.asarray(world.COLOURS[colour]), axis=-1)
    return distance < np.linalg.norm(frame.astype(float) - 240, axis=-1)


def _centre_of(frame, colour="red"):
    rows, columns = np.nonzero(_pixels_of(frame, colour))
    return np.array([columns.mean(), rows.mean()])


@pytest.mark.parametrize(
    ("direction", "towards"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))]
)
def test_a_shape_goes_where_the_prompt_says(animate, direction, towards):
    clip = animate(_case("").image(), f"a red circle moving {direction}")

    way = _centre_of(clip[-1]) - _centre_of(clip[0])
    assert way @ towards > 5
    assert abs(way @ towards) > 2 * abs(way @ towards[::-1])


def test_a_larger_motion_scale_goes_further(animate):
    ways = []
    for motion_scale in (0, 1, 2):
        clip = animate(_case("").image(), "a red circle moving left", motion_scale)
        ways.append(np.linalg.norm(_centre_of(clip[-1]) - _centre_of(clip[0])))

    assert ways[0] < ways[1] < ways[2]


def test_growing_and_shrinking_change_the_size_and_not_the_place(animate):
    for word, factor in (("growing", 1.2), ("shrinking", 0.8)):
        clip = animate(_case("", kind="square", colour="blue").image(), f"a blue square {word}")

        sizes = [_pixels_of(frame, "blue").sum() for frame in clip]
        assert (sizes[-1] / sizes[0] > factor) == (factor > 1)
        assert np.linalg.norm(_centre_of(clip[-1], "blue") - _centre_of(clip[0], "blue")) < 4


def test_the_first_frame_keeps_the_image(animate):
    image = _case("").image()

    error = np.mean((animate(image, "a red circle moving left")[0].astype(float) - image) ** 2)

    assert 10 * np.log10(255**2 / error) > 22


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the pipeline class is deprecated
def test_the_training_program_makes_a_checkpoint_and_goes_on_where_it_stopped(tmp_path):
    program = tiny.PATH.parents[2] / "jobs" / "tiny" / "train.py"
    command = [sys.executable, str(program), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    command += ["--codec-steps", "1", "--text-steps", "2", "--clips", "2", "--threads", "1", "--device", "cpu"]

    subprocess.run([*command, "--denoiser-steps", "1"], check=True, capture_output=True)
    subprocess.run([*command, "--denoiser-steps", "2"], check=True, capture_output=True)

    assert torch.load(tmp_path / "work" / "denoiser.pt", weights_only=True)["step"] == 2
    pipe = PIAPipeline.from_pretrained(
        tmp_path / "out",
        motion_adapter=MotionAdapter.from_pretrained(tmp_path / "out" / "motion_adapter", dtype=torch.float32),
        dtype=torch.float32,
    )
    assert pipe.unet.conv_in.in_channels == 9
