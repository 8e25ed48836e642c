"""Dataset card: the README.md of a dataset, with the YAML front matter that `datasets` and the Hugging Face hub read.

A person adds what only a person knows, such as the license. So a card has one generated part, which is replaced when
other results are published; all other text stays, and so do the keys of the front matter that are not generated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pia_batch.config import yaml_text
from pia_batch.schema.columns import MEASURED, OUTCOME
from pia_batch.schema.dataset_columns import CONDITION_IMAGE, DatasetColumns, Media
from pia_batch.schema.settings import ROW_SETTINGS

_BEGIN = "<!-- pia-batch: generated, this part is replaced -->"
_END = "<!-- pia-batch: end -->"
_GENERATED = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_IDENTITY = re.compile(r"<!-- run_id: (\S+), metadata\.parquet: sha256 ([0-9a-f]{64}) -->")

_NEW = """
# Animations by PIA

{generated}

## License

Not stated yet. State it here and as `license` in the first lines of this file: it depends on the model's weights, on
the condition images and on the prompts.
"""

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


@dataclass(frozen=True)
class CardFacts:
    """Facts that a card states.

    Attributes:
        run_id: Run whose results these are.
        num_rows: Number of animations in the dataset.
        media: Media of its files.
        formats: Number of animations of each format, those that are left out included.
        models: Number of animations of each model of the config.
        sources: Weights of each model, by its name in the config and the key there, such as `base`.
        columns: Columns of its table.
        data_files: Paths and patterns of its files, for `datasets`.
        num_failed: Number of requests without an animation.
        table_sha256: SHA-256 of the table, if there is one file of it.
        chosen: Names of the columns of the dataset; None: all of `columns`.
    """

    run_id: str
    num_rows: int
    media: Media
    formats: dict[str, int]
    models: dict[str, int]
    sources: dict[str, dict[str, str]]
    columns: DatasetColumns
    data_files: Sequence[str]
    num_failed: int = 0
    table_sha256: str = ""
    chosen: Sequence[str] | None = None


def make_card(facts: CardFacts, existing: str | None = None) -> str:
    """Return the card; the text and the keys that a person has added to an existing one stay.

    Args:
        facts: Facts that it states.
        existing: Card that it replaces, or another README.md; None: there is none.

    Raises:
        ValueError: The front matter of `existing` is not a YAML mapping; the message says where.
    """
    match = _FRONT.match(existing or "")
    front = yaml_text.parse(match[1]) if match else {}
    if not isinstance(front or {}, dict):
        msg = "the lines between --- are not keys with values"
        raise ValueError(msg)  # noqa: TRY004 - the value of a text, as all errors of YAML
    front = _front_matter(facts, front or {})
    generated = f"{_BEGIN}\n{_generated(facts)}{_END}"
    if existing is None:
        body = _NEW.format(generated=generated)
    else:
        body = existing[match.end() :] if match else f"\n{existing}"
        if _GENERATED.search(body):
            body = _GENERATED.sub(lambda _: generated, body, count=1)
        else:
            body = f"{body.rstrip()}\n\n{generated}\n"
    return f"---\n{yaml_text.dump(front)}---\n{body}"


def read_identity(card: str) -> tuple[str, str] | None:
    """Return the run id and the SHA-256 of the table that a card states, or None if it states none."""
    match = _IDENTITY.search(card)
    return (match[1], match[2]) if match else None


def _front_matter(facts: CardFacts, existing: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the front matter: a person's own first, as they were."""
    size = next((name for limit, name in _SIZES if facts.num_rows < limit), "n>10M")
    defaults: dict[str, Any] = {
        "license": "unknown",
        "task_categories": ["image-to-video"],
        "tags": ["pia", "pia-batch"],
    }
    ours = {
        "size_categories": [size],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": list(facts.data_files)}]},
        ],
    }
    return defaults | existing | ours


def _generated(facts: CardFacts) -> str:
    first = (
        f"{facts.num_rows:,} animations, each made from an image and a prompt by PIA, the Personalized Image Animator, "
        f"with `pia_batch`. They are the succeeded requests of run `{facts.run_id}`."
    )
    lines = [
        first,
        "",
        "| | |",
        "| --- | --- |",
        *(f"| model `{name}` | {_model(facts, name)}{number:,} animations |" for name, number in facts.models.items()),
        *(f"| {name} | {number:,} animations |" for name, number in facts.formats.items()),
        *([f"| failed requests | {facts.num_failed:,}, not in this dataset |"] if facts.num_failed else []),
        "",
        *_left_out(facts),
        "```python",
        "from datasets import load_dataset",
        "",
        'animations = load_dataset("PATH OR NAME OF THIS DATASET", split="train")',
        "```",
        "",
        _decoding(facts),
        "",
        "| column | meaning |",
        "| --- | --- |",
        *(f"| `{name}` | {meaning} |" for name, meaning in _meanings(facts).items()),
        "",
    ]
    if facts.table_sha256:
        lines += [f"<!-- run_id: {facts.run_id}, metadata.parquet: sha256 {facts.table_sha256} -->"]
    return "\n".join(lines) + "\n"


def _model(facts: CardFacts, name: str) -> str:
    source = facts.sources.get(name, {})
    return "".join(f"{key} `{value}`, " for key, value in source.items())


def _left_out(facts: CardFacts) -> list[str]:
    """Return the paragraphs on what this dataset lacks."""
    paragraphs = []
    others = sum(facts.formats.values()) - facts.num_rows
    if others:
        paragraphs.append(
            f"{others:,} animations of other formats are not in it: `datasets` loads one media per dataset. "
            "`pia-batch export --format huggingface --transcode mp4` makes one of all."
        )
    if facts.columns.left_out:
        names = ", ".join(f"`{name}` ({kind})" for name, kind in facts.columns.left_out.items())
        paragraphs.append(f"Columns that `datasets` cannot hold are in `results/` only: {names}.")
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _decoding(facts: CardFacts) -> str:
    if facts.media == "video":
        return "`video` is a `Video`; `datasets` decodes it with `torchcodec`."
    if facts.media == "image":
        return "`image` is an `Image`: a Pillow image with all frames of the animation, the first one shown."
    return (
        "`file_name` is the path of each animation: a zip of PNG files, one per frame, which `datasets` does not "
        "decode. `pia-batch export --format huggingface --transcode mp4` makes videos of them."
    )


def _meanings(facts: CardFacts) -> dict[str, str]:
    columns = facts.columns
    original = {new: old for old, new in columns.renamed.items()}
    known = {column.name: column.description for column in (*OUTCOME, *MEASURED)}
    known |= {setting.name: setting.description for setting in ROW_SETTINGS}
    meanings = {}
    for name in facts.chosen or columns.schema.names:
        if name == CONDITION_IMAGE:
            meanings[name] = "Image that was animated, from the manifest; credentials and signatures are removed."
        elif name in original:
            meanings[name] = f"Column `{original[name]}` of the manifest."
        else:
            meanings[name] = known.get(name, "Column of the manifest.")
    return meanings
