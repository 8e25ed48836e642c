"""RunConfig: the config of one run, loaded from its layers, and its templates filled in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from pia_batch.config import templates as schedule
from pia_batch.config.base import Section
from pia_batch.config.execution import BudgetConfig, LimitsConfig, OnFinishConfig, PlacementConfig
from pia_batch.config.layers import assign, complete, embedded, merge, read_yaml
from pia_batch.config.messages import explain
from pia_batch.config.models import EMBEDDED, ModelConfig
from pia_batch.config.presets import Preset, as_names, under
from pia_batch.config.requests import Defaults, EncodingConfig, ImagesConfig
from pia_batch.config.safety import SafetyConfig
from pia_batch.config.upscaling import UpscaleConfig
from pia_batch.errors import ConfigError
from pia_batch.schema.columns import REQUEST, RESERVED
from pia_batch.storage import schemes, uris

RequestIdFrom = Literal["column", "content", "location"]

_ALIKE = 0.85
"""Similarity from which on an unknown name in `columns` is taken for a mistyped one."""


def _date_text(value: Any) -> Any:  # whatever was written
    """Return a date that YAML has read as the text that was written."""
    return value.isoformat() if isinstance(value, date) and not isinstance(value, datetime) else value


class RunConfig(Section):
    """Config of one run: a manifest in, animations and results out."""

    manifest: str = Field(
        min_length=1,
        description="URI of a Parquet, JSONL or CSV file, a folder, or a partitioned prefix; may contain `{date}`.",
    )
    output: str = Field(min_length=1, description="URI of the folder that receives all results; may contain `{date}`.")
    run_id: str | None = Field(
        None,
        description="Name of the run's results; may contain `{date}`. null: made from the run date, or from the time.",
    )
    run_date: Annotated[str, BeforeValidator(_date_text)] | None = Field(
        None,
        description="Value of `{date}` and `{hour}`, UTC: `2026-11-22` or `2026-11-22T05`. null: the last "
        "day, or hour, that is over.",
    )
    params: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        default_factory=dict, description="Further placeholders of `manifest`, `output` and `run_id`: name to value."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Columns of the manifest that have other names there: our name to its source, such as "
        "`prompt: caption`, or a dotted path into a struct. A name that is none of a request's carries the source.",
    )
    request_id_from: RequestIdFrom = Field(
        "column",
        description="Origin of request ids. column: the manifest's `request_id`; content: a hash of image, prompt and "
        "settings, so that equal rows are one request; location: file and row, where no file may change.",
    )
    preset: Annotated[tuple[Preset, ...], BeforeValidator(as_names)] = Field(
        (),
        description="A name or several, for keys that this file leaves out; paper: what the script of PIA's authors "
        "does; per_frame_vae, bf16_vae, paper_negative_prompt: that part of it alone.",
    )
    model: ModelConfig = ModelConfig()
    models: dict[str, ModelConfig] = Field(
        default_factory=dict,
        description="Further models by name, for the manifest's `model` column; keys that one omits are as in `model`.",
    )
    defaults: Defaults = Defaults()
    images: ImagesConfig = ImagesConfig()
    encoding: EncodingConfig = EncodingConfig()
    upscale: UpscaleConfig = UpscaleConfig()
    safety: SafetyConfig = SafetyConfig()
    placement: PlacementConfig = PlacementConfig()
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    on_finish: OnFinishConfig = OnFinishConfig()

    @property
    def templates(self) -> schedule.Templates:
        """Templates of manifest, output and run id.

        Raises:
            ConfigError: a placeholder without a value.
        """
        texts = {"manifest": self.manifest, "output": self.output, "run_id": self.run_id or ""}
        return schedule.Templates(texts, self.params)

    def filled(self, now: datetime | None = None) -> Self:
        """Return the config with placeholders filled in, and with its run date, if it has one.

        A dated run without a run id is named after its date and the parameters that were used.

        Raises:
            ConfigError: a placeholder without a value, or a run date that does not fit them.
        """
        templates = self.templates
        run_date = templates.date(self.run_date, now or datetime.now(UTC))
        texts: dict[str, str | None] = dict(templates.fill(run_date))
        if run_date is not None and self.run_id is None:
            used = (value for name, value in self.params.items() if name in templates.used)
            texts["run_id"] = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([str(run_date), *used]))[:120]
        texts["run_id"] = texts["run_id"] or None
        return self.model_copy(update=texts | {"run_date": None if run_date is None else str(run_date)})

    @field_validator("output")
    @classmethod
    def _can_be_written_to(cls, text: str) -> str:
        try:
            schemes.find(text, "output")
        except schemes.UnsupportedSchemeError as err:
            problem, _, remedy = str(err).partition("; ")
            raise ValueError(f"{problem} (got {uris.redacted_uri(text)!r}); {remedy}") from None
        return text

    @field_validator("run_date")
    @classmethod
    def _is_a_date(cls, text: str | None) -> str | None:
        return text if text is None else str(schedule.RunDate.parse(text))

    @field_validator("params")
    @classmethod
    def _names_can_stand_in_braces(cls, params: dict[str, str]) -> dict[str, str]:
        for name, value in params.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in ("date", "hour"):
                msg = f"a name has letters, digits and '_', and is neither date nor hour (got {name!r})"
                raise ValueError(msg)
            if not value or not value.isprintable():
                msg = f"{name}: must be a text without control characters, and not empty (got {value!r})"
                raise ValueError(msg)
        return params

    @field_validator("columns")
    @classmethod
    def _map_known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name, source in columns.items():
            if not source.strip() or not name.strip():
                msg = f"neither the name nor the source of a column may be empty (got {{{name!r}: {source!r}}})"
                raise ValueError(msg)
            if name in RESERVED:
                msg = f"results have a column with this name (got {name!r}); choose another, such as source_{name}"
                raise ValueError(msg)
            near = difflib.get_close_matches(name, REQUEST.names, n=1, cutoff=_ALIKE)
            if near and near[0] != name:
                msg = (
                    f"no column of a request (got {name!r}); did you mean {near[0]!r}? A column to carry needs "
                    "another name"
                )
                raise ValueError(msg)
        return columns

    @property
    def all_models(self) -> dict[str, ModelConfig]:
        """Every model by its name in the manifest's `model` column, the default one first."""
        return {self.model.name: self.model, **self.models}

    @property
    def upscaler(self) -> str | None:
        """Identity of the upscaler on the devices of `placement`, for the content key; None without one."""
        return self.upscale.identity(on_gpu=self.placement.num_gpus > 0)

    @property
    def original_models(self) -> frozenset[str]:
        """Names of the models with the arithmetic of PIA's authors."""
        return frozenset(name for name, model in self.all_models.items() if model.arithmetic == "original")

    @model_validator(mode="before")
    @classmethod
    def _complete_models(cls, data: Any) -> Any:  # whatever was written
        if not isinstance(data, dict):
            return data
        data = under(data)
        if not isinstance(data.get("models"), dict):
            return data
        default = data.get("model") or {}
        if isinstance(default, ModelConfig):
            default = default.model_dump(exclude_unset=True)
        return data | {"models": {name: complete(name, entry, default) for name, entry in data["models"].items()}}

    @model_validator(mode="after")
    def _has_one_origin_of_ids(self) -> RunConfig:
        if "request_id" in self.columns and self.request_id_from != "column":
            msg = f"columns.request_id: request_id_from is {self.request_id_from}, which makes the ids; leave one out"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> RunConfig:
        if self.model.name in self.models:
            msg = f"models.{self.model.name}: this is the name of `model` too; set model.name, or choose another"
            raise ValueError(msg)
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Return the config of a YAML file with `overrides`, on top of the embedded model's own defaults.

        Args:
            path: YAML file; None: defaults and overrides only.
            overrides: Values by dotted key, such as `{"placement.batch_size": 4}`.

        Raises:
            ConfigError: the file is unreadable, a key is unknown (named with the nearest), or a value is out of range.
        """
        written = read_yaml(Path(path)) if path is not None else {}
        for key, value in (overrides or {}).items():
            assign(written, key, value)
        model = written.get("model")
        base = model.get("base", EMBEDDED) if isinstance(model, dict) else EMBEDDED
        layers = merge(embedded(), written) if base == EMBEDDED else written
        try:
            return cls.model_validate(layers)
        except ValidationError as err:
            raise ConfigError(explain(err, cls, str(path) if path else "command line")) from None
