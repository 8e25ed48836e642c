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
        self._frames: NDArray[np.uint8] | None = None
        self._count = 0
        self._latents: list[torch.Tensor] = []
        self.generator: torch.Generator | None = None
        """Generator of the last piece, which the next one continues; None before the first."""
        self.unet_samples: float = 0
        """Cost of all pieces, as in `sampling.Row`."""

    @property
    def is_complete(self) -> bool:
        """True if all frames are there."""
        return self._count == self._shot.num_frames

    @property
    def next_piece(self) -> Shot:
        """Shot of the next piece."""
        shot = self._shot
        if not self._chained:
            return shot
        piece = dataclasses.replace(shot, num_frames=shot.context_length, context=None)
        if self._frames is None:
            return piece
        prompt = shot.image if shot.ip_adapter_image is None else shot.ip_adapter_image
        last = Image.fromarray(self._frames[self._count - 1])
        return dataclasses.replace(piece, image=last, ip_adapter_image=prompt)

    @property
    def next_frames(self) -> range:
        """Frames of the clip that the next piece has; the last ones may be beyond the end."""
        first = max(0, self._count - 1)
        return range(first, first + self.next_piece.num_frames)

    @property
    def frames(self) -> NDArray[np.uint8] | None:
        """All frames: uint8, (F, H, W, 3); None before the first piece."""
        return self._frames

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
        first = 1 if self._count else 0
        last = first + self._shot.num_frames - self._count
        frames = frames[first:last]
        if not self._chained:
            self._frames = frames
        else:
            if self._frames is None:
                self._frames = np.empty((self._shot.num_frames, *frames.shape[1:]), np.uint8)
            self._frames[self._count : self._count + len(frames)] = frames
        self._count += len(frames)
        if latents is not None:
            self._latents.append(latents[:, first:last].cpu())
