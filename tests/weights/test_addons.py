"""`pia_batch.weights.addons`: which file a LoRA, textual inversion or IP-Adapter is, and whether it fits the base.

The base is the embedded model, whose text embeddings have 64 numbers.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hubs import COMMIT, FakeHub
from safetensors.numpy import load_file, save_file

from pia_batch import tiny
from pia_batch.config import IpAdapterConfig, LoraConfig, ModelConfig, TextualInversionConfig
from pia_batch.errors import ConfigError
from pia_batch.storage.object_store import Store
from pia_batch.weights.identity import engine_id
from pia_batch.weights.resolve import Weights, resolve

KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
PEFT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight"
OLD = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight"


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """A safetensors file of zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
    return str(path)


def lora_file(path: Path, width: int = 64, name: str = KOHYA) -> str:
    """A LoRA of one layer of the embedded model, whose output has 64 numbers."""
    up = name.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace(".down.", ".up.")
    return write(path, {name: (4, width), up: (64, 4)})


def lora(source: str, hub: FakeHub | None = None, **more: Any) -> Weights:
    return resolve(ModelConfig(loras=(LoraConfig(source=source, **more),)), hub)


def word(source: str, **more: Any) -> Weights:
    return resolve(ModelConfig(textual_inversions=(TextualInversionConfig(source=source, **more),)))


# --- which file -----------------------------------------------------------------------------------------------------


def test_a_file_is_itself_by_path_or_uri(tmp_path):
    path = tmp_path / "style.safetensors"
    lora_file(path)

    for source in (str(path), path.as_uri()):
        (part,) = lora(source).loras
        assert (part.path, part.layout, part.commit) == (path, "single_file", None)


def test_the_only_file_of_a_folder_needs_no_name(tmp_path):
    lora_file(tmp_path / "style.safetensors")
    lora_file(tmp_path / "older" / "style.safetensors")
    (tmp_path / "README.md").write_text("hello")

    assert lora(str(tmp_path)).loras[0].path == tmp_path / "style.safetensors"


def test_the_only_file_may_lie_deeper(tmp_path):
    lora_file(tmp_path / "older" / "style.safetensors")

    assert lora(str(tmp_path)).loras[0].path == tmp_path / "older" / "style.safetensors"


def test_the_usual_name_is_taken_among_several(tmp_path):
    for name in ("pytorch_lora_weights", "other"):
        lora_file(tmp_path / f"{name}.safetensors")

    assert lora(str(tmp_path)).loras[0].path.name == "pytorch_lora_weights.safetensors"


def test_several_files_are_listed_with_the_key_that_chooses(tmp_path):
    for k in range(14):
        lora_file(tmp_path / f"{k:02d}.safetensors")

    message = r"several files; set model\.loras\[0\]\.weight_name to one of 00\..*, 11\.safetensors and 2 more"
    with pytest.raises(ConfigError, match=message):
        lora(str(tmp_path))
    assert lora(str(tmp_path), weight_name="07.safetensors").loras[0].path.name == "07.safetensors"


@pytest.mark.parametrize(
    ("names", "weight_name", "message"),
    [
        (["a.safetensors"], "b.safetensors", "there is no b.safetensors; set weight_name to one of a.safetensors"),
        (["a.safetensors"], "b.bin", "model.loras[0].weight_name: b.bin is a pickle"),
        (["a.bin", "b.pt"], None, "has no .safetensors file, only a.bin, b.pt; pickled weights are refused"),
        (["README.md"], None, "has no .safetensors file"),
    ],
)
def test_a_choice_that_cannot_be_made_is_explained(tmp_path, names, weight_name, message):
    for name in names:
        lora_file(tmp_path / name)

    with pytest.raises(ConfigError, match=re.escape(message)):
        lora(str(tmp_path), weight_name=weight_name)


def test_a_file_cannot_be_named_twice(tmp_path):
    source = lora_file(tmp_path / "a.safetensors")

    assert lora(source, weight_name="a.safetensors").loras[0].path == Path(source)
    with pytest.raises(ConfigError, match=r"source already names the file a\.safetensors; leave weight_name out"):
        lora(source, weight_name="b.safetensors")


