"""Outputs with clips of known content, as a run leaves them, and small random networks that measure them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pia_batch.config import EncodingConfig
from pia_batch.evaluation.measures import EvaluationRequest, row_schema
from pia_batch.evaluation.publication import publish as publish_pieces
from pia_batch.evaluation.work import RunResults
from pia_batch.journal import layout
from pia_batch.journal.layout import animation_name, run_record_name
from pia_batch.journal.log import Journal, to_parquet
from pia_batch.journal.results import publish
from pia_batch.media import codecs
from pia_batch.schema.columns import results_table
from pia_batch.schema.keys import KeySet, keys_from_hex
from pia_batch.schema.run_record import RunRecord
from pia_batch.storage.object_store import Store
from pia_batch.weights import sd15

Frames = npt.NDArray[np.uint8]


def key_of(request_id: str) -> str:
    return hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest()


def texture(side: int, seed: int = 0) -> Frames:
    """A smooth random picture, which moves without a border: shape (side, side, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def shifted(num_frames: int = 8, side: int = 64, by: tuple[int, int] = (2, 1), seed: int = 0) -> Frames:
    """A texture that moves by whole pixels, to the right and down, over a window: every pixel's flow is `by`."""
    wide = texture(side + 16 * 8, seed)
    right, down = by
    starts = [(64 - k * down, 64 - k * right) for k in range(num_frames)]
    return np.stack([wide[top : top + side, left : left + side] for top, left in starts])


def publish_output(
    store: Store,
    clips: Mapping[str, Frames | None],
    run_id: str = "run-1",
    form: str = "png_zip",
    columns: Mapping[str, Any] | None = None,
    carried: Mapping[str, Any] | None = None,
) -> None:
    """Store clips, their first frames as condition images, results and run.json. None is a request that failed."""
    folder = Path(store.uri.removeprefix("file://")).parent / "manifest"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for request_id, frames in clips.items():
        key = key_of(f"{store.uri} {request_id}")
        row: dict[str, Any] = {"request_id": request_id, "key": key, "status": "failed", "error_kind": "timeout"}
        if frames is not None:
            data = codecs.encode(frames, form, 8.0, EncodingConfig())  # type: ignore[arg-type]
            name = animation_name(key, codecs.CODECS[form].extension)  # type: ignore[index]
            store.replace(name, data)
            Image.fromarray(frames[0]).save(folder / f"{request_id}.png")
            num_frames, height, width, _ = frames.shape
            row |= {"status": "succeeded", "error_kind": None, "animation_uri": store.uri_of(name), "format": form}
            row |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "fps": 8.0, "cond_frame": 0}
            row |= {"num_frames": num_frames, "height": height, "width": width, "image": f"{request_id}.png"}
            row |= {"prompt": f"a picture of {request_id}", "model": "default", "motion": 1.0, "seed": 1}
        rows.append(row | {"run_id": run_id})
    names = sorted({name for row in rows for name in row})
    arrays = {name: pa.array([row.get(name) for row in rows]) for name in names}
    arrays |= {name: pa.array(values) for name, values in (columns or {}).items()}
    extra = pa.table({name: pa.array(values) for name, values in (carried or {}).items()})
    journal = Journal(store)
    journal.append(results_table(arrays, extra, len(rows)))
    wanted = KeySet.of(keys_from_hex(pa.array([row["key"] for row in rows])))
    publish(journal, journal.outcomes(), wanted, extra.schema, run_id, {})
    record = RunRecord(
        run_id=run_id,
        state="finished",
        started_at=datetime.now(UTC),
        manifest=(folder / "requests.parquet").as_uri(),
        folder=folder.as_uri(),
        output=store.uri,
        version="0",
        config={"images": {}},
    )
    store.replace(run_record_name(run_id), record.model_dump_json().encode())


def publish_evaluation(
    store: Store,
    measures: Mapping[str, list[float | None]],
    evaluation_id: str = "e-1",
    run_id: str | None = None,
    errors: list[str | None] | None = None,
) -> None:
    """Publish an evaluation with these values and kinds of errors, in the order of the results."""
    results = RunResults.open(store, run_id)
    request = EvaluationRequest(results.run_id, results.digest, flow=True, networks={"clip": {}, "dino": {}})
    schema = row_schema(request.names)
    pieces = list(results.pieces(results.num_rows))
    for piece in pieces:
        rows = results.read(piece.part, ["request_id", "key"])
        given = {name: pa.array(values, pa.float64()) for name, values in measures.items()}
        if errors is not None:
            given |= dict.fromkeys(("error_kind", "error"), pa.array(errors, pa.string()))
        columns = [
            rows[f.name] if f.name in rows.column_names else given.get(f.name, pa.nulls(len(rows), f.type))
            for f in schema
        ]
        table = pa.table(columns, schema=schema)
        store.create(layout.evaluation_piece(evaluation_id, piece.number), to_parquet(table))
    publish_pieces(results, evaluation_id, request, pieces, {})


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def write_clip(folder: Path) -> Path:
    """Write a small CLIPModel with random weights, and the tokenizer of CLIP."""
    import torch  # noqa: PLC0415 - slow, and most tests need none
    from transformers import CLIPConfig, CLIPModel  # noqa: PLC0415

    torch.manual_seed(0)
    text = {name: VISION[name] for name in VISION if name not in ("image_size", "patch_size")}
    text |= {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start of a training, so that images differ
            parameter.mul_(6)
    model.save_pretrained(folder)
    for path in (sd15.PATH / "tokenizer").iterdir():
        shutil.copy(path, folder / path.name)
    return folder


def write_dino(folder: Path) -> Path:
    """Write a small ViTModel with random weights."""
    import torch  # noqa: PLC0415
    from transformers import ViTConfig, ViTModel  # noqa: PLC0415

    torch.manual_seed(1)
    model = ViTModel(ViTConfig(**VISION))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    model.save_pretrained(folder)
    return folder
