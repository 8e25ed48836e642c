"""Sections of a config about execution: placement, limits, budget and notifications."""

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
    """Number of engines, and the resources of each part of a run."""

    ray_address: str | None = Field(
        None,
        description="Address of the Ray cluster. null: RAY_ADDRESS, or else a Ray of the run's own on this machine.",
    )
    num_gpus: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Number of GPUs of one engine; a fraction shares a GPU between engines; 0: engines run on the CPU.",
    )
    num_cpus: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Number of CPUs of one engine, its encoder included."
    )
    min_engines: int = Field(1, ge=1, description="Number of engines that are started at once.")
    max_engines: int = Field(
        1,
        ge=1,
        description="Largest number of engines; those above min_engines are started while there is work for them.",
    )
    batch_size: int = Field(
        2,
        ge=1,
        le=64,
        description="Number of requests that are animated together, and that are attempted again if their "
        "worker crashes.",
    )
    fetch_num_cpus: float = Field(
        0.25, gt=0, allow_inf_nan=False, description="Number of CPUs of one fetch task, which mostly waits for images."
    )
    max_models: int | None = Field(
        None, ge=1, description="Largest number of models that one engine keeps loaded. null: all that fit into memory."
    )
    require_auth: bool = Field(
        default=False,
        description="true: refuse a Ray cluster that runs without token authentication; false: only warn.",
    )
    memory_mb: int | None = Field(
        None,
        ge=256,
        description="Host memory of one engine's process, in MiB. Ray reserves it; a request that exceeds it "
        "fails as `out_of_memory`. null: no limit.",
    )
    wait_s: float = Field(
        7200.0, gt=0, description="Longest time to wait for the cluster to place the first engine, in seconds."
    )
    object_store_mb: int | None = Field(
        None, ge=80, description="Size of the object store of a Ray of the run's own, in MiB. null: Ray's default."
    )

    @property
    def address(self) -> str:
        """Address of the Ray cluster to run on; `local`: a Ray of the run's own."""
        address = (self.ray_address or "").strip() or os.environ.get("RAY_ADDRESS", "").strip() or "local"
        return address.lower() if address.lower() in ("auto", "local") else address

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
    """Conditions that stop a run or fail a request."""

    max_failed: int | None = Field(
        None,
        ge=0,
        description="Stop after more than this number of failed requests (exit code 3). null: finish; any "
        "failure exits 3.",
    )
    max_frame_pixels: int = Field(
        1024 * 512 * 512,
        gt=0,
        description="Largest width x height x num_frames of one request, as generated and as stored; protects the "
        "host's memory.",
    )
    max_call_pixels: int = Field(
        32 * 1024 * 1024,
        gt=0,
        description="Largest width x height x frames of one UNet call: of a window, or of a whole clip without "
        "windows; protects the device's memory.",
    )
    min_frame_std: float | None = Field(
        None,
        ge=0,
        le=128,
        description="Smallest standard deviation of a clip's pixels, 0-255; below it the request fails as "
        "`degenerate` (flat or black). null: not checked.",
    )
    min_motion: float | None = Field(
        None,
        ge=0,
        le=255,
        description="Smallest mean difference of neighbouring frames, 0-255; below it the request fails as "
        "`degenerate` (frozen). null: not checked.",
    )
    timeout_s: float = Field(
        900.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest time for a batch of up to 25 steps x 16 frames x 512 x 512, in seconds; larger "
        "batches get proportionally more. Then the worker is ended, and the request that hangs "
        "fails as `timeout`.",
    )
    max_attempts: int = Field(
        3,
        ge=2,
        description="Largest number of attempts at a request whose worker dies: the first in its batch, the "
        "others alone.",
    )
    max_crashes: int = Field(
        20,
        ge=1,
        description="Stop the run after this number of requests in a row that failed because their worker died.",
    )
    lease_ttl_s: float = Field(
        60.0,
        ge=3,
        allow_inf_nan=False,
        description="Time after which a run that no longer renews its lease loses it, in seconds.",
    )
    lease_wait_s: float = Field(
        0.0,
        ge=0,
        description="Longest time to wait while another run holds the output's lease, in seconds; `.inf`: "
        "until it is free.",
    )
    stop_grace_s: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="Time that a run which stops gives to batches in flight, in seconds.",
    )


def _fraction(value: Any) -> Any:  # whatever was written
    """Return `1%` as 0.01, and any other value unchanged for pydantic."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


class BudgetConfig(Section):
    """Budget of a run. Reaching a limit stops it with exit code 4; finished requests stay committed."""

    max_gpu_hours: float | None = Field(
        None,
        gt=0,
        description="Stop after this many GPU-hours (exit code 4): total uptime of the engines times their "
        "GPUs; on the CPU, engine-hours. null: no limit.",
    )
    deadline: str | None = Field(
        None,
        description="Stop at this time (exit code 4): `06:00` (the next one, UTC), an ISO time, or a duration "
        "such as `5h`. null: no limit.",
    )
    limit: int | None = Field(
        None, ge=1, description="Largest number of requests that this run generates. null: no limit."
    )
    sample: Annotated[float, BeforeValidator(_fraction)] | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the requests to generate, such as `1%` or 0.01; always the same ones. null: all.",
    )
    priority: str | None = Field(
        None,
        min_length=1,
        description="Name of a numeric column; requests with the highest values are generated first. null: "
        "order of the manifest.",
    )
    price_per_hour: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Price of one GPU (or engine on the CPU) per hour, in any currency; adds the cost to the "
        "summary. null: no cost.",
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
    """Notifications at the end of a run, whatever its outcome."""

    command: tuple[str, ...] = Field(
        (),
        description="Program and its arguments to start when the run has ended; it reads the summary as JSON "
        "on standard input.",
    )
    webhook: str | None = Field(
        None,
        description="URL to post the summary to, or `$NAME` of an environment variable that contains it. null: none.",
    )
    headers: dict[str, str] = Field(
        default_factory=dict,
        description="Headers of the webhook's request: name of the header to name of the environment variable "
        "with its value.",
    )
    on: tuple[Literal["success", "failure", "always"], ...] = Field(
        ("always",), description="Outcomes that are notified; success: exit code 0; failure: any other."
    )
    timeout_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Longest time for the command, and for each attempt at the webhook, in seconds.",
    )

    @field_validator("webhook")
    @classmethod
    def _is_a_place_to_post_to(cls, text: str | None) -> str | None:
        if text is not None and not re.match(r"https?://|\$[A-Za-z_]", text):
            msg = f"must be a URL with http:// or https://, or $NAME of a variable (got {uris.redacted_uri(text)!r})"
            raise ValueError(msg)
        return text