def test_a_file_of_the_hub_is_found_fetched_alone_and_identified_by_its_commit_and_name(tmp_path):
    lora_file(tmp_path / "loras" / "a" / "style.safetensors")
    hub = FakeHub(tmp_path / "hub", loras=tmp_path / "loras")

    (part,) = lora("someone/loras", hub, revision="v2").loras
    (same,) = lora("someone/loras/a/style.safetensors", hub).loras

    assert part.path == same.path == tmp_path / "hub" / "loras" / COMMIT / "a" / "style.safetensors"
    assert part.identity() == same.identity() == {"commit": COMMIT, "file": "a/style.safetensors"}
    assert hub.asked[0] == ("someone/loras", "v2")
    assert set(hub.patterns) == {"a/style.safetensors"}


@pytest.mark.s3
def test_a_file_on_s3_is_found_and_fetched_alone(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIA_BATCH_CACHE", str(tmp_path / "cache"))
    local = tmp_path / "style.safetensors"
    lora_file(local)
    store = Store(s3)
    store.create("loras/style.safetensors", local.read_bytes())
    store.create("loras/preview.png", b"picture")

    for source in (f"{s3}/loras", f"{s3}/loras/style.safetensors"):
        (part,) = lora(source).loras
        assert part.identity() == lora(str(local)).loras[0].identity()
        assert {path.name for path in part.folder.iterdir()} == {"style.safetensors", ".fetched.json"}


# --- LoRAs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [KOHYA, PEFT, OLD])
def test_a_lora_for_another_width_of_text_is_refused_in_every_spelling(tmp_path, name):
    lora(lora_file(tmp_path / "a.safetensors", 64, name))

    with pytest.raises(
        ConfigError, match=r"is made for another .* \(text embeddings: got 2048 dimensions, expected 64\)"
    ):
        lora(lora_file(tmp_path / "b.safetensors", 2048, name))


def test_a_lora_of_motion_modules_has_its_own_widths(tmp_path):
    name = "unet.down_blocks.2.motion_modules.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    up = name.replace("lora_A", "lora_B")

    assert len(lora(write(tmp_path / "a.safetensors", {name: (4, 112), up: (112, 4)})).loras) == 1


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight",
    ],
)
def test_a_lora_of_another_family_is_refused_by_its_names(tmp_path, name):
    with pytest.raises(ConfigError, match=r"a\.safetensors is made for another family"):
        lora(write(tmp_path / "a.safetensors", {name: (4, 8), "b": (1,)}))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3), "b": (1,)}, r"it belongs in model\.base"),
        ({"cat": (1, 64)}, r"it belongs in model\.textual_inversions"),
        ({"ip_adapter.1.to_k_ip.weight": (8, 64), "b": (1,)}, r"it belongs in model\.ip_adapter"),
    ],
)
def test_another_kind_of_file_is_no_lora(tmp_path, shapes, message):
    with pytest.raises(ConfigError, match=r"model\.loras\[0\]: a\.safetensors is of the wrong kind: .*" + message):
        lora(write(tmp_path / "a.safetensors", shapes))


def test_loras_keep_the_order_of_the_config(tmp_path):
    sources = [lora_file(tmp_path / f"{name}.safetensors") for name in "bca"]

    found = resolve(ModelConfig(loras=tuple(LoraConfig(source=source) for source in sources)))

    assert [str(part.path) for part in found.loras] == sources
    assert [label for label, _ in found.parts()][-3:] == ["loras.0", "loras.1", "loras.2"]


def test_two_loras_of_one_name_are_pinned_by_their_places(tmp_path):
    sources = [
        lora_file(tmp_path / name / "style.safetensors", name=tensor) for name, tensor in (("a", KOHYA), ("b", PEFT))
    ]
    entries = tuple(LoraConfig(source=source) for source in sources)
    hashes = [part.identity()["sha256"] for part in resolve(ModelConfig(loras=entries)).loras]
    right = {f"loras.{k}/style.safetensors": each for k, each in enumerate(hashes)}

    resolve(ModelConfig(loras=entries, sha256=right))
    with pytest.raises(ConfigError, match="is another file"):
        resolve(ModelConfig(loras=entries, sha256={"style.safetensors": hashes[0]}))


# --- textual inversions ---------------------------------------------------------------------------------------------


