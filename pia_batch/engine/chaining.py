"""Chains: clips in pieces of one UNet call each, where the last frame of a piece is the image of the next one."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pia_batch.config import contexts
from pia_batch.engine.shots import Shot


class Film:
    """Frames of one shot, piece by piece; a single piece unless its `context` is chain.

    Each further piece begins with a frame that is there already, which is left out; the last one is cut. All pieces
    have the motion curve, and the image prompt, of the first.
    """

    def __init__(self, shot: Shot, positions: int) -> None:
        """Create a film without frames.

        Args:
            shot: The shot.
            positions: Number of frames that the model's motion modules know.
        """
        method = contexts.method(shot.context, shot.num_frames, shot.context_length, positions)
        self._shot = shot
        self._chained = method == "chain"
        self._frames: list[NDArray[np.uint8]] = []
        self._latents: list[torch.Tensor] = []
        self.generator: torch.Generator | None = None
        """Generator of the last piece, which the next one continues; None before the first."""
        self.unet_samples: float = 0
        """Cost of all pieces, as in `sampling.Row`."""

    @property
    def is_complete(self) -> bool:
        """True if all frames are there."""
        return sum(map(len, self._frames)) == self._shot.num_frames

    @property
    def next_piece(self) -> Shot:
        """Shot of the next piece."""
        shot = self._shot
        if not self._chained:
            return shot
        piece = dataclasses.replace(shot, num_frames=shot.context_length, context=None)
        if not self._frames:
            return piece
        prompt = shot.image if shot.ip_adapter_image is None else shot.ip_adapter_image
        return dataclasses.replace(piece, image=Image.fromarray(self._frames[-1][-1]), ip_adapter_image=prompt)

    @property
    def frames(self) -> NDArray[np.uint8]:
        """All frames: uint8, (F, H, W, 3)."""
        return self._frames[0] if len(self._frames) == 1 else np.concatenate(self._frames)

    @property
    def latents(self) -> torch.Tensor:
        """Latents of all frames, (4, F, h, w), on the CPU."""
        return torch.cat(self._latents, dim=1)

    def add(self, frames: NDArray[np.uint8], latents: torch.Tensor | None = None) -> None:
        """Add a piece.

        Args:
            frames: Frames of the piece, first to last.
            latents: Their latents, (4, F, h, w); None: they are not kept.
        """
        first = 1 if self._frames else 0
        last = first + self._shot.num_frames - sum(map(len, self._frames))
        self._frames.append(frames[first:last])
        if latents is not None:
            self._latents.append(latents[:, first:last].cpu())
