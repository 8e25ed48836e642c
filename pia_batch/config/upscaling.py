"""Section of a config about upscaling: the network that enlarges frames before they are stored."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pia_batch.config.base import Section


class UpscaleConfig(Section):
    """Network that enlarges generated frames. Its weights are part of the content key of rows that it enlarges."""

    model: str | None = Field(
        None,
        description="Upscaler: a safetensors file, or a folder, object-storage URI or hub id with exactly one: ESRGAN, "
        "SwinIR, DAT, SPAN or Compact (Real-ESRGAN's small networks). null: none. Needs the extra `upscale`.",
    )
    revision: str | None = Field(
        None, description="Hub commit, tag or branch of `model`; a commit pins it. null: `main`."
    )
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the file of `model`; another file is refused. null: that of the file that the plan "
        "finds.",
    )
    scale: int | None = Field(
        None,
        ge=1,
        le=8,
        description="Factor of width and height for rows without a value in column `upscale`, up to that of `model`; "
        "below it, pictures are reduced again by Lanczos. 1: only such rows. null: the factor of `model`.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Data type of its arithmetic; auto: float16 on a GPU, float32 on a CPU. SwinIR and others without "
        "support for half precision use float32.",
    )

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        given = [name for name in ("revision", "sha256", "scale") if getattr(self, name) is not None]
        if self.model is None and given:
            msg = f"{given[0]}: has no effect without upscale.model; name an upscaler there, or remove it"
            raise ValueError(msg)
        return self

    def resolved_dtype(self, *, on_gpu: bool) -> str:
        """Return what `dtype` means on this device: `float32`, `float16` or `bfloat16`."""
        if self.dtype != "auto":
            return self.dtype
        return "float16" if on_gpu else "float32"

    def identity(self, *, on_gpu: bool) -> str | None:
        """Return what decides the pixels of enlarged frames, for the content key; None without a model.

        Args:
            on_gpu: True: the engines, and so the upscaler, use a GPU.
        """
        if self.model is None:
            return None
        return f"sha256={self.sha256} dtype={self.resolved_dtype(on_gpu=on_gpu)}"
