"""Where a run draws, when it stops, what it may spend, and who hears of its end."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pia_batch.config import templates
from pia_batch.config.base import Section
from pia_batch.storage import uris


class PlacementConfig(Section):
    """What runs where."""

    ray_address: str | None = Field(None, description="null: RAY_ADDRESS, else a Ray of our own on this machine")
    num_gpus: float = Field(0.0, ge=0, le=1, description="GPUs of one engine; a fraction shares one; 0: on the CPU")
    num_cpus: float = Field(1.0, gt=0, description="CPUs of one engine, its encoder included")
    min_engines: int = Field(1, ge=1, description="Number of engines that are started at once.")
    max_engines: int = Field(
        1,
        ge=1,
        description="Largest number of engines; those above min_engines are started while there is work for them.",
    )
    batch_size: int = Field(2, ge=1, le=64, description="requests animated together; also what a crash can cost")
    fetch_num_cpus: float = Field(0.25, gt=0, description="CPUs of one fetch task; it mostly waits")
    max_models: int | None = Field(None, ge=1, description="models that one engine keeps; null: as many as fit")
    require_auth: bool = Field(
        default=False, description="refuse a Ray cluster that runs without token authentication; else only warn"
    )
    memory_mb: int | None = Field(
        None,
        ge=256,
        description="host memory of one engine's process, MiB: Ray sets it aside, and a request that takes more fails "
        "as `out_of_memory`; null: no limit",
    )
    wait_s: float = Field(7200.0, gt=0, description="seconds that a run waits for a cluster to give it an engine")
    object_store_mb: int | None = Field(None, ge=80, description="object store of a Ray of our own, MiB")

    @property
    def address(self) -> str:
        """The Ray that a run draws on; `local`: one of its own."""
        return self.ray_address or os.environ.get("RAY_ADDRESS") or "local"

    @model_validator(mode="after")
    def _fits_together(self) -> PlacementConfig:
        if self.max_engines < self.min_engines:
            msg = f"max_engines {self.max_engines} is below min_engines {self.min_engines}"
            raise ValueError(msg)
        if self.fetch_num_cpus >= self.num_cpus:
            msg = (
                f"fetch_num_cpus {self.fetch_num_cpus:g} must be below num_cpus {self.num_cpus:g}: "
                "Ray would run two steps of equal needs as one, and fetch images inside the engine"
            )
            raise ValueError(msg)
        return self


class LimitsConfig(Section):
    """When a run stops, and what it calls a success."""

    max_failed: int | None = Field(
        None,
        ge=0,
        description="failed requests that are tolerated: one more stops the run, with exit code 3; null: none stops "
        "it, and any ends it with 3",
    )
    max_frame_pixels: int = Field(
        32 * 1024 * 1024,
        gt=0,
        description="width x height x num_frames of one request, against exhausted memory",
    )
    min_frame_std: float | None = Field(
        None, ge=0, le=128, description="a clip whose pixels vary less, 0-255, fails as `degenerate`: flat or black"
    )
    min_motion: float | None = Field(
        None, ge=0, le=255, description="a clip whose frames differ less, 0-255, fails as `degenerate`: frozen"
    )
    timeout_s: float = Field(
        900.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds for a batch up to 25 steps x 16 frames x 512 x 512; beyond that in proportion. Then its "
        "worker is ended, and the request that hangs fails as `timeout`",
    )
    max_attempts: int = Field(
        3, ge=2, description="how often a request whose worker dies is begun, once in its batch, then alone"
    )
    max_crashes: int = Field(
        20, ge=1, description="requests in a row that fail for their worker's sake, after which the run stops"
    )
    lease_ttl_s: float = Field(
        60.0, ge=3, allow_inf_nan=False, description="seconds after which a silent run loses its lease"
    )
    lease_wait_s: float = Field(
        0.0, ge=0, description="seconds that a run queues while another works on the output; `.inf`: until it is free"
    )
    stop_grace_s: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="seconds that a run which stops leaves to batches in flight"
    )


def _fraction(value: Any) -> Any:  # whatever was written
    """`1%` as 0.01; what is no percentage is left to pydantic."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


class BudgetConfig(Section):
    """What a run may spend. Reaching a limit stops it with exit code 4; what was finished is committed."""

    max_gpu_hours: float | None = Field(
        None, gt=0, description="hours that engines are alive, times their GPUs; on the CPU, hours of engines"
    )
    deadline: str | None = Field(
        None, description="`06:00` (the next one, UTC), an ISO time, or a duration such as `5h`"
    )
    limit: int | None = Field(None, ge=1, description="requests drawn in this run, at most")
    sample: Annotated[float, BeforeValidator(_fraction)] | None = Field(
        None, gt=0, le=1, description="draw this part of the requests only, such as `1%` or 0.01; always the same ones"
    )
    priority: str | None = Field(None, min_length=1, description="a column of numbers: the highest are drawn first")
    price_per_hour: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="of one GPU (or engine on the CPU), in any currency; tells a cost"
    )

    @field_validator("deadline", mode="before")
    @classmethod
    def _has_a_meaning(cls, text: Any) -> Any:  # whatever was written
        if isinstance(text, datetime):
            return text.isoformat()
        if isinstance(text, str):
            templates.deadline(text, datetime.now(UTC))
        return text


class OnFinishConfig(Section):
    """Who is told when a run has ended, however it did."""

    command: tuple[str, ...] = Field((), description="a program and its arguments; reads the summary as JSON")
    webhook: str | None = Field(
        None,
        description="a URL that the summary is posted to, or `$NAME` of an environment variable that has it",
    )
    headers: dict[str, str] = Field(
        default_factory=dict, description="of the webhook: header to the environment variable that has its value"
    )
    on: tuple[Literal["success", "failure", "always"], ...] = Field(
        ("always",), description="success: exit code 0; failure: any other"
    )
    timeout_s: float = Field(
        30.0, gt=0, le=3600, description="seconds for the command, and for each try of the webhook"
    )

    @field_validator("webhook")
    @classmethod
    def _is_a_place_to_post_to(cls, text: str | None) -> str | None:
        if text is not None and not re.match(r"https?://|\$[A-Za-z_]", text):
            msg = f"{uris.redacted_uri(text)!r} is no URL with http:// or https://, and no $NAME of a variable"
            raise ValueError(msg)
        return text
