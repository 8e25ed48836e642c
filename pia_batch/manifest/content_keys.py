"""Content keys of effective requests: a hash of everything that decides each animation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import FORMATS, RunConfig
from pia_batch.schema.keys import Keys, json_digest
from pia_batch.schema.settings import ROW_SETTINGS, VIDEO_CODECS


def content_keys(
    effective: Mapping[str, pa.Array | pa.Scalar], images: pa.Array, config: RunConfig, engine_ids: Mapping[str, str]
) -> Keys:
    """Return the content key of each request.

    Settings and options at their neutral value are left out, so that a release that adds one changes no key.

    Args:
        effective: Columns of EFFECTIVE by name; scalars stand for every row.
        images: `image_identity` of the rows.
        config: Source of the options that decide how an image is fitted and a file encoded.
        engine_ids: Identity of the engine of each model, by the name in `config.all_models`.
    """
    members = {setting.name: effective[setting.name] for setting in ROW_SETTINGS} | {
        "request_id": effective["request_id"],
        "prompt": effective["prompt"],
        "image": images,
        "fit": pa.scalar(config.images.identity()),
        "encoder": _encoders(effective["format"], effective["codec"], config),
        "ip_adapter_image": effective["ip_adapter_image"],
        "engine_id": _by_name(effective["model"], engine_ids),
        "upscaler": _upscaler(effective["upscale"], config),
    }
    neutral = {setting.name: setting.neutral for setting in ROW_SETTINGS}
    return json_digest(members, neutral | {"ip_adapter_image": None, "upscaler": None})


def image_identity(typed: Mapping[str, pa.Array]) -> pa.Array:
    """Return what identifies each row's image: its hash where that is given or follows from the bytes, else its URI."""
    uris, data, sha256 = typed["image"], typed["image_bytes"], pc.utf8_lower(typed["image_sha256"])
    if data.null_count < len(data):
        sha256 = pc.coalesce(sha256, _sha256_hex(data))
    by_hash = pc.binary_join_element_wise("sha256:", sha256, "")
    return pc.coalesce(by_hash, pc.binary_join_element_wise("uri:", uris, ""))


def _encoders(
    formats: pa.Array | pa.Scalar, video_codecs: pa.Array | pa.Scalar, config: RunConfig
) -> pa.Array | pa.Scalar:
    """Return the identity of the encoder of each row."""
    if isinstance(formats, pa.Scalar) and isinstance(video_codecs, pa.Scalar):
        return pa.scalar(config.encoding.identity(formats.as_py(), video_codecs.as_py()))
    by_format = pa.array([config.encoding.identity(name) for name in FORMATS])
    found = (
        by_format.take(pc.index_in(formats, value_set=pa.array(FORMATS)))
        if isinstance(formats, pa.Array)
        else (pa.scalar(config.encoding.identity(formats.as_py())))
    )
    for codec in VIDEO_CODECS[1:]:
        with_codec = pc.fill_null(pc.equal(video_codecs, codec), False)
        found = pc.if_else(with_codec, config.encoding.identity("mp4", codec), found)
    return found


def _upscaler(factors: pa.Array | pa.Scalar, config: RunConfig) -> pa.Array | pa.Scalar:
    """Return the identity of the upscaler for rows that it enlarges, and null for the others."""
    upscaler = pa.scalar(config.upscaler, pa.string())
    if isinstance(factors, pa.Scalar):
        return upscaler if factors.as_py() > 1 else pa.scalar(None, pa.string())
    return pc.if_else(pc.greater(factors, 1), upscaler, None)


def _by_name(names: pa.Array, values: Mapping[str, str]) -> pa.Array | pa.Scalar:
    """Return the value of each name; one scalar if there is only one value."""
    if len(values) == 1:
        return pa.scalar(next(iter(values.values())))
    return pa.array(list(values.values())).take(pc.index_in(names, value_set=pa.array(list(values))))


def _sha256_hex(data: pa.Array) -> pa.Array:
    return pa.array([hashlib.sha256(value).hexdigest() if value else None for value in data.to_pylist()], pa.string())
