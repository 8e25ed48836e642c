"""IP-Adapter with an image and a scale per row, against single calls of a pipeline that loaded the same files."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import ip_adapters
import pytest
import torch
from adapted import Adapted, adapted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import (
    Counting,
    Truth,
    assert_equals_single_calls,
    assert_same,
    build,
    picture,
    shot,
    single_call,
    stock_engine,
)
from safetensors.torch import load_file, save_file

from pia_batch.config import IpAdapterConfig, LoraConfig
from pia_batch.engine import PiaEngine, image_prompts, loading
from pia_batch.engine.shared_weights import SharedParts
from pia_batch.errors import ConfigError, ImageUnreadableError, UnsupportedSettingError
from pia_batch.weights.resolve import resolve

ROWS = [
    shot(1, ip_adapter_scale=0.5),
    shot(2, ip_adapter_image=picture(9, 50, 40), ip_adapter_scale=1.3, guidance_scale=1.0),
    shot(3, ip_adapter_image=picture(8), ip_adapter_scale=0.0, num_inference_steps=5),
    shot(4, ip_adapter_image=picture(9, 50, 40), guidance_scale=4.0, prompt="", strength=0.7),
    shot(5, ip_adapter_image=picture(7, 9, 90), ip_adapter_scale=0.25, width=40, clip_skip=1),
    shot(6, ip_adapter_image=picture(6), ip_adapter_scale=2.0, free_init_iters=2, num_frames=2),
]
"""Different image prompts, scales and guidance, three sizes, and schedules that end one after another."""


@pytest.fixture(scope="module", params=ip_adapters.LAYOUTS)
def each(request, tmp_path_factory) -> Adapted:
    return adapted(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Adapted:
    return adapted(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def engine(plain) -> PiaEngine:
    return plain.engine()


@pytest.fixture(scope="module")
def truths(plain) -> list[Truth]:
    return [single_call(plain.pipe, row) for row in ROWS]


def test_rows_with_images_and_scales_of_their_own_equal_single_calls_in_every_layout(each):
    assert_equals_single_calls(each.pipe, each.engine(), ROWS)


def test_a_row_alone_equals_its_single_call_to_the_last_bit_in_every_layout(each):
    stock = stock_engine(each.pipe)

    for row in ROWS[:4]:
        assert_same(stock.animate([row], keep_latents=True)[0], single_call(each.pipe, row), tolerance=0.0)


def test_a_batch_equals_single_calls_in_float64_where_it_cannot_hide_behind_rounding(plain):
    exact = copy.deepcopy(plain.pipe).to(torch.float64)

    assert_equals_single_calls(exact, PiaEngine.from_pipeline(exact), ROWS)


PROMPTED = st.builds(
    lambda seed, image, **rest: shot(seed, ip_adapter_image=None if image is None else picture(image), **rest),
    seed=st.integers(0, 3),
    image=st.none() | st.integers(0, 2),
    ip_adapter_scale=st.sampled_from([0.0, 1.0]) | st.floats(0, 2),
    guidance_scale=st.sampled_from([1.0, 3.0]),
    num_inference_steps=st.integers(1, 3),
    num_frames=st.sampled_from([2, 3]),
)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(PROMPTED, min_size=1, max_size=4))
def test_any_batch_of_image_prompts_equals_single_calls(plain, engine, rows):
    assert_equals_single_calls(plain.pipe, engine, rows)


@pytest.mark.parametrize("order", [(3, 1, 0), (1, 2), (0, 3, 2, 1)])
def test_order_and_batch_mates_change_no_row(engine, truths, order):
    clips = engine.animate([ROWS[index] for index in order], keep_latents=True)

    for index, clip in zip(order, clips, strict=True):
        assert_same(clip, truths[index])


def test_the_image_prompt_is_the_rows_own_image_unless_it_names_another(engine):
    own, same, other, none = engine.animate(
        [
            shot(1),
            shot(1, ip_adapter_image=picture(1)),
            shot(1, ip_adapter_image=picture(2)),
            shot(1, ip_adapter_scale=0.0),
        ],
        keep_latents=True,
    )

    assert torch.allclose(own.latents, same.latents, atol=1e-5)
    assert (own.latents - other.latents).abs().max() > 1e-3
    assert (own.latents - none.latents).abs().max() > 1e-3


def test_a_scale_of_zero_is_without_the_adapter(engine):
    row = shot(1, ip_adapter_scale=0.0)

    assert_same(engine.animate([row], keep_latents=True)[0], single_call(build(), row))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scales_per_row_compute_what_one_scale_for_all_would(dtype):
    states = torch.randn(6, 5, 4).to(dtype)
    scales = [0.3, 1.7, 0.0]

    product = image_prompts._RowScales(scales, 2, states.device, dtype) * states

    assert product.dtype == dtype
    for sample, scale in enumerate(scales):
        rows = slice(2 * sample, 2 * sample + 2)
        assert torch.equal(product[rows], scale * states[rows])


def test_an_image_prompt_is_encoded_once_for_all_rows_and_batches(plain):
    parts = loading.adopt(plain.pipe)
    encoder = Counting(parts.image_encoder)
    engine = PiaEngine(dataclasses.replace(parts, image_encoder=encoder), lambda: "counted")
    rows = [shot(seed, ip_adapter_image=picture(9), num_inference_steps=1) for seed in range(3)]

    engine.animate([*rows, shot(9, num_inference_steps=1)])  # whose own image is that image prompt
    engine.animate([dataclasses.replace(row, ip_adapter_scale=0.5) for row in rows])

    assert encoder.calls == 1


def test_rows_with_different_images_and_scales_share_every_unet_call(plain):
    parts = loading.adopt(plain.pipe)
    unet = Counting(parts.unet)
    engine = PiaEngine(dataclasses.replace(parts, unet=unet), lambda: "counted")

    engine.animate([shot(k, ip_adapter_image=picture(9 + k), ip_adapter_scale=k / 2) for k in range(4)])

    assert unet.calls == 3  # one for each step


def test_the_cache_of_image_prompts_is_bounded(plain, monkeypatch):
    monkeypatch.setattr(image_prompts, "MAX_IMAGE_PROMPTS", 2)
    parts = loading.adopt(plain.pipe)
    prompts = image_prompts.ImagePromptEncoder(parts.unet, parts.image_encoder, parts.image_processor, parts.device)

    for seed in range(4):
        prompts.encode(picture(seed))

    assert len(prompts._recent) == 2


def test_a_pipeline_with_an_adapter_is_adopted_and_stays_as_it_is(plain):
    plain.pipe.set_ip_adapter_scale(0.6)
    processors = image_prompts._processors(plain.pipe.unet)

    engine = PiaEngine.from_pipeline(plain.pipe)
    engine.animate(ROWS)

    assert [processor.scale for processor in processors] == [[0.6]] * 4
    assert_equals_single_calls(plain.pipe, engine, ROWS[:2])


def test_a_pipeline_with_freeu_beside_the_adapter_is_adopted(tmp_path):
    both = adapted(tmp_path).pipe
    without = PiaEngine.from_pipeline(both)
    drawn = without.animate(ROWS[:1], keep_latents=True)[0]
    both.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    engine = PiaEngine.from_pipeline(both)

    assert_equals_single_calls(both, engine, ROWS[:2])
    assert not torch.equal(engine.animate(ROWS[:1], keep_latents=True)[0].latents, drawn.latents)


def test_the_id_of_an_adopted_pipeline_is_also_that_of_its_adapter_and_image_encoder(plain):
    ids = {PiaEngine.from_pipeline(build()).engine_id, PiaEngine.from_pipeline(plain.pipe).engine_id}
    other = copy.deepcopy(plain.pipe)
    other.image_encoder.visual_projection.weight.data.mul_(1.01)
    ids.add(PiaEngine.from_pipeline(other).engine_id)

    assert len(ids) == 3


def test_a_model_with_an_adapter_passes_the_check_of_its_device(engine):
    engine.check()


def test_loading_an_adapter_prints_nothing(plain, capfd):
    capfd.readouterr()

    plain.engine()

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pipe: setattr(pipe, "image_encoder", None), "no image encoder.*image_encoder_folder"),
        (lambda pipe: setattr(pipe, "feature_extractor", None), "no image encoder"),
        (lambda pipe: pipe.set_ip_adapter_scale({"up": {"block_1": [0.0, 1.0]}}), "scale for each block.*1.0"),
    ],
    ids=["no encoder", "no processor", "scales by block"],
)
def test_an_adapter_that_rows_cannot_have_each_for_itself_is_refused(tmp_path, spoil, message):
    pipe = adapted(tmp_path).pipe
    spoil(pipe)

    with pytest.raises(ConfigError, match=message):
        PiaEngine.from_pipeline(pipe)


def test_two_adapters_are_refused(tmp_path):
    pipe = build()
    path = ip_adapters.write(tmp_path)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=[path.name, path.name], local_files_only=True)

    with pytest.raises(ConfigError, match="2 IP-Adapters"):
        PiaEngine.from_pipeline(pipe)


def test_an_adapter_of_faces_is_refused():
    pipe = build()
    weights = ip_adapters.weights()
    attention = {name.removeprefix("ip_adapter."): each for name, each in weights.items() if "ip_adapter" in name}
    faces = {
        "proj.0.weight": torch.randn(24, 12),
        "proj.0.bias": torch.randn(24),
        "proj.2.weight": torch.randn(64, 24),
        "proj.2.bias": torch.randn(64),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": faces, "ip_adapter": attention}])

    with pytest.raises(ConfigError, match="FaceID"):
        PiaEngine.from_pipeline(pipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ip_adapter.9.to_k_ip.weight": torch.ones(16, 16)}, "1 tensors more"),
        ({"ip_adapter.3.to_k_ip.weight": torch.ones(8, 16)}, "does not fit the base's UNet"),
        ({"image_proj.norm.weight": torch.ones(15)}, "does not fit the base's UNet"),
        ({"unknown.weight": torch.ones(1)}, "does not fit the base's UNet"),
    ],
    ids=["more blocks", "other channels", "other text", "other names"],
)
def test_a_file_that_does_not_fit_the_unet_is_a_config_error(tmp_path, changes, message):
    path = ip_adapters.write(tmp_path, **changes)

    with pytest.raises(ConfigError, match=message):
        image_prompts.install(build().unet, path)


def test_a_damaged_file_is_a_config_error(tmp_path):
    path = ip_adapters.write(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ConfigError, match="damaged"):
        image_prompts.install(build().unet, path)


def test_without_an_adapter_a_row_with_an_image_prompt_fails_alone_and_is_told_which_key_to_set():
    engine = PiaEngine.from_pipeline(build())

    asked, plain, scaled = engine.animate(
        [shot(1, ip_adapter_image=picture(2)), shot(2), shot(3, ip_adapter_scale=0.3)]
    )

    assert isinstance(asked.error, UnsupportedSettingError)
    with pytest.raises(UnsupportedSettingError, match=r"ip_adapter_image.*model\.ip_adapter"):
        _ = asked.frames
    assert plain.error is None
    assert scaled.error is None  # the default of a column says nothing


def test_an_image_prompt_that_cannot_be_used_fails_its_row_alone(engine, truths, tmp_path):
    cut = tmp_path / "cut.png"
    picture(0, 64, 64).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])

    broken, alpha, wild, good = engine.animate(
        [
            shot(1, ip_adapter_image=Image.open(cut)),
            shot(2, ip_adapter_image=picture().convert("RGBA")),
            shot(3, ip_adapter_scale=float("nan")),
            ROWS[0],
        ],
        keep_latents=True,
    )

    assert isinstance(broken.error, ImageUnreadableError)
    assert str(alpha.error) == "ip_adapter_image is RGBA, not RGB"
    assert str(wild.error) == "ip_adapter_scale nan is not finite"
    assert_same(good, truths[0])


def test_models_that_differ_in_their_adapter_share_no_unet_and_all_else(plain):
    shared = SharedParts()
    without = plain.model.model_copy(update={"ip_adapter": None})

    with_it, bare = (PiaEngine.load(model, "cpu", shared) for model in (plain.model, without))

    assert with_it._parts.vae is bare._parts.vae
    assert_equals_single_calls(plain.pipe, with_it, ROWS[:2])
    assert_equals_single_calls(build(), bare, [shot(1)])
    assert len({with_it.engine_id, bare.engine_id}) == 2


@pytest.mark.parametrize("fuse", [False, True])
def test_a_lora_beside_the_adapter_draws_as_in_the_stock_pipeline(tmp_path, fuse):
    both = adapted(tmp_path)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = {f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(16, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    model = both.model.model_copy(
        update={"loras": (LoraConfig(source=str(tmp_path / "lora.safetensors")),), "fuse_loras": fuse}
    )
    both.pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", local_files_only=True)

    assert_equals_single_calls(both.pipe, PiaEngine.load(model, device="cpu"), ROWS[:2])


def test_an_adapter_of_training_with_an_encoder_in_a_single_file_draws_as_in_the_stock_pipeline(tmp_path):
    """Their tensors are renamed, and the files also hold what the model does not need."""
    both = adapted(tmp_path)
    config = both.model.ip_adapter
    assert config is not None
    source = Path(config.source)
    names = {"image_proj": "module.image_proj_model", "ip_adapter": "module.adapter_modules"}
    trained = {}
    for name, tensor in load_file(source).items():
        group, _, rest = name.partition(".")
        trained[f"{names[group]}.{rest}"] = tensor
    save_file(trained | {"module.unet.conv_in.bias": torch.ones(4)}, tmp_path / "trained.safetensors")
    folder = source.parent / "image_encoder"
    spare = {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(3)}
    save_file(load_file(folder / "model.safetensors") | spare, folder / "clip.safetensors")
    model = both.model.model_copy(
        update={
            "ip_adapter": IpAdapterConfig(
                source=str(tmp_path / "trained.safetensors"), image_encoder=str(folder / "clip.safetensors")
            )
        }
    )

    assert_equals_single_calls(both.pipe, PiaEngine.load(model, device="cpu"), ROWS[:2])


SPELLINGS = {
    "published": {"image_proj": "image_proj", "ip_adapter": "ip_adapter"},
    "trained": {"image_proj": "image_proj_model", "ip_adapter": "adapter_modules"},
    "of Lightning": {"image_proj": "state_dict.image_proj", "ip_adapter": "state_dict.ip_adapter"},
    "trained in parallel": {"image_proj": "module.image_proj_model", "ip_adapter": "module.adapter_modules"},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("layout", ip_adapters.LAYOUTS)
def test_an_adapter_in_any_dtype_has_the_numbers_of_its_file(tmp_path, layout, spelling):
    """Cross-attention has the odd numbers, in the order down, up, middle; a resampler's `to_kv` is two layers."""
    torch.manual_seed(5)
    made = ip_adapters.weights(layout)
    for dtype in DTYPES if spelling == "published" else DTYPES[1:2]:
        stored = {}
        for name, tensor in made.items():
            group, _, rest = name.partition(".")
            stored[f"{SPELLINGS[spelling][group]}.{rest}"] = tensor.to(dtype)
        save_file(stored, tmp_path / "ip.safetensors")
        unet = build().unet

        image_prompts.install(unet, tmp_path / "ip.safetensors")

        found = unet.state_dict()
        layers = [name for name in unet.attn_processors if ".attn2." in name and "motion_modules" not in name]
        layers.sort(key=lambda name: ("down", "up_b", "mid_").index(name[:4]))
        assert len(layers) == 4
        for number, layer in enumerate(layers):
            for each in ("to_k_ip", "to_v_ip"):
                expected = made[f"ip_adapter.{2 * number + 1}.{each}.weight"].to(dtype).float()
                assert torch.equal(found[f"{layer}.{each}.0.weight"], expected)
        held = [tensor for name, tensor in found.items() if name.startswith("encoder_hid_proj.")]
        for name in (name for name in made if name.startswith("image_proj.")):
            expected = made[name].to(dtype).float()
            for part in expected.chunk(2) if "to_kv" in name else [expected]:
                assert any(part.shape == each.shape and torch.equal(part, each) for each in held), name


