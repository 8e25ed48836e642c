"""Variations of requests: the product of values of settings, with ids that name them."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, TypeAdapter, ValidationError

from pia_batch.errors import ConfigError
from pia_batch.schema.settings import BY_NAME

MAX_VARIATIONS = 10_000
"""Largest number of variations of one row."""


@dataclass(frozen=True)
class Variations:
    """Values of settings; every row becomes one request for each combination.

    Attributes:
        values: Values by setting, in the order of their options.
    """

    values: Mapping[str, tuple[Any, ...]]

    @classmethod
    def parse(cls, options: Sequence[str]) -> Variations:
        """Return the variations of `--vary NAME=VALUE,VALUE...` options.

        Raises:
            ConfigError: A setting is unknown, given twice or cannot vary; a value is not allowed or given twice; or the
                product is too large.
        """
        values: dict[str, tuple[Any, ...]] = {}
        for option in options:
            name, equals, text = option.partition("=")
            if not equals or not name or not text:
                raise ConfigError(f"--vary {option}: expected NAME=VALUE,VALUE, such as seed=1,2,3")
            if name in values:
                raise ConfigError(f"--vary {name}: given twice; write all values of one setting together")
            values[name] = _values(name, text.split(","))
        count = math.prod(map(len, values.values()))
        if count > MAX_VARIATIONS:
            raise ConfigError(f"--vary: {count} variations of each row; at most {MAX_VARIATIONS}; leave some out")
        return cls(values)

    @property
    def count(self) -> int:
        """Number of requests for each row."""
        return math.prod(map(len, self.values.values()))

    def apply(self, table: pa.Table) -> pa.Table:
        """Return one row for each variation of each row, those of one row together.

        `request_id` gets the variation, such as `cat-1#seed=2,motion_scale=1`; `base_id` is the id without it.
        """
        if not self.values:
            return table
        rows, count = len(table), self.count
        combinations = list(itertools.product(*self.values.values()))
        suffixes = [
            "#" + ",".join(f"{name}={_shown(value)}" for name, value in zip(self.values, combination, strict=True))
            for combination in combinations
        ]
        table = table.take(pa.array([row for row in range(rows) for _ in range(count)], pa.int64()))
        base = table["request_id"]
        ids = pc.binary_join_element_wise(base, pa.array(suffixes * rows, pa.string()), "")
        table = table.set_column(table.column_names.index("request_id"), "request_id", ids)
        for at, name in enumerate(self.values):
            column = pa.array([combination[at] for combination in combinations] * rows, BY_NAME[name].data_type)
            if name in table.column_names:
                table = table.set_column(table.column_names.index(name), name, column)
            else:
                table = table.append_column(name, column)
        return table.append_column("base_id", base)


def _values(name: str, texts: Sequence[str]) -> tuple[Any, ...]:
    setting = BY_NAME.get(name)
    if setting is None:
        near = difflib.get_close_matches(name, BY_NAME, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--vary {name}: not a setting of a row{hint}; docs/manifest.md has all of them")
    if pa.types.is_list(setting.data_type):
        raise ConfigError(
            f"--vary {name}: a list cannot vary; make a column of it, and map it by --column {name}=COLUMN"
        )
    allowed: Any = Annotated[setting.annotation, Field(**setting.limits)]  # a type, made here
    adapter: TypeAdapter[Any] = TypeAdapter(allowed)
    found = []
    for text in texts:
        try:
            found.append(adapter.validate_strings(text))
        except ValidationError as err:
            msg = f"--vary {name}={text}: {err.errors()[0]['msg'].lower()}; correct the value"
            raise ConfigError(msg) from None
    if len(set(found)) < len(found):
        raise ConfigError(f"--vary {name}: a value is given twice; leave one out")
    return tuple(found)


def _shown(value: Any) -> str:  # a setting's value
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