def test_a_textual_inversion_may_name_its_word_or_be_given_one(tmp_path):
    named = write(tmp_path / "cat.safetensors", {"<cat>": (2, 64)})
    nameless = write(tmp_path / "easynegative.safetensors", {"emb_params": (8, 64)})

    assert word(named).textual_inversions[0].path == Path(named)
    assert word(nameless, token="easynegative").textual_inversions[0].path == Path(nameless)  # noqa: S106 - a word
    with pytest.raises(ConfigError, match=r"set model\.textual_inversions\[0\]\.token"):
        word(nameless)


@pytest.mark.parametrize("name", ["clip_l", "text_encoders_0", "*", "string_to_param.*"])
def test_a_tensor_that_is_named_after_a_text_encoder_needs_a_word(tmp_path, name):
    source = write(tmp_path / "cat.safetensors", {name: (2, 64), "string_to_token.*": ()})

    assert word(source, token="My_Cat").words == ("My_Cat",)  # noqa: S106 - a word
    with pytest.raises(ConfigError, match=r"does not name its word; set model\.textual_inversions\[0\]\.token"):
        word(source)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"<cat>": (1, 64), "<dog>": (1, 64)}, "textual inversions of several words; write a file for each word"),
        ({"<cat>": (0, 64)}, r"invalid shape \(0, 64\)"),
        ({"emb_params": (1, 2, 64)}, r"invalid shape \(1, 2, 64\)"),
    ],
    ids=["several words", "no vectors", "three sides"],
)
def test_what_is_no_list_of_vectors_of_one_word_is_refused(tmp_path, shapes, message):
    with pytest.raises(ConfigError, match=message):
        word(write(tmp_path / "cat.safetensors", shapes), token="cat8")  # noqa: S106 - a word


@pytest.mark.parametrize(
    ("files", "token", "message"),
    [
        ([{"a": (1, 64)}], None, "'a' is already in the vocabulary"),
        ([{"<cat>": (2, 64)}], "red</w>", "the word 'red</w>', but 'red</w>' is already in the vocabulary"),
        (
            [{"<cat>": (2, 64)}, {"<cat>": (1, 64)}],
            None,
            "'<cat>' is already .* or stands for another textual inversion",
        ),
        ([{"<cat>": (2, 64)}, {"<cat>_1": (1, 64)}], None, "'<cat>_1' is already"),
        ([{"<cat>": (1, 64)}, {"<CAT>": (1, 64)}], None, "'<CAT>' is already .* stands for another textual inversion"),
        (
            [{"<cat>": (1, 64)}, {"<cat>_1": (1, 64)}],
            None,
            "'<cat>_1' would be one more vector of .* '<cat>', as tokens",
        ),
        (
            [{"<cat>_1": (1, 64)}, {"<cat>": (1, 64)}],
            None,
            "the token '<cat>_1' would be one more vector of .* '<cat>'",
        ),
        ([{"<cat>": (3, 64)}, {"<cat>_3": (2, 64)}], None, "'<cat>_3' would be one more vector of .* '<cat>'"),
        (
            [{"<cat>_3": (2, 64)}, {"<cat>": (3, 64)}],
            None,
            r"'<cat>_3' would be .*; set another word as .*\[1\]\.token",
        ),
        ([{"<|endoftext|>_1": (1, 64)}], None, r"'<\|endoftext\|>_1' would be one more vector"),
        ([{"<cat>": (1, 64)}], "<|endoftext|>", r"already in the vocabulary .*; set another word as .*\[0\]\.token"),
    ],
)
def test_a_word_that_is_taken_is_refused_before_a_run(tmp_path, files, token, message):
    entries = tuple(
        TextualInversionConfig(source=write(tmp_path / f"{number}.safetensors", shapes), token=token)
        for number, shapes in enumerate(files)
    )

    with pytest.raises(ConfigError, match=rf"model\.textual_inversions\[{len(files) - 1}\].*{message}"):
        resolve(ModelConfig(textual_inversions=entries))


@pytest.mark.parametrize(
    "words", [("<a>", "<a>_2"), ("<a>", "<a_1>"), ("art", "artist"), ("<a>_1", "<b>"), ("small_1",)]
)
def test_words_that_are_alike_but_distinct_are_taken(tmp_path, words):
    entries = tuple(
        TextualInversionConfig(source=write(tmp_path / f"{number}.safetensors", {each: (1, 64)}))
        for number, each in enumerate(words)
    )

    assert resolve(ModelConfig(textual_inversions=entries)).words == words


