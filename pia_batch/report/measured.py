"""Measures of an evaluation on a page: what they mean, and their values for the rows of the page's run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

ERROR_KIND, ERROR = "evaluation_error_kind", "evaluation_error"
"""Columns of a page with the reason why a clip was not measured."""


@dataclass(frozen=True)
class ShownMeasure:
    """One measure of an evaluation.

    Attributes:
        name: Name of its column.
        unit: Unit, or empty for a pure number.
        better: Direction that is usually wanted: `higher`, `lower` or `neither`.
        formula: Its formula, as plain text.
    """

    name: str
    unit: str
    better: str
    formula: str


@dataclass(frozen=True)
class Measured:
    """Measures of the run of a page. `evaluation` makes it; this package knows no evaluation.

    Attributes:
        evaluation_id: Id of the evaluation.
        run_id: Run whose results it measures.
        measures: Its measures, in the order in which they are shown.
        read: Returns the rows of the evaluation for one file of results, by the name of that file: the columns
            `request_id`, `key`, `error_kind`, `error` and one of float64 for each measure.
    """

    evaluation_id: str
    run_id: str
    measures: tuple[ShownMeasure, ...]
    read: Callable[[str], pa.Table]

    @property
    def fields(self) -> list[pa.Field]:
        """Columns that `joined` adds."""
        numbers = [pa.field(measure.name, pa.float64()) for measure in self.measures]
        return [*numbers, pa.field(ERROR_KIND, pa.string()), pa.field(ERROR, pa.string())]

    def joined(self, rows: pa.Table, part: str) -> pa.Table:
        """Return rows of the results with their measures; null for a row that the evaluation lacks, or has otherwise.

        Args:
            rows: Rows of one file of results, with `request_id` and `key`.
            part: Name of that file.
        """
        found = self.read(part).rename_columns({"error_kind": ERROR_KIND, "error": ERROR})
        places = pc.index_in(rows["request_id"], found["request_id"].combine_chunks())
        theirs = found.take(places)
        same = pc.equal(theirs["key"], rows["key"])
        for field in self.fields:
            values = pc.if_else(same, theirs[field.name], pa.scalar(None, field.type))
            rows = rows.append_column(field, values)
        return rows
