"""Text of the page: templates, data for the script, and the policy that permits no other script.

Jinja escapes untrusted text in the markup. The script gets it as JSON in which no character is special in HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from typing import Any

import jinja2
import pyarrow as pa

from pia_batch.report.head import PageHead
from pia_batch.schema.columns import SETTINGS

_SCRIPTS = ("data.js", "filters.js", "media.js", "gallery.js", "detail.js", "charts.js", "ranges.js", "main.js")
_LOADER = jinja2.PackageLoader("pia_batch.report")
_ENVIRONMENT = jinja2.Environment(
    loader=_LOADER, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_DIGITS = 6
"""Significant digits of a measure; settings keep all digits."""


def assemble(head: PageHead, data: dict[str, Any], sources: dict[str, str]) -> str:
    """Return the HTML of a page.

    Args:
        head: Contents of the page's head.
        data: Data for the script, as a JSON value.
        sources: Directives of the content security policy for media.
    """
    style = _source("report.css")
    script = "\n".join(_source(name) for name in _SCRIPTS)
    policy = {
        "default-src": "'none'",
        "script-src": hash_of(script),
        "style-src": hash_of(style),
        **sources,
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return _ENVIRONMENT.get_template("report.html").render(
        run=head,
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        style=style,
        script=script,
        data=for_script(data),
        shown=data["rows"],
    )


def column(name: str, values: pa.ChunkedArray) -> dict[str, Any]:
    """Return a column as JSON.

    It has one value for `all` rows, or distinct `words` with the index of each row's word in `at`, or plain `values`.
    """
    kind = values.type
    items: list[Any] = values.to_pylist()
    if pa.types.is_timestamp(kind):
        items = [None if item is None else round(item.timestamp() * 1000) for item in items]
    elif pa.types.is_int64(kind):
        items = [str(item) if item is not None and abs(item) > 2**53 else item for item in items]
    elif pa.types.is_list(kind):
        items = [None if item is None else tuple(map(_hashable, item)) for item in items]
    elif pa.types.is_floating(kind):
        exact = name in SETTINGS.names
        items = [
            None if item is None or not math.isfinite(item) else item if exact else float(f"{item:.{_DIGITS}g}")
            for item in items
        ]
    places: dict[Any, int] = {}
    at = [places.setdefault(item, len(places)) for item in items]
    if len(places) == 1:
        return {"all": items[0]}
    if len(places) <= len(items) // 2:
        return {"words": list(places), "at": at}
    return {"values": items}


def _hashable(value: Any) -> Any:
    """Return the fields of an entry of a list, such as the frame and the text of a key prompt; others unchanged."""
    return tuple(value.values()) if isinstance(value, dict) else value


def for_script(value: object) -> str:
    """Return JSON that no HTML parser mistakes for markup, and no JavaScript parser for the end of a line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _source(name: str) -> str:
    return _LOADER.get_source(_ENVIRONMENT, name)[0].strip()


def hash_of(text: str) -> str:
    """Return the source of a content security policy that permits exactly this inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
