"""Estimate hours and cost of a dataset before there is a manifest, by GPU.

    python jobs/estimate_cost.py --rows 100000 --price H100=2.49 --price A100=1.29
    python jobs/estimate_cost.py --rows 100000 --set defaults.num_frames=32 --set model.speed=balanced

These are estimates: the operations of a clip are counted for Stable Diffusion 1.5 with PIA's motion modules, and the
speeds of the devices come from published figures of other programs (`pia_batch.planning.cost`). `pia-batch plan` does
the same for the rows of a manifest, and measures instead as soon as the output has finished clips.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import pyarrow as pa

from pia_batch.cli.options import overrides
from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError
from pia_batch.manifest.validation import check
from pia_batch.planning.cost import Cost, estimate_bytes, estimate_costs
from pia_batch.planning.statistics import Statistics, WorkClasses

PATHS = {"manifest": "requests.parquet", "output": "out"}
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Base whose operations are counted. Its files are not read."""


def config_of(settings: list[str]) -> RunConfig:
    """Return a config of the base with the published defaults, and these settings.

    Raises:
        ConfigError: A key is unknown, or its value is not allowed.
    """
    return RunConfig.load(None, {"model.base": BASE, **overrides(settings=settings, **PATHS)})


def statistics_of(config: RunConfig) -> Statistics:
    """Return the statistics of one request with the defaults of a config.

    Raises:
        ConfigError: No request can have these defaults together.
    """
    row = pa.table({"request_id": ["clip"], "image": ["clip.png"], "prompt": ["a clip"]})
    checked = check(row, config, dict.fromkeys(config.all_models, "0" * 32))
    if checked.rejected.num_rows:
        raise ConfigError(str(checked.rejected["error"][0]))
    statistics = Statistics()
    statistics.add(WorkClasses.of(row, checked.requests), checked.id_hashes, np.ones(1, dtype=bool))
    return statistics


def line(cost: Cost, num_rows: int, price: float | None) -> str:
    """Return the row of one device: seconds of a clip, device hours and cost, each from a low to a high estimate."""
    low, high = cost.hours
    clip = f"{low / num_rows * 3600:.1f} to {high / num_rows * 3600:.1f}"
    paid = "" if price is None else f"{low * price:,.0f} to {high * price:,.0f}"
    return f"{cost.device:10} {clip:16} {f'{low:,.0f} to {high:,.0f}':18} {paid}".rstrip()


def _price(text: str, devices: set[str]) -> tuple[str, float]:
    """Return the device and the price of `DEVICE=PRICE`."""
    device, _, price = text.partition("=")
    if device not in devices:
        raise ValueError(f"no figures of this device (got {device!r}, expected one of {', '.join(sorted(devices))})")
    try:
        number = float(price)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"not a price (got {price!r}, expected such as {device}=2.49)")
    return device, number


def main() -> None:
    """Print the estimates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, required=True, help="number of requests")
    parser.add_argument("--price", action="append", default=[], metavar="DEVICE=PRICE", help="price of a GPU-hour")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of a config key")
    arguments = parser.parse_args()
    if arguments.rows < 1:
        parser.error(f"--rows: too few (got {arguments.rows}, expected 1 or more)")
    try:
        config = config_of(arguments.set)
        statistics = statistics_of(config)
    except ConfigError as err:
        parser.error(str(err))
    costs = estimate_costs(statistics, arguments.rows, config, None)
    try:
        prices = dict(_price(text, {cost.device for cost in costs}) for text in arguments.price)
    except ValueError as err:
        parser.error(f"--price: {err}")
    print(f"{'device':10} {'s/clip':16} {'device hours':18} {'cost' if prices else ''}".rstrip())
    for cost in costs:
        print(line(cost, arguments.rows, prices.get(cost.device)))
    low, high = estimate_bytes(statistics, arguments.rows, None)
    print(f"output     {low / 1e9:,.0f} to {high / 1e9:,.0f} GB")
    print("All of these are estimates; nothing was measured.")


if __name__ == "__main__":
    main()
