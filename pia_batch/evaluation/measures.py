"""Measures of a clip, each described once: its range, unit, formula and source, and what it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

MEASURES_VERSION = "1"
"""Part of every evaluation's id. Raise it only if a measure gives other numbers for the same clip."""

Need = Literal["pixels", "flow", "clip", "dino"]

VBENCH = "VBench (Huang et al., CVPR 2024)"


@dataclass(frozen=True)
class Measure:
    """One number about one clip.

    Attributes:
        name: Name of its column.
        needs: `pixels`: nothing but the frames; `flow`: optical flow, by OpenCV; `clip`, `dino`: that network.
        span: Smallest and largest value, in words.
        unit: Unit, or empty for a pure number.
        better: Direction that is usually wanted.
        formula: Formula, with x_t for frame t of F frames (0-255), and means over pixels and channels.
        source: Origin of the formula, and whether its numbers compare with published ones.
        min_frames: Number of frames that a clip needs; with fewer, the measure is null.
    """

    name: str
    needs: Need
    span: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    formula: str
    source: str
    min_frames: int = 1


MEASURES: tuple[Measure, ...] = (
    Measure(
        "flicker", "pixels", "0-1", "", "higher",
        "(255 - mean \\|x_t+1 - x_t\\|) / 255, mean over neighbouring frames; 1: a still clip",
        f"`temporal_flickering` of {VBENCH}. Comparable only for the same clips: VBench measures static scenes only",
        2,
    ),
    Measure(
        "second_difference", "pixels", "0-510", "grey levels", "lower",
        "mean \\|x_t+2 - 2 x_t+1 + x_t\\|, mean over three neighbouring frames; 0 where pixels change steadily",
        "this package",
        3,
    ),
    Measure(
        "loop_gap", "pixels", "0-255", "grey levels", "lower",
        "mean \\|x_F-1 - x_0\\|: the jump that a player shows when the clip starts again",
        "this package",
        2,
    ),
    Measure(
        "smoothness", "flow", "0-1", "", "higher",
        "1 - mean \\|x_t - y_t\\| / 255 over odd t with two neighbours, where y_t is interpolated half-way between "
        "x_t-1 and x_t+1 along their flow",
        f"`motion_smoothness` of {VBENCH}, which interpolates by the network AMT: not comparable with its numbers",
        3,
    ),
    Measure(
        "dynamic_degree", "flow", "0 or 1", "", "neither",
        "1 if at least max(1, round(4 n / 16)) pairs of the n frames taken at 8 per second have a flow (mean length of "
        "its longest 5 %) above 6 min(height, width) / 256 pixels, times 8 / fps where fps is below 8",
        f"`dynamic_degree` of {VBENCH}, which takes the flow of RAFT: not comparable with its numbers",
        2,
    ),
    Measure(
        "warp_error", "flow", "0-255", "grey levels", "lower",
        "mean \\|x_t(p) - x_t+1(p + v(p))\\| over pixels p whose flow v ends inside of the frame, mean over "
        "neighbouring frames",
        "warping error of Lai et al., ECCV 2018, without its occlusion mask and with absolute differences: not "
        "comparable with its numbers",
        2,
    ),
    Measure(
        "clip_i", "clip", "-1-1", "cosine", "higher",
        "mean over t of cos(image, x_t)",
        "PIA (Zhang et al., CVPR 2024), image alignment. Comparable only with the same CLIP and the same cases",
    ),
    Measure(
        "clip_i_min", "clip", "-1-1", "cosine", "higher",
        "minimum over t of cos(image, x_t)",
        "this package",
    ),
    Measure(
        "clip_i_rest", "clip", "-1-1", "cosine", "higher",
        "`clip_i` without the condition frame, which repeats the image",
        "this package",
        2,
    ),
    Measure(
        "clip_t", "clip", "-1-1", "cosine", "higher",
        "mean over t of cos(prompt, x_t); the prompt of the nearest key where prompts change over the frames",
        "PIA, text alignment. Raw cosine, not multiplied by 100. Comparable as `clip_i`",
    ),
    Measure(
        "subject_consistency", "clip", "0-1", "", "higher",
        "mean over t > 0 of (max(0, cos(x_t-1, x_t)) + max(0, cos(x_0, x_t))) / 2, by CLIP",
        f"formula of `background_consistency` of {VBENCH}: comparable with it only with ViT-B/32 of OpenAI",
        2,
    ),
    Measure(
        "dino_subject_consistency", "dino", "0-1", "", "higher",
        "the same formula, by DINO",
        f"`subject_consistency` of {VBENCH}: comparable with it only with DINO ViT-B/16 and its cases",
        2,
    ),
    Measure(
        "dino_i2v", "dino", "0-1", "", "higher",
        "0.4 max s_t + 0.3 mean c_t + 0.3 min c_t, where s_t = max(0, cos(image, x_t)) and c_t = max(0, cos(x_t-1, "
        "x_t))",
        "`i2v_subject` of VBench-I2V: comparable as `dino_subject_consistency`; the image is the fitted one here",
        2,
    ),
)  # fmt: skip
"""All measures, in the order of their columns."""

BY_NAME = {measure.name: measure for measure in MEASURES}


@dataclass(frozen=True)
class EvaluationRequest:
    """Request of an evaluation: the measures, and the results that are measured. Equal requests have equal ids.

    Attributes:
        run_id: Run whose results are evaluated.
        results_digest: Digest of those results.
        flow: True to measure what needs optical flow.
        networks: Identity of each network in use, by `clip` and `dino`.
    """

    run_id: str
    results_digest: str
    flow: bool
    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the measures, in the order of their columns."""
        needs = {"pixels", *(["flow"] if self.flow else []), *self.networks}
        return [measure.name for measure in MEASURES if measure.needs in needs]

    def content(self) -> dict[str, Any]:
        """Return the request as a JSON value."""
        return {
            "version": MEASURES_VERSION,
            "run_id": self.run_id,
            "results": self.results_digest,
            "measures": self.names,
            "networks": {name: dict(identity) for name, identity in sorted(self.networks.items())},
        }

    def default_id(self) -> str:
        """Return the id of the evaluation where none is given: 16 hexadecimal digits over the content."""
        canonical = json.dumps(self.content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def row_schema(names: list[str]) -> pa.Schema:
    """Return the columns of an evaluation with these measures."""
    texts = [("request_id", pa.string()), ("key", pa.string())]
    errors = [("error_kind", pa.string()), ("error", pa.string())]
    return pa.schema([*texts, *((name, pa.float64()) for name in names), *errors])
