"""The optimized UNet call against the network's own call, in float64, where rounding hides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor
from pipelines import Counting, build
from torch import nn

from pia_batch.engine import attention, unet

FRAMES = 3


@pytest.fixture
def network() -> Any:
    return build().unet.to(torch.float64)


def conditioned(size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """Two rows, the first of which is guided: sample 0 is its unconditional half."""
    random = torch.Generator().manual_seed(0)
    texts = [torch.randn(1, 20, 16, generator=random, dtype=torch.float64) for _ in range(3)]
    sample = torch.randn(2, FRAMES, *size, 9, generator=random, dtype=torch.float64)
    return {"rows": [0, 0, 1], "texts": texts, "sample": sample, "timesteps": torch.tensor([700, 31])}


def own_call(network: Any, rows: Any, texts: Any, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    states = torch.cat(texts).repeat_interleave(FRAMES, dim=0)
    result: torch.Tensor = network(sample.movedim(-1, 1)[rows], timesteps[rows], encoder_hidden_states=states).sample
    return result


def laid_out(network: Any, rows: Any, texts: Any, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    conditions = unet.prepare(network, rows, len(sample), texts)
    return unet.run(network, sample, timesteps, conditions)


@pytest.mark.parametrize("size", [(8, 8), (6, 4), (5, 7), (1, 1)])
@torch.no_grad()
def test_it_predicts_what_the_networks_own_call_predicts_at_any_size(network, size):
    given = conditioned(size)

    assert float((laid_out(network, **given) - own_call(network, **given)).abs().max()) <= 1e-11


@torch.no_grad()
def test_freeu_is_the_networks_own(network):
    given = conditioned()
    plain = laid_out(network, **given)
    network.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)

    laid = laid_out(network, **given)

    assert float((laid - own_call(network, **given)).abs().max()) <= 1e-11
    assert float((laid - plain).abs().max()) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_is_as_near_to_the_truth_as_the_networks_own(network, dtype):
    """Half precision as on a GPU: on a CPU the engine uses such networks' own call."""
    given = conditioned()
    exact = own_call(network, **given)
    network.to(dtype)
    given |= {"texts": [text.to(dtype) for text in given["texts"]], "sample": given["sample"].to(dtype)}

    laid, own = (float((call(network, **given) - exact).square().mean().sqrt()) for call in (laid_out, own_call))

    assert laid <= 1.2 * own


@torch.no_grad()
def test_more_heads_than_a_kernel_takes_are_taken_in_parts(network, monkeypatch):
    given = conditioned()
    monkeypatch.setattr(attention, "MAX_HEADS", 50)

    assert float((laid_out(network, **given) - own_call(network, **given)).abs().max()) <= 1e-11


class Watched(nn.Module):
    """A layer that records the number of samples of each call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.eval()
        self.asked: list[int] = []
        self.eval()

    def forward(self, states: torch.Tensor) -> Any:
        self.asked.append(len(states))
        return self.layer(states)


@torch.no_grad()
def test_the_halves_of_guidance_are_one_until_a_text_tells_them_apart(network):
    network.conv_in, network.conv_out = Watched(network.conv_in), Watched(network.conv_out)

    laid_out(network, **conditioned())

    assert network.conv_in.asked == [2 * FRAMES]
    assert network.conv_out.asked == [3 * FRAMES]


@torch.no_grad()
def test_a_text_is_projected_once_for_all_its_samples_frames_and_steps(network):
    layer = network.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.to_k = Watched(layer.to_k)
    given = conditioned()
    empty = given["texts"][0]
    conditions = unet.prepare(network, [0, 1, 0, 1], 2, [empty, empty, *given["texts"][1:]])

    for _ in range(2):
        unet.run(network, given["sample"], given["timesteps"], conditions)

    assert layer.to_k.asked == [3]


def test_networks_of_other_shapes_keep_their_own_call(network):
    assert unet.supports(network)
    assert not unet.supports(Counting(network))
    assert not unet.supports(build().unet.to(torch.bfloat16))
    network.set_attn_processor(AttnProcessor())
    assert not unet.supports(network)


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network.train(),
        lambda network: network.conv_in.register_forward_hook(lambda *_: None),
        lambda network: network.enable_forward_chunking(1),
        lambda network: setattr(network.mid_block.resnets[0], "output_scale_factor", 2.0),
        lambda network: network.fuse_qkv_projections(),
    ],
    ids=["training", "hook", "chunks", "scaled", "fused"],
)
def test_a_network_that_was_changed_keeps_its_own_call(network, change):
    change(network)

    assert not unet.supports(network)


def test_the_network_of_pia_itself_is_understood():
    with torch.device("meta"):
        network = UNetMotionModel(in_channels=9, cross_attention_dim=768, use_motion_mid_block=False)

    assert unet.supports(network.eval())
