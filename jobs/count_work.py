"""Count what a clip costs at full size, without a GPU: operations, and bytes of activations at a time.

    python jobs/count_work.py

Stable Diffusion 1.5 with PIA's motion modules and half precision, 16 frames of 512 x 512, 25 steps with guidance, on
torch's device of shapes without numbers. Operations are multiplications and additions of products, as torch's
`FlopCounterMode` counts them; norms and elementwise functions are none. Bytes are those of tensors that torch returns:
workspaces of kernels, and the copies that some make of their inputs, are not among them.
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
"""Of what the network calls, the row of the table that an operation of ATen belongs to."""


class Flash(TorchFunctionMode):
    """Attention as a GPU's kernels do it: one operation, and no product of all queries and keys in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`func`, or the kernel."""
        del types
        if func is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]  # noqa: SLF001
        return func(*args, **(kwargs or {}))


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """The most bytes at a time of all that was allocated inside.

    Attributes:
        peak: bytes.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._weights = [each.untyped_storage() for each in (*network.parameters(), *network.buffers())]
        self._live: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`func`, and a look at what it made."""
        del types
        made = func(*args, **(kwargs or {}))
        found = {each.untyped_storage() for each in tree_leaves(made) if isinstance(each, torch.Tensor)}
        self._live |= found.difference(self._weights)
        self.peak = max(self.peak, sum(each.nbytes() for each in self._live))
        return made


def operations(call: Callable[[], Any]) -> Counter[str]:
    """Of a call, by kind."""
    with FlopCounterMode(display=False) as counter, Flash():
        call()
    found: Counter[str] = Counter()
    for operation, count in counter.get_flop_counts()["Global"].items():
        found[KINDS[str(operation).removeprefix("aten.")]] += count
    return found


def total(call: Callable[[], Any]) -> int:
    """Operations of a call, of any kind."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class Full:
    """The full network, and the calls of it that a clip consists of."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.pipe = baselines.pipeline("full")
        for network in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            network.half()
        self.unet = self.pipe.unet

    def own(self) -> None:
        """One step of one guided row, as the pipeline calls the network."""
        texts = _empty(2 * FRAMES, TOKENS, FEATURES)
        self.unet(_empty(2, 9, FRAMES, SIDE // 8, SIDE // 8), _empty(2), encoder_hidden_states=texts)

    def prepared(self, rows: int = 1) -> unet.Conditions:
        """What a batch of guided rows with one negative prompt and prompts of their own is drawn by."""
        nothing = _empty(1, TOKENS, FEATURES)
        texts = [nothing] * rows + [_empty(1, TOKENS, FEATURES) for _ in range(rows)]
        return unet.prepare(self.unet, [*range(rows)] * 2, rows, texts)

    def laid(self, conditions: unet.Conditions, rows: int = 1, layers: int = 0) -> torch.Tensor:
        """One step as the engine calls the network; what its last layers were given."""
        sample = _empty(rows, FRAMES, SIDE // 8, SIDE // 8, 9)
        return unet.run_and_keep(self.unet, sample, _empty(rows), conditions, layers)[1]

    def outermost(self, conditions: unet.Conditions, layers: int, deep: torch.Tensor) -> None:
        """One step of a lossy preset between two of the whole network."""
        sample = _empty(1, FRAMES, SIDE // 8, SIDE // 8, 9)
        unet.run_outermost(self.unet, sample, _empty(1), conditions, layers, deep)

    def whole(self, speed: Any) -> int:
        """At how many steps the whole network runs."""
        times = [float(1000 - 1000 // STEPS * (step + 1)) for step in range(STEPS)]
        return sum(whole_evaluations(PRESETS[speed], times, 1000))

    def around(self) -> dict[str, int]:
        """Operations of what no preset changes."""
        decode = total(lambda: decoding.decode_chunk(self.pipe.vae, _empty(FRAMES, 4, SIDE // 8, SIDE // 8)))
        encode = total(lambda: self.pipe.vae.encode(_empty(1, 3, SIDE, SIDE)))
        ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
        return {"VAE": decode + encode, "text encoder": 2 * total(lambda: self.pipe.text_encoder(ids))}


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.half, device="meta")


def clips(full: Full) -> dict[str, Counter[str]]:
    """Operations of one clip, by who draws it and by kind."""
    conditions = full.prepared()
    prepared = operations(full.prepared)
    found = {"PIAPipeline": _times(STEPS, operations(full.own))}
    for speed, preset in PRESETS.items():
        whole = full.whole(speed)
        found[speed] = _times(whole, operations(lambda: full.laid(conditions))) + prepared
        if preset.layers:
            deep = full.laid(conditions, layers=preset.layers)
            between = operations(lambda: full.outermost(conditions, preset.layers, deep))  # noqa: B023 - called now
            found[speed] += _times(STEPS - whole, between)
    return found


def _times(count: int, some: Counter[str]) -> Counter[str]:
    return Counter({kind: count * each for kind, each in some.items()})


def _rounded(count: int) -> str:
    """In units of 1e12, with two digits after the point where one would be none."""
    tera = count / 1e12
    return f"{tera:.1f}" if round(tera, 1) else f"{tera:.2f}"


@torch.no_grad()
def main() -> None:
    """Count, and print both tables."""
    full, console = Full(), Console()
    drawn, around = clips(full), full.around()
    table = Table("TFLOP of one clip", *drawn)
    for kind in dict.fromkeys(KINDS.values()):
        table.add_row(f"UNet, {kind}", *(f"{each[kind] / 1e12:.1f}" for each in drawn.values()))
    for kind, count in around.items():
        table.add_row(kind, *[_rounded(count)] * len(drawn))
    table.add_row("all", *(f"{(each.total() + sum(around.values())) / 1e12:.1f}" for each in drawn.values()))
    console.print(table)

    # A text's keys and values: the pipeline projects them for every frame and step, the engine once.
    spared = (STEPS * FRAMES - 1) * operations(full.prepared).total() / 1e12
    gained = (drawn["PIAPipeline"] - drawn["exact"]).total() / 1e12
    console.print(f"exact spares {gained:.1f}: {spared:.1f} of text, {gained - spared:.1f} of the halves of guidance")

    table = Table("GiB at a time", "activations")
    with Allocated(full.unet) as allocated, Flash():
        full.own()
    table.add_row("UNet of PIAPipeline, 1 guided row", f"{allocated.peak / 2**30:.2f}")
    for rows in BATCHES:
        conditions = full.prepared(rows)
        with Allocated(full.unet) as allocated, Flash():
            full.laid(conditions, rows)
        table.add_row(f"UNet, {rows} guided row{'s' * (rows > 1)}", f"{allocated.peak / 2**30:.2f}")
    for frames in CHUNKS:
        with Allocated(full.pipe.vae) as allocated:
            decoding.decode_chunk(full.pipe.vae, _empty(frames, 4, SIDE // 8, SIDE // 8))
        table.add_row(f"VAE's decoder, {frames} frames", f"{allocated.peak / 2**30:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