def test_a_word_of_a_vocabulary_in_several_files_is_known(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny.PATH, folder)
    whole = folder / "tokenizer" / "tokenizer.json"
    model, added = (json.loads(whole.read_text())[key] for key in ("model", "added_tokens"))
    vocab = model["vocab"] | {one["content"]: one["id"] for one in added}
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    whole.unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    known = "".join(model["merges"][-1])
    source = write(tmp_path / "cat.safetensors", {"easynegative": (1, 64)})

    for token, refused in ((known, True), ("dogx7", False)):
        model = ModelConfig(base=str(folder), textual_inversions=(TextualInversionConfig(source=source, token=token),))
        with pytest.raises(ConfigError, match="already in the vocabulary") if refused else nullcontext():
            assert resolve(model).words == (token,)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"<cat>": (1, 768)}, r"\(embeddings: got 768 dimensions, expected 64\)"),
        ({"clip_l": (1, 768), "clip_g": (1, 1280)}, "wrong kind: Stable Diffusion XL textual inversion"),
        ({KOHYA: (4, 64), "b": (1,)}, r"it belongs in model\.loras"),
        ({"": (1, 64)}, r"has a blank word '', .*set another word as model\.textual_inversions\[0\]\.token"),
        ({"  ": (1, 64)}, "has a blank word '  '"),
        ({"a\nb": (1, 64)}, r"has the word 'a\\nb' with control characters"),
        ({"cat8": (19, 64)}, "has 19 vectors, but a prompt has at most 18 tokens"),
    ],
)
def test_a_textual_inversion_that_does_not_fit_is_refused(tmp_path, shapes, message):
    with pytest.raises(ConfigError, match=message):
        word(write(tmp_path / "a.safetensors", shapes))


# --- IP-Adapters ----------------------------------------------------------------------------------------------------

ATTENTION = {
    f"ip_adapter.{2 * number + 1}.{name}.weight": (width, 64)
    for number, width in enumerate((64, 112, 112, 112, 64, 64, 112))  # down, up, and the middle of the embedded model
    for name in ("to_k_ip", "to_v_ip")
}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"image_proj.{name}.weight": (width,), f"image_proj.{name}.bias": (width,)}


def plain(image: int = 12) -> dict[str, tuple[int, ...]]:
    """Four tokens of the text's width, 64, from one vector."""
    linear = {"image_proj.proj.weight": (256, image), "image_proj.proj.bias": (256,)}
    return linear | norm("norm", 64) | ATTENTION


PLAIN = plain()
PLUS = {
    "image_proj.latents": (1, 5, 16),
    "image_proj.proj_in.weight": (16, 24),
    "image_proj.proj_in.bias": (16,),
    "image_proj.proj_out.weight": (64, 16),
    "image_proj.proj_out.bias": (64,),
    **norm("norm_out", 64),
    **ATTENTION,
}
for layer in (f"layers.{index}" for index in range(4)):
    PLUS |= norm(f"{layer}.0.norm1", 16) | norm(f"{layer}.0.norm2", 16) | norm(f"{layer}.1.0", 16)
    PLUS |= {
        f"image_proj.{layer}.0.to_q.weight": (128, 16),  # two heads of 64
        f"image_proj.{layer}.0.to_kv.weight": (256, 16),
        f"image_proj.{layer}.0.to_out.weight": (16, 128),
        f"image_proj.{layer}.1.1.weight": (64, 16),
        f"image_proj.{layer}.1.3.weight": (16, 64),
    }
FULL_FACE = {
    "image_proj.proj.0.weight": (24, 24),
    "image_proj.proj.0.bias": (24,),
    "image_proj.proj.2.weight": (64, 24),
    "image_proj.proj.2.bias": (64,),
    **norm("proj.3", 64),
    **ATTENTION,
}


def without(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}


