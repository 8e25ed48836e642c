"""`plan`: what can be known before a run costs anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pia_batch.cli.console import out
from pia_batch.cli.options import ConfigPath, ManifestUri, OutputUri, Overrides, RetryFailed, load, overrides

if TYPE_CHECKING:
    import pyarrow as pa


def plan(
    config: ConfigPath = None,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    override: Overrides = None,
    retry_failed: RetryFailed = False,
) -> None:
    """Check the manifest and tell what a run would do. Writes nothing, and needs neither a GPU nor a cluster.

    Example: `pia-batch plan --manifest requests.parquet --output outputs/first`
    """
    from pia_batch import planning

    loaded = load(config, overrides(manifest, output, override))
    made = planning.make(loaded, retry=planning.Retry() if retry_failed else None)
    finished = len(made.wanted) - made.num_pending - made.num_rejected
    out.print(
        f"manifest    {made.manifest.uri}  ({len(made.manifest.files)} {made.manifest.format} files)", soft_wrap=True
    )
    out.print(f"rows        {made.manifest.num_rows}")
    out.print(f"duplicates  {made.num_duplicates}")
    out.print(f"rejected    {made.num_rejected}")
    out.print(f"finished    {finished}")
    out.print(f"pending     {made.num_pending}")
    for name, engine_id in made.engine_ids.items():
        out.print(f"engine      {engine_id}  {name}")
    if made.is_mixed:
        _print_groups(made.groups)
    if made.num_rejected:
        _print_rejections(made.rejected)


def _print_groups(groups: pa.Table) -> None:
    """What is drawn together, the largest groups first."""
    shown = 10
    for group in groups.sort_by([("num_rows", "descending")]).slice(0, shown).to_pylist():
        size = f"up to {group['long_side']} px" if group["size"] == "auto" else f"{group['width']} x {group['height']}"
        told = f"{group['num_rows']} rows: {group['model']}, {group['num_frames']} frames, {size}"
        out.print(f"together    {told}", soft_wrap=True, markup=False)
    if len(groups) > shown:
        out.print(f"            and {len(groups) - shown} more kinds of rows")


def _print_rejections(rejected: pa.Table, per_kind: int = 3) -> None:
    kinds = sorted(set(rejected["error_kind"].to_pylist()))
    for kind in kinds:
        texts = [
            text
            for name, text in zip(*(rejected[c].to_pylist() for c in ("error_kind", "error")), strict=True)
            if name == kind
        ]
        out.print(f"\n{kind}  {len(texts)}", style="bold")
        for text in texts[:per_kind]:
            out.print(f"  {text}", markup=False, soft_wrap=True)
