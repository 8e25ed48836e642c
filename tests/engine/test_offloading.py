"""Offloading: networks are on the device when they are used, and leave it for the next one; meanings of `memory`."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import build, save, shot
from torch import nn

from pia_batch.config import ModelConfig, SchedulerConfig
from pia_batch.engine import PiaEngine, loading
from pia_batch.engine.offloading import SMALL_DEVICE_BYTES, DeviceSlot, OnDemand, Savings, savings, total_memory
from pia_batch.weights.resolve import resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NETWORKS = ("text_encoder", "vae", "unet")


@pytest.mark.parametrize(
    ("memory", "device", "total", "expected"),
    [
        ("max_speed", GPU, 2 * 2**30, Savings(offload=False, slices=False, tiles=False)),
        ("low", GPU, 80 * 2**30, Savings(offload=True, slices=True, tiles=True)),
        ("low", CPU, 2 * 2**30, Savings(offload=False, slices=True, tiles=True)),
        ("auto", GPU, SMALL_DEVICE_BYTES, Savings(offload=False, slices=False, tiles=False)),
        ("auto", GPU, SMALL_DEVICE_BYTES - 1, Savings(offload=True, slices=True, tiles=False)),
        ("auto", CPU, 2 * 2**30, Savings(offload=False, slices=False, tiles=False)),
    ],
    ids=str,
)
def test_memory_is_saved_as_the_config_and_the_device_ask_for(memory, device, total, expected):
    assert savings(memory, device, lambda _: total) == expected


def test_the_memory_of_this_machine_is_known():
    assert total_memory(CPU) > 2**28


class Ferry:
    """Moves networks between two devices that are one: those left ashore hold NaN, so that using one is seen."""

    def __init__(self, *ashore: nn.Module) -> None:
        self.moves: list[tuple[str, str]] = []
        self._kept: dict[int, list[torch.Tensor]] = {}
        for network in ashore:
            self(network, CPU)
        self.moves.clear()

    def __call__(self, network: nn.Module, device: torch.device) -> None:
        self.moves.append((type(network).__name__, "ashore" if device == CPU else "aboard"))
        tensors = list(network.parameters())
        if device == CPU:
            self._kept[id(network)] = [tensor.detach().clone() for tensor in tensors]
            for tensor in tensors:
                tensor.data.fill_(torch.nan)
        else:
            for tensor, kept in zip(tensors, self._kept.pop(id(network), tensors), strict=True):
                tensor.data.copy_(kept)


def visiting(parts: loading.Components) -> tuple[PiaEngine, Ferry]:
    """An engine whose networks wait ashore. Its device is the CPU, called by another name."""
    ferry = Ferry(*(getattr(parts, name) for name in NETWORKS))
    slot = DeviceSlot(ferry)
    device = torch.device("cpu", 0)
    wrapped = {name: OnDemand(getattr(parts, name), device, slot) for name in NETWORKS}
    return PiaEngine(dataclasses.replace(parts, device=device, **wrapped), lambda: "visiting"), ferry


ROWS = [shot(1), shot(2, clip_skip=1, guidance_scale=1.0), shot(3, strength=0.7, prompt="a blue square")]


def test_networks_that_visit_the_device_draw_what_they_draw_when_they_stay():
    resident = PiaEngine.from_pipeline(build())
    engine, ferry = visiting(loading.adopt(build()))

    for _ in range(2):
        for clip, truth in zip(
            engine.animate(ROWS, keep_latents=True), resident.animate(ROWS, keep_latents=True), strict=True
        ):
            assert clip.error is None
            assert torch.equal(clip.latents, truth.latents)
            assert np.array_equal(clip.frames, truth.frames)
    arrivals = [name for name, where in ferry.moves if where == "aboard"]
    assert arrivals[-3:] == ["AutoencoderKL", "UNetMotionModel", "AutoencoderKL"]
    assert arrivals.count("CLIPTextModel") > 0
    assert abs(len(ferry.moves) - 2 * len(arrivals)) <= 1  # who comes sends another away


def test_frames_that_overflow_are_decoded_again_by_a_copy_that_visits_too():
    pipe = build()
    for layer in (pipe.vae.post_quant_conv, pipe.vae.decoder.conv_in):
        layer.weight.mul_(3000)
    pipe.to(torch.float16)
    truth = PiaEngine.from_pipeline(pipe).animate([shot(1)])[0]
    engine, _ = visiting(loading.adopt(pipe))

    first, again = (engine.animate([shot(1)])[0] for _ in range(2))

    assert truth.error is first.error is again.error is None
    assert np.array_equal(first.frames, truth.frames)
    assert np.array_equal(again.frames, truth.frames)


def test_the_berth_has_room_for_one_network_at_a_time():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    moves: list[tuple[Any, torch.device]] = []
    slot = DeviceSlot(lambda network, device: moves.append((network, device)))

    for network in (one, one, two, two, one):
        slot.place(network, GPU)
    slot.clear()
    slot.clear()

    assert moves == [(one, GPU), (one, CPU), (two, GPU), (two, CPU), (one, GPU), (one, CPU)]


def test_a_network_that_does_not_fit_leaves_the_device_again():
    network, moves = nn.Linear(2, 2), []

    def cramped(_: Any, device: torch.device) -> None:
        moves.append(device)
        if device == GPU and len(moves) == 1:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    slot = DeviceSlot(cramped)
    with pytest.raises(torch.OutOfMemoryError):
        slot.place(network, GPU)
    slot.place(network, GPU)

    assert moves == [GPU, CPU, GPU]


def test_the_berth_keeps_no_network_alive():
    moves = []
    slot = DeviceSlot(lambda _, device: moves.append(device))
    slot.place(nn.Linear(2, 2), GPU)
    gc.collect()

    slot.clear()

    assert moves == [GPU]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    save(build(), path)
    return str(path)


def load(folder: str, device: str, **settings: Any) -> loading.Components:
    model = ModelConfig(base=folder, scheduler=SchedulerConfig(name="checkpoint"), **settings)
    return loading.load(model, resolve(model), torch.device(device), torch.float32)


def test_low_memory_on_a_gpu_leaves_the_networks_on_the_cpu(folder):
    parts = load(folder, "meta", memory="low")  # any device but the CPU

    for name in NETWORKS:
        network = getattr(parts, name)
        assert isinstance(network, OnDemand)
        assert network.device == parts.device == torch.device("meta")
        assert {tensor.device for tensor in network.network.parameters()} == {CPU}
    assert (parts.vae.use_slicing, parts.vae.use_tiling) == (True, True)


def test_maximal_speed_puts_the_networks_on_the_device(folder):
    parts = load(folder, "meta", memory="max_speed")

    for name in NETWORKS:
        assert {tensor.device.type for tensor in getattr(parts, name).parameters()} == {"meta"}
    assert (parts.vae.use_slicing, parts.vae.use_tiling) == (False, False)


def test_low_memory_on_the_cpu_slices_and_tiles(folder):
    parts = load(folder, "cpu", memory="low")

    assert not isinstance(parts.unet, OnDemand)
    assert (parts.vae.use_slicing, parts.vae.use_tiling) == (True, True)


@pytest.mark.gpu
def test_low_memory_on_a_gpu_draws_what_it_draws_at_full_speed(folder):
    rows = [shot(seed) for seed in range(2)]
    low, fast = (PiaEngine(load(folder, "cuda", memory=memory), lambda: "gpu") for memory in ("low", "max_speed"))

    clips = low.animate(rows, keep_latents=True)

    for clip, truth in zip(clips, fast.animate(rows, keep_latents=True), strict=True):
        assert torch.equal(clip.latents, truth.latents)
        assert np.array_equal(clip.frames, truth.frames)
    homes = [next(getattr(low._parts, name).parameters()).device.type for name in NETWORKS]
    assert sorted(homes) == ["cpu", "cpu", "cuda"]