def tower(width: int, inner: int, layers: int, patches: int, patch: int, projected: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIPVisionModelWithProjection as transformers saves it."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (patches + 1, width),
        "visual_projection.weight": (projected, width),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_model.{name}.{each}": (width,) for each in ("weight", "bias")}
    for outer in (f"vision_model.encoder.layers.{k}" for k in range(layers)):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{outer}.{name}.weight": (width, width), f"{outer}.{name}.bias": (width,)}
        shapes |= {f"{outer}.mlp.fc1.weight": (inner, width), f"{outer}.mlp.fc1.bias": (inner,)}
        shapes |= {f"{outer}.mlp.fc2.weight": (width, inner), f"{outer}.mlp.fc2.bias": (width,)}
        shapes |= {f"{outer}.layer_norm{k}.{each}": (width,) for k in (1, 2) for each in ("weight", "bias")}
    return shapes


def encoder(folder: Path, nested: bool = False, **changes: tuple[int, ...] | None) -> str:
    """A folder with an image encoder; `changes` give tensors another shape, or None to leave them out."""
    shapes = tower(width=24, inner=32, layers=2, patches=4, patch=16, projected=12) | changes
    write(folder / "model.safetensors", {name: shape for name, shape in shapes.items() if shape is not None})
    known: dict[str, Any] = {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "image_size": 32, "patch_size": 16, "projection_dim": 12,
    }  # fmt: skip
    if nested:
        known = {"projection_dim": known.pop("projection_dim"), "vision_config": known}
    (folder / "config.json").write_text(json.dumps(known))
    return str(folder)


def adapter(source: str, hub: FakeHub | None = None, **more: Any) -> Weights:
    return resolve(ModelConfig(ip_adapter=IpAdapterConfig(source=source, **more)), hub)


@pytest.mark.parametrize("shapes", [PLAIN, PLUS, FULL_FACE], ids=["plain", "plus", "full face"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_ip_adapter_has_its_image_encoder_beside_it(tmp_path, shapes, nested):
    source = write(tmp_path / "models" / "ip-adapter.safetensors", shapes)
    encoder(tmp_path / "models" / "image_encoder", nested)

    for found in (adapter(source), adapter(str(tmp_path), weight_name="models/ip-adapter.safetensors")):
        assert found.ip_adapter is not None
        assert found.image_encoder is not None
        assert found.ip_adapter.path == Path(source)
        assert found.image_encoder.folder == tmp_path / "models" / "image_encoder"
        assert found.image_encoder.files == ("config.json", "model.safetensors")
        assert [label for label, _ in found.parts()][-2:] == ["ip_adapter", "image_encoder"]


@pytest.mark.parametrize("beside", [True, False])
def test_an_image_encoder_that_has_one_variant_alone_is_loaded(tmp_path, beside):
    source = write(tmp_path / "ip-adapter.safetensors", PLAIN)
    folder = tmp_path / "image_encoder"
    name = None if beside else encoder(folder)
    encoder(folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    hub = FakeHub(tmp_path / "hub", adapters=tmp_path)

    for found in (adapter(source, image_encoder=name), adapter("h94/adapters/ip-adapter.safetensors", hub)):
        assert found.image_encoder is not None
        assert found.image_encoder.files == ("config.json", "model.fp16.safetensors")

    shutil.copy(folder / "model.fp16.safetensors", folder / "model.bf16.safetensors")
    message = r"image_encoder: .* variants bf16, fp16; name the file of one, such as (image_encoder/)?model\.bf16\.safe"
    with pytest.raises(ConfigError, match=message):
        adapter(source, image_encoder=name)


def test_an_image_encoder_may_be_elsewhere(tmp_path):
    source = write(tmp_path / "ip-adapter.safetensors", PLAIN)

    found = adapter(source, image_encoder=encoder(tmp_path / "clip"))

    assert found.image_encoder is not None
    assert found.image_encoder.folder == tmp_path / "clip"


def test_adapter_and_encoder_of_the_hub_are_fetched_alone(tmp_path):
    for name in ("ip-adapter_sd15", "ip-adapter-plus_sd15"):
        write(tmp_path / "repository" / "models" / f"{name}.safetensors", PLAIN)
    encoder(tmp_path / "repository" / "models" / "image_encoder")
    encoder(tmp_path / "repository" / "sdxl_models" / "image_encoder")
    (tmp_path / "repository" / "models" / "image_encoder" / "pytorch_model.bin").write_bytes(b"\x80")
    hub = FakeHub(tmp_path / "hub", adapters=tmp_path / "repository")

    found = adapter("h94/adapters", hub, weight_name="models/ip-adapter_sd15.safetensors")

    snapshot = tmp_path / "hub" / "adapters" / COMMIT
    assert {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} == {
        "models/ip-adapter_sd15.safetensors",
        "models/image_encoder/config.json",
        "models/image_encoder/model.safetensors",
    }
    assert found.ip_adapter is not None
    assert found.ip_adapter.identity() == {"commit": COMMIT, "file": "models/ip-adapter_sd15.safetensors"}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
@pytest.mark.parametrize("part", ["adapter", "encoder"])
def test_a_quantized_ip_adapter_or_encoder_is_refused(tmp_path, part, dtype):
    source = write(tmp_path / "ip-adapter_sd15.safetensors", PLAIN)
    folder = Path(encoder(tmp_path / "image_encoder"))
    path = Path(source) if part == "adapter" else folder / "model.safetensors"
    held = load_file(path)
    name = "ip_adapter.1.to_k_ip.weight" if part == "adapter" else "visual_projection.weight"
    save_file(held | {name: held[name].astype(dtype)}, path)

    with pytest.raises(ConfigError, match=rf"tensor {name} has dtype [IU]\d+; quantized weights are not supported"):
        adapter(source)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (PLAIN | {"ip_adapter.1.to_k_ip.weight": (8, 2048)}, "made for another family of models than the base"),
        (
            PLAIN | {"ip_adapter.3.to_v_ip.weight": (64, 64)},
            r"which has 7 layers: it has other shapes: ip_adapter.3.to_v_ip.weight \(64, 64\) instead of \(112, 64\)",
        ),
        (
            PLAIN | {"ip_adapter.15.to_k_ip.weight": (64, 64)},
            "has unknown tensors ip_adapter.15.to_k_ip.weight; use an",
        ),
        (without(PLAIN, "ip_adapter.13."), "it has no ip_adapter.13.to_k_ip.weight, ip_adapter.13.to_v_ip.weight; use"),
        (
            PLAIN | {"image_proj.norm.weight": (2048,)},
            r"embeddings of 64 dimensions: it has other shapes: image_proj.norm.weight \(2048,\) instead of \(64,\)",
        ),
        (
            PLUS | {"image_proj.proj_out.weight": (768, 16)},
            r"image_proj.proj_out.weight \(768, 16\) instead of \(64, 16\)",
        ),
        (without(PLAIN, "ip_adapter."), r"has no tensors ip_adapter\.\*; it is not a complete IP-Adapter"),
        (
            {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0.weight": (8, 64), "b": (1,)},
            r"is no tensor of an IP-Adapter; use a file with image_proj\.\* and ip_adapter\.\* only",
        ),
        (PLAIN | {"ip_adapter.0.to_k_lora.down.weight": (8, 8)}, "is a FaceID adapter"),
        ({**PLAIN, "image_proj.proj.0.weight": (64, 512)}, "is a FaceID adapter"),
        (PLAIN | {"image_proj.perceiver_resampler.proj_in.weight": (8, 8)}, "is a FaceID adapter"),
        (
            PLAIN | {"image_proj.proj.weight": (256, 13)},
            "takes image embeddings of 13 dimensions, but the image encoder in",
        ),
        (
            PLUS | {"image_proj.proj_in.weight": (16, 25)},
            "takes image embeddings of 25 dimensions, but the image encoder in",
        ),
        ({KOHYA: (4, 64), "b": (1,)}, r"it belongs in model\.loras"),
        (PLAIN | {"optimizer.step": (1,)}, "holds 'optimizer.step', which is no tensor of an IP-Adapter"),
    ],
)
def test_an_ip_adapter_that_does_not_fit_is_refused(tmp_path, shapes, message):
    encoder(tmp_path / "image_encoder")

    with pytest.raises(ConfigError, match=message):
        adapter(write(tmp_path / "ip-adapter.safetensors", shapes))


PROJECTIONS = [("plain", PLAIN), ("plus", PLUS), ("full face", FULL_FACE)]


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        pytest.param(shapes, name, id=f"{kind} {name}")
        for kind, shapes in PROJECTIONS
        for name in shapes
        if name.startswith("image_proj.") and ".layers.1" not in name and ".layers.2" not in name
    ],
)
def test_an_image_projection_is_checked_tensor_by_tensor_without_loading_it(tmp_path, shapes, name):
    encoder(tmp_path / "image_encoder")
    wider = {name: (*shapes[name][:-1], shapes[name][-1] + 1)}

    for number, changed in enumerate((without(shapes, name), shapes | wider)):
        with pytest.raises(ConfigError, match=r"^model\.ip_adapter: "):
            adapter(write(tmp_path / f"{number}.safetensors", changed))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (PLAIN | {"image_proj.proj.1.weight": (64, 64)}, "unknown tensors image_proj.proj.1.weight"),
        (PLUS | norm("layers.4.0.norm1", 16), "unknown tensors image_proj.layers.4.0.norm1.bias"),
        (without(PLUS, "image_proj.layers.3."), "it has no image_proj.layers.3.0.norm1.bias, .* and 8 more; use"),
        (PLUS | {"image_proj.layers.2.0.to_q.weight": (64, 16)}, r"\(64, 16\) instead of \(128, 16\)"),
        (PLAIN | {"image_proj.proj.weight": (1024, 12)}, r"\(1024, 12\) instead of \(256, 12\)"),
    ],
    ids=["spare", "fifth layer", "three layers", "other heads", "sixteen tokens"],
)
def test_an_image_projection_of_another_structure_is_refused(tmp_path, shapes, message):
    encoder(tmp_path / "image_encoder")

    with pytest.raises(ConfigError, match=message):
        adapter(write(tmp_path / "ip-adapter.safetensors", shapes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_projection.weight": None}, "image_encoder: .*image_encoder is not .*: it has no visual_projection.w"),
        ({"vision_model.encoder.layers.1.mlp.fc1.bias": (31,)}, r"encoder.layers.1.mlp.fc1.bias \(31,\) instead of"),
        ({"vision_model.encoder.layers.2.mlp.fc1.bias": (32,)}, "unknown tensors encoder.layers.2.mlp.fc1.bias"),
    ],
    ids=["missing", "shape", "unknown"],
)
def test_an_image_encoder_in_a_folder_is_checked_without_loading_it(tmp_path, changes, message):
    encoder(tmp_path / "image_encoder", **changes)

    with pytest.raises(ConfigError, match=message):
        adapter(write(tmp_path / "ip-adapter.safetensors", PLAIN))


