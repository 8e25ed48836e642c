"""`weights.safetensors`: identifying files, and refusing files that could run code, by their first bytes."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file
from safetensors.torch import save_file as save_torch_file

from pia_batch.errors import ConfigError
from pia_batch.weights import model_kinds, safetensors

OTHER_FAMILY = "checkpoint of another family than Stable Diffusion 1.5"
OTHER_WORDS = "textual inversion of another family than Stable Diffusion 1.5"
SHAPES = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
        lambda name: name != "__metadata__"
    ),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    max_size=6,
)


def tensors(*names: str, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """Zeros; names with dots come first, with the shape 1."""
    return {name: np.zeros(1, np.float16) for name in names} | {
        name.replace("__", "."): np.zeros(shape, np.float16) for name, shape in shapes.items()
    }


def unet(channels: int) -> dict[str, Any]:
    return tensors(model__diffusion_model__input_blocks__0__0__weight=(8, channels, 3, 3))


@given(shapes=SHAPES)
@settings(max_examples=50, deadline=None)
def test_names_and_shapes_are_those_that_were_saved(shapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path, {"format": "pt"})

    assert safetensors.read(path).shapes == shapes


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@given(data=st.binary(max_size=64) | st.binary(max_size=40).map(with_length))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_bytes_are_a_config_error_or_a_file_that_the_library_opens_too(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)

    try:
        safetensors.read(path)
    except ConfigError:
        return
    with safe_open(path, "np"):
        pass


@given(cut=st.integers(1, 10_000))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_was_cut_short_or_is_too_long_is_refused(cut, tmp_path):
    whole = save({"a": np.zeros(100), "b": np.ones(30)})
    path = tmp_path / "x.safetensors"

    for content in (whole[: -(cut % len(whole)) or None], whole + bytes(cut)):
        path.write_bytes(content)
        if content != whole:
            with pytest.raises(ConfigError, match=r"truncated|wrong size|not copied in full|cannot be read"):
                safetensors.read(path)
            with pytest.raises((SafetensorError, OSError)), safe_open(path, "np"):
                pass


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"1",
        b'{"a": 1}',
        b'{"a": {"shape": [1]}}',
        b'{"a": {"shape": [1e999], "data_offsets": [0, 0]}}',
        b"[" * 10**5,
    ],
    ids=["list", "number", "no tensor", "no offsets", "infinite", "deep"],
)
def test_a_header_that_means_nothing_is_a_config_error(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_length(header))

    with pytest.raises(ConfigError, match="its header cannot be read"):
        safetensors.read(path)


TENSOR = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"\xef\xbb\xbf" + json.dumps({"a": TENSOR}).encode(),
        json.dumps({"a": TENSOR}).encode("utf-16"),
        {"a": TENSOR | {"shape": [4.0]}},
        {"a": TENSOR | {"shape": ["4"]}},
        {"a": TENSOR | {"shape": [True, 4]}},
        {"a": TENSOR | {"shape": "4"}},
        {"a": TENSOR | {"data_offsets": [0, 8, 9]}},
        {"a": TENSOR | {"data_offsets": [0.0, 8.0]}},
        {"a": TENSOR | {"data_offsets": "08"}},
        {"a": TENSOR, "__metadata__": {"x": 1}},
        {"a": TENSOR, "__metadata__": {"x": None}},
        {"a": TENSOR, "__metadata__": []},
        {"\ud800": TENSOR},
        {"a": TENSOR, "b": {"dtype": "F16", "shape": [2**40, 2**40, 0], "data_offsets": [8, 8]}},
    ],
    ids=str,
)
def test_a_header_that_only_the_library_would_refuse_is_a_config_error(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_length(header if isinstance(header, bytes) else json.dumps(header).encode()) + bytes(8))

    with pytest.raises(ConfigError, match=r"its header cannot be read .*fetch it again"):
        safetensors.read(path)
    with pytest.raises(SafetensorError), safe_open(path, "np"):
        pass


class RunsCode:
    """What a malicious checkpoint holds."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_under_the_name_of_safetensors_is_refused_unopened(protocol, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "ran"), protocol))

    with pytest.raises(ConfigError, match=r"x\.safetensors has a safetensors name, but it is a pickle"):
        safetensors.read(path)
    assert not (tmp_path / "ran").exists()


