"""Table of the formats of an export."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pia_batch.datasets.export_delta import DELTA
from pia_batch.datasets.export_folder import FOLDER
from pia_batch.datasets.export_formats import ExportFormat
from pia_batch.datasets.export_lance import LANCE
from pia_batch.datasets.export_parquet import HUGGINGFACE, PARQUET
from pia_batch.datasets.export_webdataset import WEBDATASET

FORMATS: Mapping[str, ExportFormat] = MappingProxyType(
    {each.name: each for each in (WEBDATASET, PARQUET, HUGGINGFACE, LANCE, DELTA, FOLDER)}
)
"""Formats by their names on the command line."""