def test_an_ip_adapter_without_image_encoder_asks_for_one(tmp_path):
    source = write(tmp_path / "ip-adapter.safetensors", PLAIN)

    with pytest.raises(
        ConfigError, match=r"there is no image_encoder/ next to .*; set model\.ip_adapter\.image_encoder"
    ):
        adapter(source)
    with pytest.raises(
        ConfigError, match=r"image_encoder: ip-adapter\.safetensors is of the wrong kind: IP-Adapter; it be"
    ):
        adapter(source, image_encoder=source)


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """A safetensors file of real size that takes no space: a header, then a hole."""
    end, header = 0, {}
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return str(path)


def vit_h() -> dict[str, tuple[int, ...]]:
    """Names and shapes of CLIP-ViT-H."""
    return tower(width=1280, inner=5120, layers=32, patches=256, patch=14, projected=1024)


@pytest.mark.parametrize(
    "spare",
    [
        {},
        {"vision_model.embeddings.position_ids": (1, 257)},
        {"text_model.final_layer_norm.weight": (1024,), "logit_scale": (), "text_projection.weight": (1024, 1024)},
    ],
    ids=str,
)
def test_clip_vit_h_in_a_single_file_needs_no_config(tmp_path, spare):
    source = write(tmp_path / "ip-adapter.safetensors", plain(1024))
    path = write_hollow(tmp_path / "CLIP-ViT-H-14.safetensors", vit_h() | spare)

    found = adapter(source, image_encoder=path).image_encoder

    assert found is not None
    assert (found.path, found.layout, found.settings["num_attention_heads"]) == (Path(path), "single_file", 16)


