"""`weights.tokenizer_files`, and the text files of models: what is damaged, cut short or of another kind is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import CLIPTokenizer

from pia_batch import tiny
from pia_batch.config import LoraConfig, ModelConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import components, sd15, token_ids, tokenizer_files
from pia_batch.weights.fetching import FetchedFolder
from pia_batch.weights.resolve import resolve

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"<!DOCTYPE html><html>Sign in</html>"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, with the tokenizer of CLIP as Stable Diffusion 1.5 has it."""
    return shutil.copytree(tiny.PATH, tmp_path / "base")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder whose `tokenizer/` is that of Stable Diffusion 1.5: vocabulary and merges in two files."""
    shutil.copytree(sd15.PATH / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def find(folder: Path) -> components.Component:
    return tokenizer_files.find(FetchedFolder(folder, None, str(folder)))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- text files of every kind ----------------------------------------------------------------------------------------

TEXT_FILES = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "motion_adapter/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "model_index.json",
]
CONTENTS: dict[str, tuple[bytes, str]] = {
    "a pointer": (POINTER, r"is a pointer of Git LFS, not the file that it stands for; run `git lfs pull`"),
    "a page": (PAGE, "is HTML or XML; download the file itself, which may need a login"),
    "S3's answer": (b'<?xml version="1.0"?>\n<Error/>', "is HTML or XML"),
    "nothing": (b"", "is empty; fetch the file again"),
    "spaces": (b"\n\n", "is empty"),
    "zeros": (bytes(64), "holds only zeros"),
    "half": (b'{"a": 1, "b": ', r"is not JSON, or was cut short \(it ends early\); fetch the file again"),
    "text": (b"Entry not found", "is not JSON, or was cut short"),
    "a list": (b"[1]", r"does not contain a JSON object \(got list\)"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(9), "is compressed with gzip; unpack it"),
    "UTF-16": ('{"a": 1, "b": 2}'.encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "a mark": ('{"a": 1}'.encode("utf-8-sig"), "is text in UTF-8 with a byte order mark; save it as UTF-8 without"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "is not text in UTF-8"),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_config_that_is_no_json_is_named_with_what_it_is_and_the_remedy(base, name, kind):
    content, message = CONTENTS[kind]
    (base / name).write_bytes(content)

    with pytest.raises(ConfigError, match=message) as raised:
        resolve(ModelConfig(base=str(base)))

    assert str(base / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_record_of_peft_that_is_a_pointer_is_named(base, tmp_path):
    name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    width = json.loads((base / "unet/config.json").read_text())["block_out_channels"][-1]
    held = {f"{name}_A.weight": np.zeros((2, width)), f"{name}_B.weight": np.zeros((width, 2))}
    save_file(held, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(POINTER)

    with pytest.raises(ConfigError, match=r"adapter_config\.json is a pointer of Git LFS"):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "adapter_model.safetensors")),)))


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_stable_diffusion_is_whole(clip):
    found = find(clip)

    assert found.files == ("merges.txt", "tokenizer_config.json", "vocab.json")
    whole = CLIPTokenizer.from_pretrained(clip / "tokenizer", local_files_only=True).get_vocab()
    assert tokenizer_files.vocabulary(found) == set(whole)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a pointer of Git LFS.*git lfs pull"),
        (PAGE, "is HTML or XML"),
        (b"", "is empty"),
        (bytes(99), "holds only zeros"),
    ],
    ids=["pointer", "page", "empty", "zeros"],
)
def test_each_file_of_a_tokenizer_is_opened_before_a_run(clip, name, content, message):
    (clip / "tokenizer" / name).write_bytes(content)

    with pytest.raises(ConfigError, match=rf"{name} {message}"):
        find(clip)


def _cut(folder: Path, lines: int) -> None:
    path = folder / "merges.txt"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]), encoding="utf-8")


def _replace(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "merges.txt"
    path.write_bytes(path.read_bytes().replace(old, new))


def test_lines_may_end_as_on_windows(clip):
    _replace(clip / "tokenizer", b"\n", b"\r\n")

    assert find(clip).files == ("merges.txt", "tokenizer_config.json", "vocab.json")
    ids = CLIPTokenizer.from_pretrained(clip / "tokenizer", local_files_only=True)("a lighthouse").input_ids
    assert (
        ids == CLIPTokenizer.from_pretrained(sd15.PATH / "tokenizer", local_files_only=True)("a lighthouse").input_ids
    )


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "merges, half": (lambda folder: _cut(folder, 20_000), r"merges\.txt has no merge for 28895 tokens of vocab\.json"),
    "merges, one less": (lambda folder: _cut(folder, -1), "has no merge for 1 tokens"),
    "merges, in a line": (
        lambda folder: (folder / "merges.txt").write_bytes((folder / "merges.txt").read_bytes()[:-4]),
        r"merges\.txt.*(not two tokens|no merge for)",
    ),
    "merges of text": (
        lambda folder: (folder / "merges.txt").write_text("#version: 0.2\ni n\nnot found in here\n"),
        r"merges\.txt, line 3: not two tokens with one space \('not found in here'\)",
    ),
    "merges with tabs": (lambda folder: _replace(folder, b" ", b"\t"), "line 2: not two tokens with one space"),
    "merges with empty lines": (lambda folder: _replace(folder, b"\n", b"\n\n"), "line 2: not two tokens"),
    "merges in one line": (lambda folder: _replace(folder, b"\n", b"\r"), "no merge for 48894 tokens"),
    "vocabulary of nothing": (lambda folder: (folder / "vocab.json").write_text("{}"), "holds no tokens"),
    "vocabulary of words": (
        lambda folder: (folder / "vocab.json").write_text('{"error": "Not found"}'),
        r"token 'error' has no number \(got 'Not found'\)",
    ),
    "another class": (
        lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="T5Tokenizer"),
        r"tokenizer_config\.json: this is a T5Tokenizer, but the tokenizer must be a CLIPTokenizer",
    ),
    "added tokens": (lambda folder: (folder / "added_tokens.json").write_text("<html>"), r"added_tokens\.json is HTML"),
    "another model": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", 0]]}}'),
        "is a Unigram tokenizer, not that of CLIP",
    ),
    "no model": (lambda folder: (folder / "tokenizer.json").write_text('{"error": "x"}'), "holds no tokens"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_vocabulary_that_gives_other_tokens_is_refused(clip, case):
    spoil, message = SPOILED[case]
    spoil(clip / "tokenizer")

    with pytest.raises(ConfigError, match=message):
        find(clip)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "tokenizer/tokenizer_config.json",
            {"added_tokens_decoder": {"720": {"content": "<x>"}}},
            r"tokens up to number 720 \('<x>'\), but the text encoder .* has 720 embeddings",
        ),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, r"model_max_length \(got 77, expected 3 to 20"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "invalid model_max_length"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": None}, r"model_max_length \(got None"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "[PAD]"}, r"up to number 720 \('\[PAD\]'\), but the text"),
        ("tokenizer/tokenizer_config.json", {"extra_special_tokens": ["<m>"]}, r"up to number 720 \('<m>'\)"),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, r"invalid pad_token \(got null, expected a text\)"),
        ("tokenizer/tokenizer_config.json", {"bos_token": None}, r"invalid bos_token \(got null, expected a text\)"),
        (
            "tokenizer/tokenizer_config.json",
            {"unk_token": {"content": "x"}},
            r'invalid unk_token \(got \{"content": "x"\}',
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"added_tokens_decoder": None},
            r"invalid added_tokens_decoder \(it is no ob",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"added_tokens_decoder": {"5": "x"}},
            r"invalid added_tokens_decoder \('5' is",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"added_tokens_decoder": {"x": {}}},
            r"invalid added_tokens_decoder \('x' is",
        ),
        ("tokenizer/tokenizer.json", {"added_tokens": [{"content": "<x>"}]}, r"token '<x>' has no number \(got None\)"),
        ("tokenizer/tokenizer_config.json", {"eos_token": "</s>"}, "has no token '</s>' .*which is its eos_token"),
    ],
)
def test_a_tokenizer_fits_its_text_encoder(base, name, changes, message):
    edit(base / name, **changes)

    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(base=str(base)))


# --- added tokens ----------------------------------------------------------------------------------------------------

NUM = 720
"""Number of tokens of the embedded tokenizer, and of rows in its text encoder."""
PAD = {"content": "[PAD]", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
OWN = PAD | {"id": NUM, "content": "<own>", "special": False}
ADDED: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "added_tokens": {"added_tokens.json": {"<x>": NUM, "<y>": NUM + 1}},
    "with gaps, in another order": {"added_tokens.json": {"<y>": NUM + 9, "<x>": NUM + 5}},
    "one of them in the vocabulary": {"added_tokens.json": {"moving</w>": 5, "<x>": NUM}},
    "two of one number": {"added_tokens.json": {"<x>": NUM, "<y>": NUM}},
    "an empty one": {"added_tokens.json": {"": NUM, "<x>": NUM + 1}},
    "no tokens": {"added_tokens.json": {}},
    "special ones of the vocabulary": {"added_tokens.json": {"<|endoftext|>": NUM - 1, "<|startoftext|>": NUM - 2}},
    "not read": {"added_tokens.json": {"<x>": NUM}, "tokenizer_config.json": {"added_tokens_decoder": {}}},
    "decoder": {
        "tokenizer_config.json": {"added_tokens_decoder": {"729": {"content": "<b>"}, "721": {"content": "<a>"}}}
    },
    "in tokenizer.json too": {"added_tokens.json": {"<own>": NUM}, "tokenizer.json": {"added_tokens": [OWN]}},
    "another of the same number": {"added_tokens.json": {"<x>": NUM}, "tokenizer.json": {"added_tokens": [OWN]}},
    "padding": {"tokenizer_config.json": {"pad_token": "[PAD]", "mask_token": "<mask>", "cls_token": "<cls>"}},
    "padding, as an object": {"tokenizer_config.json": {"pad_token": PAD | {"__type": "AddedToken"}}},
    "map": {"special_tokens_map.json": {"additional_special_tokens": ["<m>"], "pad_token": PAD}},
    "map, not read": {
        "special_tokens_map.json": {"additional_special_tokens": ["<m>"], "pad_token": "[PAD]"},
        "tokenizer_config.json": {"added_tokens_decoder": {}},
    },
    "extra": {"tokenizer_config.json": {"extra_special_tokens": ["<s>"]}, "added_tokens.json": {"<x>": NUM}},
    "additional": {"tokenizer_config.json": {"additional_special_tokens": ["<s>", PAD | {"__type": "AddedToken"}]}},
    "by name": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<i>"}, "own_token": "<o>"}},
}
DECISIVE = {
    "added_tokens",
    "with gaps, in another order",
    "one of them in the vocabulary",
    "two of one number",
    "an empty one",
    "extra",
}
"""Cases in which prompts would have other tokens without added_tokens.json."""


def add(folder: Path, case: str) -> None:
    for name, changes in ADDED[case].items():
        path = folder / "tokenizer" / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


@pytest.mark.parametrize("case", ADDED)
def test_added_tokens_have_the_numbers_that_transformers_assigns(base, case):
    add(base, case)

    expected = CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True).get_vocab()
    found = find(base)

    contents = {name: json.loads((base / "tokenizer" / name).read_text()) for name in found.files}
    assert token_ids.assigned(contents) == expected
    assert tokenizer_files.vocabulary(found) == set(expected)


@pytest.mark.parametrize("case", ADDED)
def test_added_tokens_json_is_part_of_the_identity_if_it_changes_the_tokens_of_prompts(base, case):
    add(base, case)
    found = find(base)
    identity = found.identity()
    (base / "tokenizer" / "added_tokens.json").unlink(missing_ok=True)

    assert ("added_tokens.json" in found.files) == (case in DECISIVE)
    assert (identity != find(base).identity()) == (case in DECISIVE)


def test_an_added_token_needs_a_row_in_the_text_encoder(base):
    add(base, "added_tokens")

    with pytest.raises(ConfigError, match=r"tokens up to number 721 \('<y>'\), but the text encoder .* has 720 embedd"):
        resolve(ModelConfig(base=str(base)))


@pytest.mark.parametrize("number", ["720", None, 720.5, -1, True], ids=str)
def test_an_added_token_without_a_number_is_refused(base, number):
    (base / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<x>": number}))

    with pytest.raises(ConfigError, match=r"added_tokens\.json: token '<x>' has no number"):
        resolve(ModelConfig(base=str(base)))
