"""Decoding of latents to uint8 frames, in bounded chunks, with a check that the frames are finite."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from pia_batch.engine.compiling import Call, directly
from pia_batch.errors import NonFiniteError

_CHUNK_PIXELS = 4 * 512 * 512
"""Number of pixels decoded at a time. The decoder's activations, not its weights, decide the peak memory of a clip."""

_CPU_CHUNK_PIXELS = 8 * 64 * 64
"""The same on a CPU. Activations larger than its caches take twice the time (measured: 8.1 against 4.1 ms a frame)."""


class FrameDecoder:
    """Decoder of a VAE; it keeps a float32 copy of the VAE once half precision has overflowed."""

    def __init__(self, vae: Any, call: Call = directly, *, per_frame: bool = False) -> None:
        """Create a decoder.

        Args:
            vae: `AutoencoderKL`, or an object with its interface.
            call: Function that calls `decode_chunk`, such as a `Compiler`. Not used where the VAE works in slices or
                tiles.
            per_frame: True to decode one frame in each call.
        """
        self._vae = vae
        self._full_precision: Any = None
        self._call = call
        self._per_frame = per_frame

    def decode(self, latents: Sequence[torch.Tensor]) -> list[NDArray[np.uint8] | NonFiniteError]:
        """Return the frames of each row, or an error; a failed row does not affect the others.

        The host waits for the device once, after all rows are decoded.

        Args:
            latents: Tensors (1, 4, F, h, w), which differ in F at most.

        Returns:
            For each row uint8 (F, H, W, 3), RGB, 0-255. An error where latents or frames hold NaN or infinity; in half
            precision: after a second try in float32.
        """
        results: list[NDArray[np.uint8] | NonFiniteError] = [
            NonFiniteError("the denoised latents hold NaN or infinity, which decoding cannot fix") for _ in latents
        ]
        if not latents:
            return results
        are_finite = torch.stack([torch.isfinite(row).all() for row in latents])
        decoded = self._frames(self._vae, latents)
        for index, (frames, whole) in enumerate(zip(decoded, are_finite.cpu().tolist(), strict=True)):
            if whole:
                results[index] = self._decode_in_float32(latents[index]) if frames is None else frames
        return results

    def _decode_in_float32(self, latents: torch.Tensor) -> NDArray[np.uint8] | NonFiniteError:
        if self._vae.dtype != torch.float32:
            if self._full_precision is None:
                self._full_precision = copy.deepcopy(self._vae).float()
            frames = self._frames(self._full_precision, [latents.float()])[0]
            if frames is not None:
                return frames
        return NonFiniteError("the decoded frames hold NaN or infinity, in float32 too")

    def _frames(self, vae: Any, latents: Sequence[torch.Tensor]) -> list[NDArray[np.uint8] | None]:
        """Decode rows (1, 4, F, h, w); return the frames of each row, or None where a frame is not finite.

        Chunks go to the host one by one, so that the device never holds a whole clip.
        """
        size = latents[0].shape[3:]
        on_cpu = latents[0].device.type == "cpu"
        images = torch.cat([row[0].transpose(0, 1) for row in latents])
        stride = 2 ** (len(vae.config.block_out_channels) - 1)
        budget = _CPU_CHUNK_PIXELS if on_cpu else _CHUNK_PIXELS
        chunk = 1 if self._per_frame else max(1, budget // (size[0] * size[1] * stride**2))
        call = self._call if isinstance(vae, AutoencoderKL) and not (vae.use_slicing or vae.use_tiling) else directly
        frames: torch.Tensor | None = None
        complete = []
        for first, part in enumerate(torch.split(images, chunk)):
            scaled = 1 / vae.config.scaling_factor * part.to(vae.dtype)
            if not on_cpu:
                scaled = scaled.contiguous(memory_format=torch.channels_last)
            pixels, finite = call(decode_chunk, vae, scaled)
            if frames is None:
                # Pinned, so that the copies are queued: they are complete once the device has done all earlier work.
                frames = torch.empty((len(images), *pixels.shape[1:]), dtype=pixels.dtype, pin_memory=not on_cpu)
            frames[first * chunk : first * chunk + len(pixels)].copy_(pixels, non_blocking=True)
            complete.append(finite)
        if frames is None:
            return []
        whole = torch.cat(complete).cpu().numpy()  # waits; the frames are then there, too
        ends = np.cumsum([row.shape[2] for row in latents])[:-1]
        clips = zip(np.split(frames.numpy(), ends), np.split(whole, ends), strict=True)
        return [clip if finite.all() else None for clip, finite in clips]


def decode_chunk(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode (N, 4, h, w) to uint8 (N, H, W, 3), 0-255, and bool (N,): True for each finite frame."""
    decoded = vae.decode(latents).sample.float()
    finite = torch.isfinite(decoded).flatten(1).all(dim=1)
    unit = (decoded * 0.5 + 0.5).clamp(0, 1).nan_to_num()
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1), finite
