"""One HTML page that shows a run: its counts, its failures, and every animation next to its condition image.

The page is one file: markup, style, script and the results as JSON are in it. It requests nothing but the media, which
it names relative to its own location, so that it works from a disk and from a static site alike. Media that browsers
cannot reach from there are embedded while a run is small: see `ReportOptions.embed`.

Prompts, ids, image URIs and errors are untrusted text. It is escaped in the markup, reaches the script as data, and a
content security policy permits no other script.
"""

from pia_batch.report.measured import Measured, ShownMeasure
from pia_batch.report.writer import EMBED_UP_TO, MAX_RESULTS, Report, ReportOptions, follow, write, write_so_far

__all__ = [
    "EMBED_UP_TO",
    "MAX_RESULTS",
    "Measured",
    "Report",
    "ReportOptions",
    "ShownMeasure",
    "follow",
    "write",
    "write_so_far",
]
