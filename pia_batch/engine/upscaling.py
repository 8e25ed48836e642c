"""Upscaling of frames by a network that spandrel loads, in tiles of bounded size."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pia_batch.config import UpscaleConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import upscaler_files

Picture = npt.NDArray[np.uint8]
"""(H, W, 3) RGB, 0-255."""

TILE, OVERLAP = 256, 32
"""Largest side of what one call reads, and the pixels of it on each side that only surround what is kept.

They decide pixels: to change one, add it to `UpscaleConfig.identity`."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_TORCHVISION = {
    "torchvision": (),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("InterpolationMode", "normalize", "rotate"),
}
"""Names that spandrel 0.4.2 imports from torchvision, for two networks that are no upscalers: LaMa, RestoreFormer."""


class Upscaler:
    """A network that enlarges pictures, one at a time. Calls of several threads need a lock.

    Args:
        network: `ImageModelDescriptor` of spandrel.
        device: Torch device of the network.
        dtype: Data type of its arithmetic; float32 where its architecture does not support it.
        tile: Largest width and height of what one call reads, in pixels, the overlap included.
        overlap: Number of pixels that a tile reads beyond what is kept of it, on each side. If it is at least the
            radius of the network's receptive field, tiles make the same picture as one call.
    """

    def __init__(self, network: Any, device: str, dtype: torch.dtype, tile: int = TILE, overlap: int = OVERLAP) -> None:
        supported = {torch.float16: network.supports_half, torch.bfloat16: network.supports_bfloat16}
        largest = max(float(tensor.detach().abs().max()) for tensor in network.model.parameters() if tensor.numel())
        fits = supported.get(dtype, True) and largest <= torch.finfo(dtype).max
        self._dtype = dtype if fits else torch.float32
        self._network = network.to(device, self._dtype).eval()
        self._device, self._tile, self._overlap = torch.device(device), tile, overlap
        # Not the stream of the engine, whose next batch is on the device meanwhile.
        self._stream = _new_stream(self._device) if self._device.type == "cuda" else None
        self.scale: int = network.scale

    @classmethod
    def load(cls, upscale: UpscaleConfig, device: str, dtype: str) -> Upscaler | None:
        """Return the upscaler that the config names, on `device`; None if it names none.

        Args:
            upscale: Section `upscale` of the config.
            device: Torch device.
            dtype: Result of `upscale.resolved_dtype`.

        Raises:
            ConfigError: spandrel is not installed; or its file is missing, another one than the plan found, is refused
                by spandrel, or has NaN or infinity.
            StorageError: An object store refused or did not answer.
        """
        file = upscaler_files.resolve(upscale)
        if file is None:
            return None
        loader = _spandrel().ModelLoader(device="cpu")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the constructors of SwinIR and DAT
                network = loader.load_from_file(file.path)
        except Exception as err:  # whatever a network's constructor raises
            problem = f"upscale.model: spandrel cannot load {file.path}: {err}; use another copy of it"
            raise ConfigError(problem) from err
        if network.scale != file.network.scale:
            raise ConfigError(
                f"upscale.model: spandrel finds another factor in {file.path} than the plan (got {network.scale}, "
                f"expected {file.network.scale}); use another network"
            )
        for name, tensor in network.model.named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"upscale.model: {file.path}: {name} holds NaN or infinity; use another copy of it")
        return cls(network, device, _DTYPES[dtype])

    def __call__(self, picture: Picture, factor: int) -> Picture:
        """Return the picture, `factor` times as wide and as high.

        Args:
            picture: Picture, uint8, shape (H, W, 3), 0-255.
            factor: Factor, 1 to `scale`. Below `scale`, the network's picture is reduced by Lanczos.
        """
        with torch.inference_mode(), self._on_stream():
            enlarged = self._enlarged(picture)
        if factor == self.scale:
            return enlarged
        size = (picture.shape[1] * factor, picture.shape[0] * factor)
        return np.asarray(Image.fromarray(enlarged).resize(size, Image.Resampling.LANCZOS))

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _enlarged(self, picture: Picture) -> Picture:
        height, width, _ = picture.shape
        enlarged = np.empty((height * self.scale, width * self.scale, 3), np.uint8)
        for top, bottom in _spans(height, self._tile, self._overlap):
            for left, right in _spans(width, self._tile, self._overlap):
                above, below = max(0, top - self._overlap), min(height, bottom + self._overlap)
                before, after = max(0, left - self._overlap), min(width, right + self._overlap)
                tile = self._tile_enlarged(picture[above:below, before:after])
                rows = slice((top - above) * self.scale, (bottom - above) * self.scale)
                columns = slice((left - before) * self.scale, (right - before) * self.scale)
                into = enlarged[top * self.scale : bottom * self.scale, left * self.scale : right * self.scale]
                into[:] = tile[rows, columns]
        return enlarged

    def _tile_enlarged(self, tile: Picture) -> Picture:
        """Return an enlarged tile; where half precision overflows, that of float32."""
        pixels = torch.from_numpy(np.ascontiguousarray(tile)).to(self._device)
        unit = pixels.permute(2, 0, 1)[None].float() / 255
        found = self._network(unit.to(self._dtype))[0].float()
        if self._dtype != torch.float32 and not bool(torch.isfinite(found).all()):
            self._network.to(dtype=torch.float32)
            try:
                found = self._network(unit)[0]
            finally:
                self._network.to(dtype=self._dtype)  # loses nothing: the weights were in this type before
        if not bool(torch.isfinite(found).all()):
            msg = "the upscaler returned NaN or infinity; use another network, or leave out `upscale`"
            raise RuntimeError(msg)
        enlarged: Picture = (found.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        return enlarged


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def _spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a side that tiles keep: as few as possible, of about the same length."""
    kept = length if length <= tile else max(1, tile - 2 * overlap)
    number = -(-length // kept)
    for index in range(number):
        yield index * length // number, (index + 1) * length // number


def _spandrel() -> Any:
    """Import spandrel, also where torchvision is not installed: no upscaler needs it.

    Raises:
        ConfigError: It is not installed.
    """
    upscaler_files.require_spandrel()
    if "spandrel" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("spandrel")
    for name, members in _TORCHVISION.items():
        placeholder = types.ModuleType(name)
        placeholder.__dict__.update(dict.fromkeys(members))
        sys.modules[name] = placeholder
    try:
        return importlib.import_module("spandrel")
    finally:  # transformers looks for torchvision, and must not find this
        for name in _TORCHVISION:
            del sys.modules[name]
