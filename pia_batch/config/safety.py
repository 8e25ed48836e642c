"""Section of a config about safety: words refused in prompts, and a network that looks at frames."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from pia_batch.config.base import Section


def is_word(text: str) -> bool:
    """Return True if a text has a letter or a digit, of any script."""
    return any(unicodedata.category(letter)[0] in "LN" for letter in text)


class SafetyConfig(Section):
    """Checks of prompts, images and clips. None of them is part of a content key: no pixel depends on them."""

    checker: str | None = Field(
        None,
        description="Folder, object-storage URI or hub id of a StableDiffusionSafetyChecker with its "
        "`preprocessor_config.json`, or of a checkpoint with `safety_checker/` and `feature_extractor/`. null: none.",
    )
    checker_revision: str | None = Field(
        None, description="Hub commit, tag or branch of `checker`; a commit pins it. null: `main`."
    )
    policy: Literal["flag", "fail"] = Field(
        "flag",
        description="flag: results say how many frames the checker flags; fail: such a request fails with "
        "`unsafe`, and its animation is not stored.",
    )
    frames: Annotated[int | None, BeforeValidator(lambda value: None if value == "all" else value)] = Field(
        None,
        ge=1,
        le=1024,
        description="Number of frames that are checked, spread evenly over a clip. `all`, or null: each one.",
    )
    inputs: bool = Field(
        default=False, description="true: check the condition image too, before anything is generated from it."
    )
    blocklist: str | None = Field(
        None,
        description="URI of a text file, UTF-8, of words and phrases refused in prompts, one a line; lines that begin "
        "with `#` are comments. Whole words are compared, whatever their case.",
    )
    blocked_words: tuple[str, ...] = Field(
        (), description="Further words and phrases refused in prompts, such as `[violence, blood]`."
    )

    @field_validator("blocked_words")
    @classmethod
    def _hold_letters(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if not is_word(word):
                msg = f"must have words with letters or digits (got {word!r})"
                raise ValueError(msg)
        return words
