"""The benchmark's profile: kinds of kernels by their names, shares of a trace, and a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pia_batch.engine.benchmark import profiling
from pia_batch.engine.benchmark.profiling import Span, kind_of

NAMES = [
    ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "", "convolution"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_128x128>", "", "convolution"),
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_NNT", "aten::cudnn_convolution", "convolution"),
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "aten::addmm", "matmul"),
    ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn", "aten::mm", "matmul"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, __half>", "aten::addmm", "matmul"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4>>", "", "attention"),
    ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)", "", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "", "attention"),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float>", "", "norm"),
    ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", "", "norm"),
    (
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<c10::Half>>",
        "aten::add",
        "elementwise",
    ),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "aten::silu", "elementwise"),
    ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "aten::copy_", "copies"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>>", "aten::cat", "copies"),
    ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float>", "aten::cudnn_convolution", "copies"),
    ("Memcpy HtoD (Pinned -> Device)", "", "copies"),
    ("triton_red_fused_native_group_norm_silu_3", "", "norm"),
    ("triton_poi_fused_add_convolution_7", "", "elementwise"),
    ("triton_poi_fused_clone_permute_2", "", "copies"),
    ("triton_poi_fused__to_copy_4", "", "copies"),
    ("triton_tem_fused_mm_5", "", "matmul"),
    ("triton_tem_fused_convolution_1", "", "convolution"),
    ("aten::mkldnn_convolution", "", "convolution"),
    ("aten::addmm", "", "matmul"),
    ("aten::bmm", "", "matmul"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "", "attention"),
    ("aten::native_group_norm", "", "norm"),
    ("aten::clone", "", "copies"),
    ("aten::empty_strided", "", "copies"),
    ("aten::gelu", "", "elementwise"),
    ("aten::convert_element_type", "", "elementwise"),
]
"""What NVIDIA's libraries, torch and Inductor call their kernels, and torch its operators."""


@pytest.mark.parametrize(("name", "launcher", "kind"), NAMES, ids=[name[:50] for name, *_ in NAMES])
def test_a_kernel_is_known_by_its_name_and_who_launched_it(name, launcher, kind):
    assert kind_of(name, launcher) == kind


def event(category: str, name: str, begin: float, taken: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": taken, "tid": 1, "args": args}


def test_on_a_gpu_its_kernels_count_and_not_what_launched_them():
    trace = [
        event("cpu_op", "aten::addmm", 0, 50, **{"External id": 7}),
        event("gpu_user_annotation", "ProfilerStep#1", 100, 900),
        event("kernel", "nvjet_hsh_1", 100, 300, **{"External id": 7}),
        event("kernel", "nvjet_hsh_1", 500, 100, **{"External id": 8}),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 900, 100),
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]

    spans = profiling.kernels(trace)
    told = profiling.summarized(spans, {"matmul": 0.15}, repeats=2)

    assert [(span.begin, span.taken, span.launcher) for span in spans] == [
        (100, 300, "aten::addmm"),
        (500, 100, ""),
        (900, 100, ""),
    ]
    assert told["window_ms"] == pytest.approx(0.45)
    assert told["gaps_ms"] == pytest.approx(0.2)
    assert list(told["kinds"]) == ["matmul", "copies"]
    matmul = told["kinds"]["matmul"]
    assert matmul["ms"] == pytest.approx(0.2)
    assert matmul["share"] == pytest.approx(0.2 / 0.45)
    assert matmul["above_floor_ms"] == pytest.approx(0.05)
    assert told["kernels"][0] == {"name": "nvjet_hsh_1", "kind": "matmul", "ms": pytest.approx(0.2), "calls": 1.0}


def test_on_a_cpu_an_operator_counts_without_those_that_it_calls():
    trace = [
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::addmm", 10, 60),
        event("cpu_op", "aten::copy_", 20, 10),
        event("cpu_op", "aten::gelu", 150, 50),
        event("python_function", "forward", 0, 1000),
    ]

    spans = {span.name: span for span in profiling.operators(trace)}

    assert {name: span.taken for name, span in spans.items()} == {
        "aten::linear": 40,
        "aten::addmm": 50,
        "aten::copy_": 10,
        "aten::gelu": 50,
    }
    told = profiling.summarized(list(spans.values()), {}, repeats=1)
    assert (told["window_ms"], told["gaps_ms"]) == (pytest.approx(0.2), pytest.approx(0.05))


def test_operators_of_two_threads_do_not_hold_each_other():
    one, other = event("cpu_op", "aten::mm", 0, 100), event("cpu_op", "aten::add", 10, 20) | {"tid": 2}

    assert [span.taken for span in profiling.operators([one, other])] == [100, 20]


def test_of_no_kernels_nothing_is_told():
    assert profiling.summarized([], {}, repeats=1) == {"window_ms": 0.0, "gaps_ms": 0.0, "kinds": {}, "kernels": []}


def test_a_real_call_spends_its_time_where_it_multiplies():
    left = torch.randn(512, 512)
    network = nn.Sequential(nn.Linear(512, 512), nn.GELU())

    with torch.inference_mode():
        told = profiling.profile(torch.device("cpu"), lambda: network(left), lambda: network(left), matmul_tflops=1.0)

    kinds = told["kinds"]
    assert {"matmul", "elementwise"} <= set(kinds)
    assert kinds["matmul"]["floor_ms"] == pytest.approx(2 * 512**3 / 1e9)
    assert 0 < sum(kind["share"] for kind in kinds.values()) <= 1.001
    assert told["gaps_ms"] >= 0
    assert told["calls"] == 3


def test_a_profiler_that_sees_nothing_says_so():
    with pytest.raises(RuntimeError, match="saw no kernels on cpu"):
        profiling.profile(torch.device("cpu"), lambda: None, lambda: None, matmul_tflops=1.0)


def test_kernels_beyond_the_most_costly_are_left_out():
    spans = [Span(f"aten::op{index}", index, index + 1, 1) for index in range(50)]

    assert len(profiling.summarized(spans, {}, repeats=1)["kernels"]) == profiling.MOST_KERNELS
