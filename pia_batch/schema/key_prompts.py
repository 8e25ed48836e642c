"""Key prompts: texts that a clip has from certain frames on, in the forms in which people write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pydantic import AfterValidator, BeforeValidator


class KeyPrompt(NamedTuple):
    """Text that a clip has at one frame; texts between two of them are interpolated.

    Attributes:
        frame: Index of the frame, from 0.
        prompt: The text.
    """

    frame: int
    prompt: str


KEY_PROMPTS_TYPE = pa.list_(pa.struct([("frame", pa.int32()), ("prompt", pa.string())]))
"""Arrow type of a column of key prompts. It is a list, and no map: few readers of Parquet take maps."""


def key_prompts(value: Any) -> Any:  # returned unchanged where it has none of the forms, for validation to refuse
    """Return key prompts as a tuple of `KeyPrompt`.

    Args:
        value: Mapping from frames to texts, in any order, or a sequence of pairs, of `KeyPrompt` or of mappings with
            the names `frame` and `prompt`, in the order of their frames. Frames may be texts of digits, as JSON has
            them.
    """
    if isinstance(value, Mapping):
        pairs = [KeyPrompt(_frame(frame), prompt) for frame, prompt in value.items()]
        return tuple(sorted(pairs, key=lambda pair: pair.frame) if _are_numbers(pairs) else pairs)
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return value
    return tuple(map(_key_prompt, value))


def problem_of(keys: Sequence[KeyPrompt]) -> str | None:
    """Return what is wrong with the order of key prompts, with the remedy; None if nothing is."""
    frames = [frame for frame, _ in keys]
    if not frames or min(frames) != 0:
        return f"the first frame must be 0 (got {min(frames, default='none')}); give the text that the clip begins with"
    if any(later == earlier for earlier, later in pairwise(sorted(frames))):
        return f"each frame may have one text (got {frames}); leave one text for each frame"
    if frames != sorted(frames):
        return f"the frames must rise (got {frames}); sort the list by frame"
    return None


def described(keys: Iterable[Mapping[str, Any] | KeyPrompt]) -> str:
    """Return key prompts as one line of text: `0: a red circle / 8: a blue square`."""
    pairs = ((key["frame"], key["prompt"]) if isinstance(key, Mapping) else key for key in keys)
    return " / ".join(f"{frame}: {prompt}" for frame, prompt in pairs)


def _key_prompt(item: Any) -> Any:
    if isinstance(item, Mapping) and set(item) == {"frame", "prompt"}:
        return KeyPrompt(_frame(item["frame"]), item["prompt"])
    if isinstance(item, list | tuple) and len(item) == len(KeyPrompt._fields):
        return KeyPrompt(_frame(item[0]), item[1])
    return item


def _frame(value: Any) -> Any:
    """Return the number that a text of digits, or a whole float, stands for; anything else unchanged."""
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _are_numbers(keys: Iterable[KeyPrompt]) -> bool:
    return all(type(key.frame) is int for key in keys)


def _in_order(keys: tuple[KeyPrompt, ...]) -> tuple[KeyPrompt, ...]:
    problem = problem_of(keys)
    if problem:
        raise ValueError(problem)
    return keys


KeyPrompts = Annotated[tuple[KeyPrompt, ...], BeforeValidator(key_prompts), AfterValidator(_in_order)]
"""Annotation of a setting of key prompts."""
