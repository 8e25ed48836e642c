"""`model.arithmetic: original`: the program of PIA's authors, against the stock network with other norms in float64."""

from __future__ import annotations

import shutil
from typing import Any
from unittest import mock

import layouts
import pytest
import small_networks
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from original import hook, original_call
from pipelines import assert_equals_single_calls, assert_same, build, picture, save, shot
from safetensors.torch import load_file

from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.config.arithmetic import NEGATIVE_PROMPT
from pia_batch.engine import PiaEngine, arithmetic, loading, unet
from pia_batch.engine.compiling import Compiler
from pia_batch.errors import ConfigError
from pia_batch.weights.identity import engine_id
from pia_batch.weights.resolve import resolve

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FRAMES = 3
SHIPPED = SchedulerConfig(name="checkpoint")

MIXED = [
    shot(1),
    shot(2, guidance_scale=1.0, prompt="a blue square", num_inference_steps=5),
    shot(3, strength=0.5, num_inference_steps=6, motion_scale=4),
    shot(4, num_frames=5, negative_prompt=NEGATIVE_PROMPT["original"], guidance_scale=4.0),
    shot(5, image=picture(5, 44, 28), clip_skip=1, motion_scale=6),
    shot(6, width=40, height=24, motion_scale=7, num_frames=1),
    shot(7, num_inference_steps=1, motion_scale=8, eta=0.5),
]


def given() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    return {
        "texts": [torch.randn(1, 20, 16, generator=random, dtype=torch.float64) for _ in range(3)],
        "sample": torch.randn(2, FRAMES, 6, 5, 9, generator=random, dtype=torch.float64),
        "timesteps": torch.tensor([700, 31]),
    }