def test_a_torch_archive_under_the_name_of_safetensors_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))

    with pytest.raises(ConfigError, match=r"a pickle, which is refused.*Convert it to safetensors"):
        safetensors.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; fetch the file again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            r"a pointer of Git LFS, .*git lfs pull",
        ),
        (b"<!DOCTYPE html><html>Sign in</html>", r"is HTML or XML, not a safetensors file; .*login"),
        (b"\n<html><body>404</body></html>", "is HTML or XML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is HTML or XML"),
        (b'{"error": "Repository not found"}', r"is text \('{\"error\": .*\), not a safetensors file; .*login"),
        (b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
        (b"\x08\x07\x12\x07pytorch" + bytes(99), "an ONNX file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
        (b"\x1f\x8b\x08\x00" + bytes(99), "is compressed with gzip, not a safetensors file; unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive"),
        (b"Entry not found", r"is text \('Entry not found'\), not a safetensors file"),
        (b"PK\x03\x04" + bytes(26) + b"model.safetensors" + bytes(99), "a zip archive .*; unpack it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "is a PNG image, not"),
        (bytes(5000), "holds only zeros"),
        (
            (99).to_bytes(8, "little") + b'{"a": ',
            "ends inside of its header .got 14 bytes, expected at least 107.*again",
        ),
        ((9999).to_bytes(8, "little") + b'{"a":' + b" " * 5000, "ends inside of its header .*; fetch it again"),
        (b"sys_info".ljust(257, b"\0") + b"ustar  \0" + bytes(99), "is a pickle, which is refused"),
        (b"checkpoint/".ljust(257, b"\0") + b"ustar  \0" + bytes(99), "is a tar archive, .*; unpack it"),
        (b"\6" + bytes(7) + b"[1, 2]", "its header cannot be read .it is list, expected an object"),
        (b"\4" + bytes(7) + b"null", "its header cannot be read .it is NoneType, expected an object"),
    ],
    ids=[
        "empty",
        "LFS",
        "page",
        "page after a line",
        "XML",
        "JSON",
        "GGUF",
        "ONNX",
        "HDF5",
        "gzip",
        "7z",
        "text",
        "zip",
        "PNG",
        "zeros",
        "cut",
        "cut after much text",
        "tar of torch",
        "tar",
        "list",
        "null",
    ],
)
def test_another_file_under_the_name_of_safetensors_is_named_with_a_remedy(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        safetensors.read(path)


@pytest.mark.parametrize("name", ["x.ckpt", "x.PT", "s3://bucket/x.pth", "owner/name/x.bin"])
def test_names_of_pickles_are_refused_with_their_key_and_a_remedy(name):
    with pytest.raises(ConfigError, match=r"model\.base: .* is a pickle, .*Convert it to safetensors"):
        safetensors.refuse_pickle(name, "model.base")


def test_other_names_than_safetensors_are_refused_and_safetensors_are_not():
    safetensors.refuse_pickle("x.safetensors", "model.base")
    safetensors.refuse_pickle("X.SafeTensors", "model.base")

    with pytest.raises(ConfigError, match=r"x\.gguf is not a \.safetensors file"):
        safetensors.refuse_pickle("x.gguf", "model.base")


def test_a_header_of_more_tensors_than_any_model_has_is_refused_before_its_names_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 3)
    path = tmp_path / "model.safetensors"
    for number in (3, 4):
        save_file({str(k): np.zeros(1, np.float32) for k in range(number)}, path)
        if number == 3:
            assert len(safetensors.read(path).shapes) == number
    with pytest.raises(ConfigError, match="it names 4 tensors, more than any model's 3"):
        safetensors.read(path)


def test_a_file_that_is_not_there_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*x\.safetensors"):
        safetensors.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("held", "kind"),
    [
        (unet(4), "Stable Diffusion 1.5 checkpoint"),
        (unet(9), "inpainting checkpoint"),
        (unet(8), "InstructPix2Pix checkpoint"),
        (unet(4) | tensors("cond_stage_model.model.ln_final.weight"), "Stable Diffusion 2 checkpoint"),
        (unet(9) | tensors("cond_stage_model.model.ln_final.weight"), "Stable Diffusion 2 checkpoint"),
        (unet(4) | tensors("conditioner.embedders.0.transformer.x"), "Stable Diffusion 1.5 checkpoint"),
        (unet(9) | tensors("conditioner.embedders.0.transformer.x"), "inpainting checkpoint"),
        *(
            (unet(4) | tensors("conditioner.embedders.0.transformer.x", other), "Stable Diffusion XL checkpoint")
            for other in ("conditioner.embedders.1.model.x", "model.diffusion_model.label_emb.0.0.weight")
        ),
        (
            tensors("model.diffusion_model.double_blocks.0.x", "b"),
            OTHER_FAMILY,
        ),
        (tensors("double_blocks.0.img_attn.qkv.weight", "b"), OTHER_FAMILY),
        (tensors("control_model.input_blocks.0.0.weight", "b"), "ControlNet"),
        (tensors("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "b"), "LoRA"),
        (tensors("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "b"), "LoRA"),
        (tensors("unet.mid_block.attentions.0.attn1.processor.to_q_lora.down.weight", "b"), "LoRA"),
        (tensors("unet.mid_block.attentions.0.proj_in.lora.down.weight", "b"), "LoRA"),
        (tensors("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "b"), "LoRA"),
        (tensors("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "b"), "LoRA"),
        (tensors("lora_unet_mid_block_attentions_0_proj_in.diff", "b"), "LoRA"),
        (tensors("bundle_emb.cat.string_to_param.*", "b"), "LoRA"),
        (tensors("image_proj_model.proj.weight", "unet.conv_in.weight"), "IP-Adapter"),
        (tensors("adapter_modules.1.to_k_ip.weight", "b"), "IP-Adapter"),
        (tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "IP-Adapter"),
        (tensors("ip_adapter.0.to_k_lora.down.weight", "b"), "IP-Adapter"),
        ({"<cat>": np.zeros((2, 16))}, "textual inversion"),
        ({"emb_params": np.zeros((2, 16)), "step": np.zeros(1)}, "textual inversion"),
        (tensors("clip_l", "clip_g"), "Stable Diffusion XL textual inversion"),
        ({"*": np.zeros((2, 16)), "string_to_token.*": np.zeros(())}, "textual inversion"),
        ({"<cat>": np.zeros(16), "<dog>": np.zeros((2, 16))}, "textual inversions of several words"),
        (tensors("unet:0:up", "unet:0:down"), "LoRA of numbered layers (cloneofsimo/lora)"),
        (tensors("lllite_unet_input_blocks_1_1_attn1_to_q.down.0.weight", "b"), "ControlNet"),
        (tensors("lora_controlnet", "input_blocks.1.0.in_layers.2.up"), "ControlNet"),
        (tensors("down_blocks.0.motion_modules.0.norm.weight", "controlnet_down_blocks.0.weight"), "ControlNet"),
        (
            tensors("model_ema.diffusion_modelinput_blocks00weight", "first_stage_model.decoder.conv_in.weight"),
            "checkpoint with averaged weights only",
        ),
        (tensors("vae.encoder.conv_in.weight", "vae.decoder.conv_in.weight"), "VAE"),
        (tensors("down_blocks.0.motion_modules.0.norm.weight", "conv_in.weight"), "motion adapter"),
        (tensors("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "b"), "motion adapter"),
        (tensors("first_stage_model.decoder.conv_in.weight", "b"), "VAE"),
        (tensors("encoder.conv_in.weight", "decoder.conv_in.weight"), "VAE"),
        (tensors("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight"), "VAE"),
        (
            tensors("conv_in.weight", "down_blocks.0.resnets.0.norm1.weight", "time_embedding.linear_1.weight"),
            "UNet of a diffusers folder",
        ),
        (tensors("text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.x"), "text encoder"),
        (tensors("embeddings.token_embedding.weight", "encoder.layers.0.x"), "text encoder"),
        (tensors("model.layers.0.mlp.weight", "model.layers.1.mlp.weight"), "file of unknown layout"),
        ({}, "file of unknown layout"),
        (tensors("transformer_blocks.0.attn.to_q.weight"), OTHER_FAMILY),
        (tensors("double_blocks.0.img_attn.proj.weight"), OTHER_FAMILY),
        (unet(8) | tensors("model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight"), OTHER_FAMILY),
        (tensors("input_blocks.0.0.weight", "time_embed.0.weight"), "UNet without VAE and text encoder"),
        (tensors("320.0.linear.0.weight"), "file of unknown layout"),
        (tensors("base_model.model.unet.shira_weight"), "file of unknown layout"),
        (tensors("clip_l", "t5xxl"), OTHER_WORDS),
        (tensors("clip_l", "clip_g", "t5xxl"), OTHER_WORDS),
        (tensors("text_encoders_0", "text_encoders_1"), OTHER_WORDS),
        (tensors("down_blocks.1.temporal_attentions.0.norm.weight", "b"), "motion modules of HotShot-XL"),
    ],
)
def test_files_are_told_apart_by_their_names_and_shapes(held, kind, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(held, path)

    assert model_kinds.kind(safetensors.read(path)) == kind


def test_the_header_alone_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F16", "shape": [2**35], "data_offsets": [0, 2**36]}}).encode()
    with path.open("wb") as file:
        file.write(with_length(header))
        file.truncate(8 + len(header) + 2**36)  # 64 GB that the disk need not have

    assert safetensors.read(path).shapes == {"a": (2**35,)}


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_is_read_as_torch_reads_it_alone(dtype, tmp_path):
    """All values of the dtypes of eight bits, and 512 others."""
    size = torch.empty((), dtype=dtype).element_size()
    patterns = np.arange(256, dtype=np.uint8)[:, None] if size == 1 else np.random.default_rng(0).bytes(512 * size)
    content = np.frombuffer(bytes(patterns), np.uint8).reshape(-1, size) & (1 if dtype == torch.bool else 255)
    held = {f"t{k}": torch.from_numpy(row.copy()).view(dtype) for k, row in enumerate(content)}
    save_torch_file(held | {"other": torch.zeros(9)}, tmp_path / "x.safetensors")

    found = safetensors.numbers(safetensors.read(tmp_path / "x.safetensors"), held)

    np.testing.assert_array_equal(list(found.values()), [float(value.item()) for value in held.values()])
