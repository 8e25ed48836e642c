"""RunConfig and its sections: every option of a run, validated before anything starts.

A config is one YAML file. It has four layers, and later ones win: the defaults here (made for Stable Diffusion 1.5),
the keys of presets, the embedded model's own defaults if `model.base` is `embedded`, and the operator's file. An
unknown key is an error.
"""

from pia_batch.config.base import Section
from pia_batch.config.execution import BudgetConfig, LimitsConfig, OnFinishConfig, PlacementConfig
from pia_batch.config.models import (
    EMBEDDED,
    AddOn,
    FreeUConfig,
    IpAdapterConfig,
    LoraConfig,
    ModelConfig,
    SchedulerConfig,
    SchedulerName,
    TextualInversionConfig,
)
from pia_batch.config.requests import Defaults, EncodingConfig, Fit, ImagesConfig
from pia_batch.config.run import RequestIdFrom, RunConfig
from pia_batch.config.safety import SafetyConfig
from pia_batch.config.upscaling import UpscaleConfig
from pia_batch.schema.settings import FORMATS, FREE_INIT_METHODS, MAX_FPS, MOTIONS, Format, FreeInitMethod, Motion, Size

__all__ = [
    "EMBEDDED",
    "FORMATS",
    "FREE_INIT_METHODS",
    "MAX_FPS",
    "MOTIONS",
    "AddOn",
    "BudgetConfig",
    "Defaults",
    "EncodingConfig",
    "Fit",
    "Format",
    "FreeInitMethod",
    "FreeUConfig",
    "ImagesConfig",
    "IpAdapterConfig",
    "LimitsConfig",
    "LoraConfig",
    "ModelConfig",
    "Motion",
    "OnFinishConfig",
    "PlacementConfig",
    "RequestIdFrom",
    "RunConfig",
    "SafetyConfig",
    "SchedulerConfig",
    "SchedulerName",
    "Section",
    "Size",
    "TextualInversionConfig",
    "UpscaleConfig",
]
