"""Provenance of an animation file: records how it was made, and rebuilds the request that makes it again.

It is one line of JSON, the same in every format, and an XMP packet with the properties that standards define: made by a
trained model, by which program, from which prompt. The same request gives the same bytes: no time, no device, no run.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pia_batch import __version__
from pia_batch.config import RunConfig
from pia_batch.config.finishing import stored_size
from pia_batch.errors import printable
from pia_batch.media.metadata import Metadata
from pia_batch.schema.columns import SETTINGS, Row
from pia_batch.schema.key_prompts import described
from pia_batch.storage.uris import redacted_uri

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media made by a trained model: https://cv.iptc.org/newscodes/digitalsourcetype/"""

_NAME = "pia_batch"
"""Only name in the JSON object, so that comments of other programs are not mistaken for this record."""


class Provenance(BaseModel):
    """Record of how one animation was made.

    A later schema may differ in anything. Names that are added to this one are skipped by older readers.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    schema_version: Literal[1] = 1
    software: str
    """Program that made the animation, and its version."""
    digital_source_type: str = DIGITAL_SOURCE_TYPE
    key: str
    """Content key, 32 hexadecimal digits, as in the result."""
    request_id: str
    prompt: str | None
    """Prompt as in the manifest; None: the request has several, in `settings.prompts`, by frame."""
    image: str | None
    """URI of the condition image as in the manifest, without secrets; None: the manifest contained the image."""
    image_sha256: str | None
    """SHA-256 of the fetched bytes."""
    image_identity: Literal["uri", "sha256"]
    """Property that is part of the key: the URI or the SHA-256."""
    ip_adapter_image: str | None
    withheld: Sequence[str]
    """Columns from whose URI a credential or a signature was removed."""
    model: str
    """Name of the model in the manifest's `model` column."""
    base: str
    """`model.base` of the config; only the last part of a local path."""
    engine_id: str
    speed: str = "exact"
    """`model.speed` of the config."""
    fit: str
    """`images.fit` and `images.background` of the config."""
    encoder: str
    """Format, and the settings of `encoding` that decide its bytes."""
    settings: dict[str, Any]
    """Effective values of `columns.SETTINGS`, without those that had no effect."""
    stored: dict[str, float] | None = None
    """Width, height, number of frames and rate of the file, where finishing changed those in `settings`."""
    upscaler: str | None = None
    """SHA-256 and data type of the network that enlarged the frames, where `settings.upscale` is more than 1."""

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        for name in ("prompts", "negative_prompts"):
            keys = self.settings.get(name)
            if keys is not None and not (isinstance(keys, list) and all(map(_is_key_prompt, keys))):
                raise ValueError(f"settings.{name}: must be a list of frames and prompts")
        if self.prompt is None and not self.settings.get("prompts"):
            raise ValueError("prompt: required, or settings.prompts")
        return self

    @classmethod
    def of(cls, row: Row, config: RunConfig, engine_id: str) -> Provenance:
        """Return the record of a request.

        Args:
            row: Effective request: the columns EFFECTIVE without `image_bytes`, and `key` and `fetched_sha256`.
            config: Config of the run.
            engine_id: Engine id of the row's model.
        """
        stored = asdict(stored_size(row))
        uris = {name: row[name] for name in ("image", "ip_adapter_image")}
        shown = {name: None if uri is None else redacted_uri(uri) for name, uri in uris.items()}
        return cls(
            software=f"{_NAME} {__version__}",
            key=row["key"],
            request_id=row["request_id"],
            prompt=row["prompt"],
            image=shown["image"],
            ip_adapter_image=shown["ip_adapter_image"],
            model=row["model"],
            image_sha256=row["fetched_sha256"],
            image_identity="uri" if row["image_sha256"] is None and uris["image"] is not None else "sha256",
            withheld=[name for name, uri in uris.items() if uri != shown[name]],
            base=_without_folders(config.all_models[row["model"]].base),
            engine_id=engine_id,
            speed=config.all_models[row["model"]].speed,
            fit=f"{config.images.fit} {config.images.background.lower()}",
            encoder=config.encoding.identity(row["format"], row["codec"]),
            settings={name: row[name] for name in SETTINGS.names if row[name] is not None},
            stored=stored if any(row[name] != value for name, value in stored.items()) else None,
            upscaler=config.upscaler if (row["upscale"] or 1) > 1 else None,
        )

    @classmethod
    def found_in(cls, comments: Iterable[str]) -> Provenance | None:
        """Return the record in the first of a file's comments that contains one; None if none does.

        Raises:
            ValueError: A comment contains a record that cannot be understood.
        """
        for comment in comments:
            try:
                content = json.loads(comment)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict) and _NAME in content:
                try:
                    return cls.model_validate(content[_NAME])
                except ValidationError as err:
                    problem = err.errors()[0]
                    raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
        return None

    @property
    def comment(self) -> str:
        """Record as canonical JSON (sorted names, no spaces), escaped to printable ASCII."""
        left_out = {name for name in ("stored", "upscaler") if getattr(self, name) is None}
        record = self.model_dump(mode="json", exclude=left_out)
        return json.dumps({_NAME: record}, sort_keys=True, separators=(",", ":"))

    @property
    def text(self) -> str:
        """Prompt, or all of several with their frames, as one line."""
        return described(self.settings["prompts"]) if self.prompt is None else self.prompt

    @property
    def metadata(self) -> Metadata:
        """Record as it is embedded in files."""
        prompt = printable(self.text)
        return Metadata(comment=self.comment, description=prompt, software=self.software, xmp=self._xmp(prompt))

    def manifest_row(self) -> Row:
        """Return the manifest row that has the same key under the same config and engine.

        A relative `image` is relative to the manifest's own folder. Values that are `withheld`, and an image that the
        manifest contained, must be added by hand.
        """
        from_image = ("width", "height") if self.settings.get("size") == "auto" else ()  # derived, not requested
        row: Row = {"request_id": self.request_id, "prompt": self.prompt, "model": self.model, "style": False}
        row |= {"image": self.image, "ip_adapter_image": self.ip_adapter_image}
        if self.image_identity == "sha256":
            row["image_sha256"] = self.image_sha256
        row |= {name: value for name, value in self.settings.items() if name not in from_image}
        return {name: value for name, value in row.items() if value is not None}

    def _xmp(self, prompt: str) -> bytes:
        name, _, version = self.software.partition(" ")
        properties = {
            "xmp:CreatorTool": self.software,
            "Iptc4xmpExt:DigitalSourceType": self.digital_source_type,
            "Iptc4xmpExt:AIPromptInformation": prompt,
            "Iptc4xmpExt:AISystemUsed": name,
            "Iptc4xmpExt:AISystemVersionUsed": version,
        }
        written = "".join(f'\n   {key}="{html.escape(value)}"' for key, value in properties.items())
        return (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
            '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
            ' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
            '  <rdf:Description rdf:about=""\n'
            '   xmlns:xmp="http://ns.adobe.com/xap/1.0/"\n'
            f'   xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"{written}/>\n'
            " </rdf:RDF>\n"
            "</x:xmpmeta>\n"
            '<?xpacket end="r"?>'
        ).encode()


def metadata_of(row: Row, config: RunConfig, engine_id: str) -> Metadata | None:
    """Return the metadata to embed, from the arguments of `Provenance.of`; None if `encoding.provenance` is off."""
    return Provenance.of(row, config, engine_id).metadata if config.encoding.provenance else None


def _is_key_prompt(key: object) -> bool:
    if not isinstance(key, dict) or key.keys() != {"frame", "prompt"}:
        return False
    return type(key["frame"]) is int and isinstance(key["prompt"], str)


def _without_folders(base: str) -> str:
    """Return a hub id or the URI of an object as it is, and only the last part of a path on some machine."""
    is_path = base.startswith(("/", "~", ".", "file:"))
    return PurePosixPath(base).name if is_path else redacted_uri(base)
