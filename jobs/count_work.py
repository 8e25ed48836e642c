"""Count the cost of a clip at full size, without a GPU: operations, and peak bytes of activations.

    python jobs/count_work.py

Stable Diffusion 1.5 with PIA's motion modules in half precision, 16 frames of 512 x 512, 25 steps with guidance, on
torch's meta device, which has shapes but no data. Operations are multiplications and additions of products, as torch's
`FlopCounterMode` counts them; norms and elementwise functions do not count. Bytes are those of tensors that torch
returns; workspaces of kernels, and copies that some kernels make of their inputs, are not included.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pia_batch.config.speed_presets import PRESETS, whole_evaluations
from pia_batch.engine import decoding, unet
from pia_batch.engine.benchmark import baselines

STEPS, FRAMES, SIDE = 25, 16, 512
TOKENS, FEATURES = 77, 768
BATCHES = (1, 2, 4)
CHUNKS = (4, 16)

KINDS = {
    "convolution": "convolutions",
    "addmm": "linear layers",
    "mm": "linear layers",
    "bmm": "linear layers",
    "_scaled_dot_product_flash_attention": "attention",
}
"""Table row of each ATen operation that the network calls."""


class Flash(TorchFunctionMode):
    """Context in which attention is one operation, as in a GPU's kernels, without the product of queries and keys."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or the flash attention kernel in its place."""
        del types
        if func is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]  # noqa: SLF001
        return func(*args, **(kwargs or {}))


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Context that measures the peak of allocated tensors, without the network's weights.

    Attributes:
        peak: Peak, in bytes.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._weights = [each.untyped_storage() for each in (*network.parameters(), *network.buffers())]
        self._live: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` and record the tensors that it allocated."""
        del types
        made = func(*args, **(kwargs or {}))
        found = {each.untyped_storage() for each in tree_leaves(made) if isinstance(each, torch.Tensor)}
        self._live |= found.difference(self._weights)
        self.peak = max(self.peak, sum(each.nbytes() for each in self._live))
        return made


def operations(call: Callable[[], Any]) -> Counter[str]:
    """Return the operations of a call, by kind."""
    with FlopCounterMode(display=False) as counter, Flash():
        call()
    found: Counter[str] = Counter()
    for operation, count in counter.get_flop_counts()["Global"].items():
        found[KINDS[str(operation).removeprefix("aten.")]] += count
    return found


def total(call: Callable[[], Any]) -> int:
    """Return the number of operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class Full:
    """Full-size network and the calls that a clip consists of."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.pipe = baselines.pipeline("full")
        for network in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            network.half()
        self.unet = self.pipe.unet

    def stock(self) -> None:
        """Run one step of one guided row as the pipeline calls the network."""
        texts = _empty(2 * FRAMES, TOKENS, FEATURES)
        self.unet(_empty(2, 9, FRAMES, SIDE // 8, SIDE // 8), _empty(2), encoder_hidden_states=texts)

    def prepared(self, rows: int = 1) -> unet.Conditions:
        """Return the conditions of a batch of guided rows with different prompts and the same negative prompt."""
        nothing = _empty(1, TOKENS, FEATURES)
        texts = [nothing] * rows + [_empty(1, TOKENS, FEATURES) for _ in range(rows)]
        return unet.prepare(self.unet, [*range(rows)] * 2, rows, texts)

    def optimized(self, conditions: unet.Conditions, rows: int = 1, layers: int = 0) -> torch.Tensor:
        """Run one step as the engine calls the network; return the input of its last layers."""
        sample = _empty(rows, FRAMES, SIDE // 8, SIDE // 8, 9)
        return unet.run_and_keep(self.unet, sample, _empty(rows), conditions, layers)[1]

    def outermost(self, conditions: unet.Conditions, layers: int, deep: torch.Tensor) -> None:
        """Run one step of a lossy preset that reuses deep features."""
        sample = _empty(1, FRAMES, SIDE // 8, SIDE // 8, 9)
        unet.run_outermost(self.unet, sample, _empty(1), conditions, layers, deep)

    def whole(self, speed: Any) -> int:
        """Return the number of steps at which the whole network runs."""
        times = [float(1000 - 1000 // STEPS * (step + 1)) for step in range(STEPS)]
        return sum(whole_evaluations(PRESETS[speed], times, 1000))

    def around(self) -> dict[str, int]:
        """Return the operations of the networks that no preset changes."""
        decode = total(lambda: decoding.decode_chunk(self.pipe.vae, _empty(FRAMES, 4, SIDE // 8, SIDE // 8)))
        encode = total(lambda: self.pipe.vae.encode(_empty(1, 3, SIDE, SIDE)))
        ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
        return {"VAE": decode + encode, "text encoder": 2 * total(lambda: self.pipe.text_encoder(ids))}


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.half, device="meta")


def clips(full: Full) -> dict[str, Counter[str]]:
    """Return the operations of one clip, by pipeline or preset and by kind."""
    conditions = full.prepared()
    prepared = operations(full.prepared)
    found = {"PIAPipeline": _times(STEPS, operations(full.stock))}
    for speed, preset in PRESETS.items():
        whole = full.whole(speed)
        found[speed] = _times(whole, operations(lambda: full.optimized(conditions))) + prepared
        if preset.layers:
            deep = full.optimized(conditions, layers=preset.layers)
            between = operations(lambda: full.outermost(conditions, preset.layers, deep))  # noqa: B023 - called now
            found[speed] += _times(STEPS - whole, between)
    return found


def _times(count: int, some: Counter[str]) -> Counter[str]:
    return Counter({kind: count * each for kind, each in some.items()})


def _rounded(count: int) -> str:
    """Format in units of 1e12, with two decimals if one decimal would show 0.0."""
    tera = count / 1e12
    return f"{tera:.1f}" if round(tera, 1) else f"{tera:.2f}"


@torch.no_grad()
def main() -> None:
    """Count, and print both tables."""
    full, console = Full(), Console()
    counted, around = clips(full), full.around()
    table = Table("TFLOP of one clip", *counted)
    for kind in dict.fromkeys(KINDS.values()):
        table.add_row(f"UNet, {kind}", *(f"{each[kind] / 1e12:.1f}" for each in counted.values()))
    for kind, count in around.items():
        table.add_row(kind, *[_rounded(count)] * len(counted))
    table.add_row("all", *(f"{(each.total() + sum(around.values())) / 1e12:.1f}" for each in counted.values()))
    console.print(table)

    # Keys and values of a text: the pipeline projects them for every frame and step, the engine once.
    spared = (STEPS * FRAMES - 1) * operations(full.prepared).total() / 1e12
    gained = (counted["PIAPipeline"] - counted["exact"]).total() / 1e12
    console.print(f"exact spares {gained:.1f}: {spared:.1f} of text, {gained - spared:.1f} of the halves of guidance")

    table = Table("GiB at a time", "activations")
    with Allocated(full.unet) as allocated, Flash():
        full.stock()
    table.add_row("UNet of PIAPipeline, 1 guided row", f"{allocated.peak / 2**30:.2f}")
    for rows in BATCHES:
        conditions = full.prepared(rows)
        with Allocated(full.unet) as allocated, Flash():
            full.optimized(conditions, rows)
        table.add_row(f"UNet, {rows} guided row{'s' * (rows > 1)}", f"{allocated.peak / 2**30:.2f}")
    for frames in CHUNKS:
        with Allocated(full.pipe.vae) as allocated:
            decoding.decode_chunk(full.pipe.vae, _empty(frames, 4, SIDE // 8, SIDE // 8))
        table.add_row(f"VAE's decoder, {frames} frames", f"{allocated.peak / 2**30:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