def test_clip_vit_h_in_the_names_of_open_clip_needs_no_config(tmp_path):
    source = write(tmp_path / "ip-adapter.safetensors", plain(1024))
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.{each}": (1280,) for each in ("weight", "bias")}
    for outer in (f"visual.transformer.resblocks.{k}" for k in range(32)):
        shapes |= {f"{outer}.ln_{k}.{each}": (1280,) for k in (1, 2) for each in ("weight", "bias")}
        shapes |= {f"{outer}.attn.in_proj_weight": (3840, 1280), f"{outer}.attn.in_proj_bias": (3840,)}
        shapes |= {f"{outer}.attn.out_proj.weight": (1280, 1280), f"{outer}.attn.out_proj.bias": (1280,)}
        shapes |= {f"{outer}.mlp.c_fc.weight": (5120, 1280), f"{outer}.mlp.c_fc.bias": (5120,)}
        shapes |= {f"{outer}.mlp.c_proj.weight": (1280, 5120), f"{outer}.mlp.c_proj.bias": (1280,)}
    text = {"text_projection": (1024, 1024), "transformer.resblocks.0.ln_1.weight": (1024,), "logit_scale": ()}
    path = write_hollow(tmp_path / "open_clip_model.safetensors", shapes | text)

    found = adapter(source, image_encoder=path).image_encoder

    assert found is not None
    assert found.path == Path(path)
    shapes["visual.transformer.resblocks.3.attn.in_proj_bias"] = (2560,)
    with pytest.raises(ConfigError, match=r"encoder.layers.3.self_attn.q_proj.bias \(853,\) instead of \(1280,\)"):
        adapter(source, image_encoder=write_hollow(tmp_path / "damaged.safetensors", shapes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes.pop("visual_projection.weight"), "it has no visual_projection.weight"),
        (lambda shapes: shapes.update({"visual_projection.weight": (768, 1280)}), r"\(768, 1280\) instead of"),
        (
            lambda shapes: shapes.update({"trunk.conv1.weight": (1280, 3, 14, 14)}),
            "unknown tensors trunk.conv1.weight",
        ),
    ],
    ids=["missing", "shape", "unknown"],
)
def test_another_image_encoder_in_a_single_file_is_refused(tmp_path, change, message):
    source = write(tmp_path / "ip-adapter.safetensors", PLAIN)
    shapes = vit_h()
    change(shapes)

    with pytest.raises(ConfigError, match=message):
        adapter(source, image_encoder=write_hollow(tmp_path / "clip.safetensors", shapes))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_ip_adapter_as_its_training_saves_it_is_accepted_without_its_unet(tmp_path, prefix, caplog):
    names = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
    shapes = {}
    for name, shape in PLAIN.items():
        for old, new in names.items():
            if name.startswith(old):
                shapes[prefix + name.replace(old, new, 1)] = shape
    frozen = {f"{prefix}unet.conv_in.weight": (8, 4, 3, 3), f"{prefix}unet.conv_in.bias": (8,)}
    encoder(tmp_path / "image_encoder")

    with caplog.at_level("INFO"):
        found = adapter(write(tmp_path / "ip-adapter.safetensors", shapes | frozen))

    assert found.ip_adapter is not None
    assert [each for each in caplog.messages if "left_out" in each] == [
        "tensors_left_out key=model.ip_adapter file=ip-adapter.safetensors num_tensors=2"
    ]