class _OpenClipTower(torch.nn.Module):
    """Vision tower as open_clip writes it, of torch's own layers. Source: mlfoundations/open_clip `transformer.py`."""

    def __init__(self, width: int, layers: int, heads: int, patch: int, grid: int, projected: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(width))
        self.positional_embedding = torch.nn.Parameter(torch.randn(grid * grid + 1, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(_OpenClipBlock(width, heads) for _ in range(layers))
        self.proj = torch.nn.Parameter(torch.randn(width, projected) / 4)
        for norm in (self.ln_pre, self.ln_post):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        states = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            states = block(states)
        return self.ln_post(states[:, 0]) @ self.proj


class _OpenClipBlock(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        torch.nn.init.normal_(self.attn.in_proj_bias)
        self.mlp = torch.nn.Sequential(
            OrderedDict(
                c_fc=torch.nn.Linear(width, 2 * width), gelu=torch.nn.GELU(), c_proj=torch.nn.Linear(2 * width, width)
            )
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(states)
        states = states + self.attn(normed, normed, normed, need_weights=False)[0]
        return states + self.mlp(self.ln_2(states))


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_encoder_with_the_names_of_open_clip_computes_what_open_clip_computes(tmp_path, prefix, file):
    """`model.safetensors` is found in its folder, which the config names."""
    torch.manual_seed(5)
    tower = _OpenClipTower(width=24, layers=3, heads=2, patch=8, grid=4, projected=12).eval()
    named = {f"{prefix}visual.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}
    spare = {
        f"{prefix}{name}": torch.ones(shape)
        for name, shape in {"logit_scale": (), "positional_embedding": (77, 9), "text_projection": (9, 9)}.items()
    }
    source = tmp_path / "encoder"
    source.mkdir()
    save_file(named | spare, source / file)
    settings = {
        "model_type": "clip_vision_model", "hidden_act": "gelu", "hidden_size": 24, "intermediate_size": 48,
        "image_size": 32, "patch_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "projection_dim": 12,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(settings))
    path = ip_adapters.write(tmp_path / "a")
    model = adapted(tmp_path / "b").model
    entry = IpAdapterConfig(source=str(path), image_encoder=str(source if file.startswith("model") else source / file))
    part = resolve(model.model_copy(update={"ip_adapter": entry})).image_encoder
    assert part is not None

    encoder = image_prompts.read_encoder(part, torch.float32)

    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder(pixels).image_embeds, tower(pixels), atol=1e-5)


@pytest.mark.parametrize("wrapper", ["", "module.", "state_dict.", "_fsdp_wrapped_module.", "image_encoder."])
def test_an_encoder_in_a_folder_of_shards_has_the_numbers_of_its_files_under_any_names(tmp_path, wrapper):
    model = adapted(tmp_path).model
    assert model.ip_adapter is not None
    folder = Path(model.ip_adapter.source).parent / "image_encoder"
    own = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {
        "model-00001-of-00002.safetensors": {},
        "model-00002-of-00002.safetensors": {},
    }
    for number, (name, tensor) in enumerate(sorted(own.items())):
        shards[sorted(shards)[number % 2]][wrapper + name] = tensor
    for file, held in shards.items():
        save_file(held, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    part = resolve(model).image_encoder
    assert part is not None

    found = image_prompts.read_encoder(part, torch.float32).state_dict()

    assert {name.removeprefix("vision_model.") for name in found} == {
        name.removeprefix("vision_model.") for name in own
    }
    for name, tensor in own.items():
        mine = found[name] if name in found else found[name.removeprefix("vision_model.")]
        assert torch.equal(mine, tensor)