@torch.no_grad()
def test_the_network_predicts_what_the_stock_network_with_hooked_norms_predicts():
    texts, sample, timesteps = given().values()
    rows = [0, 0, 1]
    network = arithmetic.as_original(build().unet.to(torch.float64))
    states = torch.cat(texts).repeat_interleave(FRAMES, dim=0)
    stock = build().unet.to(torch.float64)
    plain = stock(sample.movedim(-1, 1)[rows], timesteps[rows], encoder_hidden_states=states).sample
    truth = hook(stock)(sample.movedim(-1, 1)[rows], timesteps[rows], encoder_hidden_states=states).sample

    ours = unet.run(network, sample, timesteps, unet.prepare(network, rows, 2, texts))

    assert float((ours - truth).abs().max()) <= 1e-11
    assert float((ours - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_the_outermost_layers_continue_from_features_of_the_same_step(layers):
    texts, sample, timesteps = given().values()
    network = arithmetic.as_original(build().unet.to(torch.float64))
    conditions = unet.prepare(network, [0, 0, 1], 2, texts)
    whole, deep = unet.run_and_keep(network, sample, timesteps, conditions, layers)

    assert torch.allclose(
        unet.run_outermost(network, sample, timesteps, conditions, layers, deep), whole, rtol=0, atol=1e-12
    )


def test_every_row_of_a_mixed_batch_equals_the_hooked_pipeline_in_float64():
    pipe = build().to(torch.float64)
    engine = PiaEngine.from_pipeline(pipe, arithmetic="original")
    hooked = build().to(torch.float64)
    hook(hooked.unet)

    for row, clip in zip(MIXED, engine.animate(MIXED, keep_latents=True), strict=True):
        assert_same(clip, original_call(hooked, row), 1e-10)
    assert_equals_single_calls(pipe, PiaEngine.from_pipeline(pipe), MIXED[:2])  # the pipeline is as it was


@pytest.mark.parametrize("speed", ["balanced", "fast"])
def test_presets_of_speed_leave_a_row_the_same_alone_and_in_a_batch(speed):
    engine = PiaEngine.from_pipeline(build().to(torch.float64), speed=speed, arithmetic="original")
    rows = [shot(seed, num_inference_steps=20, guidance_scale=2.0 * (seed % 2)) for seed in range(3)]
    together = engine.animate(rows, keep_latents=True)

    for row, clip in zip(rows, together, strict=True):
        alone = engine.animate([row], keep_latents=True)[0]
        assert torch.allclose(alone.latents, clip.latents, rtol=0, atol=1e-10)


@pytest.mark.long
@torch.no_grad()
def test_a_graph_of_it_is_one_graph():
    network, sample, timesteps, _ = small_networks.small()
    network = arithmetic.as_original(network)
    conditions = unet.prepare(network, [0, 0], 1, [torch.randn(1, 4, 8) for _ in range(2)])
    compiler = Compiler("eager", usual_calls=0)

    graph = [compiler(unet.run, network, sample, timesteps, conditions) for _ in range(2)][1]

    assert compiler.failures == {}
    assert compiler.num_graphs() == 1
    assert torch.allclose(graph, unet.run(network, sample, timesteps, conditions))


def test_euler_starts_from_unscaled_noise():
    """The original leaves the scheduler's factor out; for DDIM it is one."""
    pipe = build().to(torch.float64)
    pipe.scheduler = EulerDiscreteScheduler(beta_end=0.002)
    hooked = build().to(torch.float64)
    hooked.scheduler = pipe.scheduler
    hook(hooked.unet)
    row = shot(3)
    with mock.patch.object(EulerDiscreteScheduler, "init_noise_sigma", 1.0):
        truth = original_call(hooked, row)

    clip = PiaEngine.from_pipeline(pipe, arithmetic="original").animate([row], keep_latents=True)[0]

    assert_same(clip, truth, 1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_cpu_keeps_the_norms(dtype, tmp_path):
    save(build(), tmp_path)
    model = {"base": str(tmp_path), "scheduler": SHIPPED, "arithmetic": "original"}
    row = shot(1, guidance_scale=1.0)
    near, truth = (
        PiaEngine.load(ModelConfig(**model, dtype=each), "cpu").animate([row])[0].frames.astype(float)
        for each in (dtype, "float32")
    )

    assert 0 < abs(near - truth).mean() < 2


# --- scheduler ------------------------------------------------------------------------------------------------------


def test_the_scheduler_is_the_originals_whatever_the_base_ships():
    shipped = PNDMScheduler(set_alpha_to_one=False, beta_schedule="scaled_linear", timestep_spacing="trailing")
    made = loading.build_scheduler(SchedulerConfig(), shipped, "original")

    wanted = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
    )
    assert type(made) is DDIMScheduler
    assert {key: value for key, value in made.config.items() if not key.startswith("_")} == {
        key: value for key, value in wanted.config.items() if not key.startswith("_")
    }
    assert float(made.final_alpha_cumprod) == 1
    assert float(loading.build_scheduler(SchedulerConfig(), shipped).final_alpha_cumprod) < 1
    own = SchedulerConfig(settings={"beta_end": 0.02})
    assert loading.build_scheduler(own, shipped, "original").config.beta_end == 0.02


# --- first layer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base in a folder and in a file, and PIA's adapter in both layouts, whose first layer is all its own."""
    root = tmp_path_factory.mktemp("weights")
    save(build(), root / "base")
    kept = load_file(root / "base" / "motion_adapter" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(3)
    kept |= {name: torch.randn_like(kept[name]) for name in ("conv_in.weight", "conv_in.bias")}
    layouts.write(kept, root / "base" / "motion_adapter" / "diffusion_pytorch_model.safetensors")
    (root / "pia").mkdir()
    layouts.write(layouts.original_adapter(kept), root / "pia" / "pia.safetensors")
    shutil.copy(root / "base" / "motion_adapter" / "config.json", root / "pia")
    layouts.write(layouts.checkpoint(root / "base"), root / "base.safetensors")
    layouts.configs(root / "base", root / "configs")
    return {
        "adapter": kept,
        "base": load_file(root / "base" / "unet" / "diffusion_pytorch_model.safetensors"),
        "folder": {"base": str(root / "base")},
        "file": {"base": str(root / "base.safetensors"), "config": str(root / "configs")},
        "pia": {"motion_adapter": str(root / "pia" / "pia.safetensors")},
        "hub": {"motion_adapter": str(root / "base" / "motion_adapter")},
    }


@pytest.mark.parametrize(
    ("base", "adapter", "settings", "source"),
    [
        ("folder", "pia", {"arithmetic": "original"}, "adapter"),
        ("file", "pia", {"arithmetic": "original"}, "base"),
        ("folder", "hub", {"arithmetic": "original"}, "base"),
        ("folder", "pia", {}, "base"),
        ("folder", "hub", {"conv_in": "adapter"}, "adapter"),
        ("folder", "pia", {"arithmetic": "original", "conv_in": "base"}, "base"),
    ],
)
def test_the_first_layer_is_the_adapters_own_as_in_the_original(places, base, adapter, settings, source):
    model = ModelConfig(**places[base], **places[adapter], **settings, scheduler=SHIPPED)
    found = loading.load(model, resolve(model), torch.device("cpu"), torch.float32).unet.conv_in

    latents = places[source]["conv_in.weight"][:, :4]
    assert torch.equal(found.weight, torch.cat([latents, places["adapter"]["conv_in.weight"][:, 4:]], dim=1))
    assert torch.equal(found.bias, places[source]["conv_in.bias"])


def test_a_unet_with_motion_modules_has_no_adapter_to_choose(tmp_path):
    pipe = build()
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        getattr(pipe, name).save_pretrained(tmp_path / name)

    with pytest.raises(ConfigError, match=r"model\.conv_in.*set it to auto"):
        resolve(ModelConfig(base=str(tmp_path), conv_in="adapter"))


# --- the VAE --------------------------------------------------------------------------------------------------------


def test_a_vae_has_a_dtype_of_its_own_and_may_decode_frame_by_frame(tmp_path):
    save(build(), tmp_path)
    plain = {"base": str(tmp_path), "scheduler": SHIPPED}
    row = shot(1, num_frames=5)
    whole = PiaEngine.load(ModelConfig(**plain), "cpu").animate([row])[0]
    engine = PiaEngine.load(ModelConfig(**plain, vae_dtype="bfloat16", vae_decode="per_frame"), "cpu")
    counted = mock.Mock(wraps=engine._decoder._vae.decode)
    with mock.patch.object(engine._decoder._vae, "decode", counted):
        clip = engine.animate([row], keep_latents=True)[0]

    assert [call.args[0].shape[0] for call in counted.call_args_list] == [1] * 5
    assert {call.args[0].dtype for call in counted.call_args_list} == {torch.bfloat16}
    assert clip.latents.dtype == torch.float32
    assert 0 < abs(clip.frames.astype(float) - whole.frames).mean() < 3


# --- identity -------------------------------------------------------------------------------------------------------


def test_each_part_of_the_arithmetic_is_part_of_the_engine_id():
    plain = ModelConfig()
    changes: list[dict[str, Any]] = [
        {"arithmetic": "original"},
        {"conv_in": "adapter"},
        {"vae_dtype": "bfloat16"},
        {"vae_decode": "per_frame"},
    ]
    found = [engine_id(model, resolve(model), "float32") for model in (plain, *(ModelConfig(**c) for c in changes))]

    assert len(set(found)) == 5
    pipe = build()
    ids = {PiaEngine.from_pipeline(pipe, arithmetic=each).engine_id for each in NEGATIVE_PROMPT}
    assert len(ids) == 2
