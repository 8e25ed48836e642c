"""AnimateBench as a source: the benchmark of PIA's authors, with seven models, five images each and three prompts each.

Layout of the dataset ymzhang319/AnimateBench: images `img/MODEL/1.png` to `5.jpg`, and for each model one file
`configs/MODEL.yaml` of the form of PIA's own configs, whose `prompts` has a list for each image.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs

from pia_batch.config import yaml_text
from pia_batch.datasets.archives import IMAGES
from pia_batch.datasets.sources import Images, Piece, Place, ReadOptions, Rows, check_version, reading
from pia_batch.errors import ManifestError
from pia_batch.storage.filesystems import FoundFile

_EXTENSIONS = tuple(f".{extension}" for extension in IMAGES)
_CONFIG = re.compile(r"configs/([^/]+)\.ya?ml")
_EXPECTED = (
    "expected `prompts` with one list of prompts for each image, as in PIA's configs; download the dataset again"
)


@dataclass(frozen=True)
class _Model:
    """Cases of one model.

    Attributes:
        name: Name of the model: that of its folder.
        config: File with the prompts.
        images: Images in the order of their numbers, each with its URI.
    """

    name: str
    config: FoundFile
    images: tuple[tuple[FoundFile, str], ...]


def is_animatebench(place: Place) -> bool:
    """Return True if a place has configs of models, and a folder of images for each."""
    return bool(_models(place))


def _models(place: Place) -> list[_Model]:
    """Return the models that have a config and images."""
    configs = {match[1]: file for file in place.files if (match := _CONFIG.fullmatch(place.name_of(file.path)))}
    folders: dict[str, list[FoundFile]] = {}
    for file in place.visible(*_EXTENSIONS):
        folder = posixpath.dirname(place.name_of(file.path))
        if folder.startswith("img/"):
            folders.setdefault(folder.removeprefix("img/"), []).append(file)
    return [
        _Model(
            name, configs[name], tuple((file, place.uri_of(file.path)) for file in sorted(folders[name], key=_number))
        )
        for name in sorted(configs.keys() & folders.keys())
    ]


def _number(file: FoundFile) -> tuple[int, str]:
    """Return the place of an image among those of its model: by number, not by text."""
    name = posixpath.basename(file.path)
    digits = re.match(r"\d+", name)
    return (int(digits[0]) if digits else 0, name)


@dataclass(frozen=True)
class AnimateBenchSource:
    """Cases of AnimateBench, one piece for each model."""

    filesystem: pyarrow.fs.FileSystem
    pieces: Sequence[Piece]
    pinned: Mapping[str, str]
    images: Images
    schema: pa.Schema | None = None

    @classmethod
    def open(cls, place: Place, options: ReadOptions) -> AnimateBenchSource:
        """Open all models; images stay URIs, which an evaluation reads again, except for those of the hub."""
        pieces = []
        for model in _models(place):
            files = (model.config, *(file for file, _ in model.images))
            pieces.append(Piece(model.name, " ".join(file.version for file in files), model))
        pinned = {"commit": place.commit} if place.commit else {}
        is_hub = place.uri.startswith("hf://")
        return cls(place.filesystem, tuple(pieces), pinned, options.images or ("bytes" if is_hub else "uris"))

    def read(self, piece: Piece) -> Iterator[Rows]:
        """Yield the cases of one model."""
        model: _Model = piece.detail
        prompts, negatives = _prompts(self._bytes(model.config), model)
        rows: list[dict[str, Any]] = []
        for number, (file, uri) in enumerate(model.images):
            image = {"image": uri} if self.images == "uris" else {"image_bytes": self._bytes(file)}
            for k, prompt in enumerate(prompts[number], start=1):
                case = {"request_id": f"{model.name}/{number + 1}/{k}", "prompt": prompt, "model": model.name}
                rows.append(case | image | {"negative_prompt": negatives[number], "image_number": number + 1})
        table = pa.Table.from_pylist(rows)
        yield Rows(table, table["request_id"].combine_chunks())

    def _bytes(self, file: FoundFile) -> bytes:
        with reading(file.path), self.filesystem.open_input_stream(file.path) as stream:
            data = bytes(stream.read())
        check_version(self.filesystem, file)
        return data


def _prompts(data: bytes, model: _Model) -> tuple[list[list[str]], list[str | None]]:
    """Return the prompts of each image, and its negative prompt.

    Raises:
        ManifestError: The config has none, or not one list for each image.
    """
    place = f"source {model.config.path}"
    try:
        config = yaml_text.parse(data.decode())
    except ValueError as err:
        raise ManifestError(f"{place}: {err}; {_EXPECTED}") from None
    config = config if isinstance(config, dict) else {}
    prompts, negatives = config.get("prompts"), config.get("n_prompt") or [None]
    negatives = [negatives] if isinstance(negatives, str) else negatives
    count = len(model.images)
    if not isinstance(prompts, list) or not all(_is_texts(some) for some in prompts) or len(prompts) != count:
        found = f"{len(prompts)} entries" if isinstance(prompts, list) else "no list"
        raise ManifestError(f"{place}: `prompts` has {found} for {count} images; {_EXPECTED}")
    if len(negatives) not in (1, count):
        raise ManifestError(
            f"{place}: `n_prompt` has {len(negatives)} entries for {count} images; write one, or one each"
        )
    return prompts, list(negatives) * (count if len(negatives) == 1 else 1)


def _is_texts(value: Any) -> bool:  # a value of YAML
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