def test_training_state_beside_the_vectors_is_left_out(tmp_path):
    shapes = {"emb_params": (8, 64), "step": (1,), "sd_checkpoint": ()}

    assert word(write(tmp_path / "easy.safetensors", shapes), token="easy").textual_inversions  # noqa: S106 - a word


def test_a_pickled_image_encoder_is_refused(tmp_path):
    source = write(tmp_path / "ip-adapter.safetensors", PLAIN)
    encoder(tmp_path / "image_encoder")
    (tmp_path / "image_encoder" / "model.safetensors").rename(tmp_path / "image_encoder" / "pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"only pytorch_model\.bin; pickled weights are refused"):
        adapter(source)


def test_adapter_and_encoder_are_part_of_the_id(tmp_path):
    source = write(tmp_path / "ip-adapter.safetensors", PLAIN)
    encoder(tmp_path / "image_encoder")
    model = ModelConfig(ip_adapter=IpAdapterConfig(source=source))
    seen = {engine_id(each, resolve(each), "float32") for each in (ModelConfig(), model)}

    config = tmp_path / "image_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    seen.add(engine_id(model, resolve(model), "float32"))
    values = {name: np.ones(shape, np.float16) for name, shape in PLAIN.items()}
    save_file(values, tmp_path / "ip-adapter.safetensors")
    seen.add(engine_id(model, resolve(model), "float32"))

    assert len(seen) == 4
