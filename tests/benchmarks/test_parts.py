"""The part of a training step that an operator belongs to."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

from benchmarks.hardware import DEVICE
from benchmarks.parts import (
    CONVOLUTIONS,
    INPUT,
    LRN,
    OPTIMIZER,
    OTHER,
    PARTS,
    PRODUCTS,
    part_of,
    profile_step,
    seconds_by_part,
)
from fastalex.kernels import augment_triton, lrn_triton
from tests.profiler_events import STEPS, event, launched, on_gpu, recorded, training_steps


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mkldnn_convolution", "aten::_convolution", "aten::conv2d", "forward"], CONVOLUTIONS),
        (["aten::copy_", "aten::convolution_backward", "ConvolutionBackward0", "backward"], CONVOLUTIONS),
        (["aten::copy_", "aten::_to_copy", "aten::to", "aten::conv2d"], OTHER),  # autocast's casts
        (["aten::mm", "AddmmBackward0"], PRODUCTS),
        (["aten::mm", "fastalex::winograd_conv2d", "forward"], CONVOLUTIONS),
        (["fastalex::lrn_max_pool", "forward"], LRN),
        (["aten::mm", "fastalex::conv_block", "forward"], CONVOLUTIONS),
        (["aten::copy_", "aten::to", "fastalex::conv_block_backward", "backward"], CONVOLUTIONS),
        (["fastalex::lrn_max_pool_backward", "fastalex::conv_block_backward", "backward"], LRN),
        (["aten::sum", "fastalex::lrn_max_pool_bias_backward", "backward"], LRN),
        (["aten::pow", "forward"], LRN),
        (["aten::mul", "MulBackward0"], LRN),
        (["aten::mul", "aten::dropout"], OTHER),
        (["aten::add_", "Optimizer.step#SGD.step"], OPTIMIZER),
        (["aten::mul_", "optimizer"], OPTIMIZER),
        (["aten::mm", "aten::matmul", "Optimizer.step#FactoredSGD.step", "optimizer"], PRODUCTS),
        (["fastalex::augment", "input"], INPUT),
        (["sm90_xmma_fprop_implicit_gemm_bf16"], CONVOLUTIONS),
        (["std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, float>"], PRODUCTS),
        (["void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float>(...)"], CONVOLUTIONS),
        (["_relu_lrn_pool_kernel"], LRN),
        (["triton_poi_fused_convolution_relu_3", "CompiledFunction"], LRN),
        (["triton_red_fused_convolution_backward_5"], CONVOLUTIONS),
        (["triton_poi_fused_addmm_relu_7"], LRN),
        (["triton_tem_fused_addmm_relu_8"], PRODUCTS),
        (["Memcpy HtoD (Pinned -> Device)", "cudaMemcpyAsync", "aten::copy_", "aten::to", "input"], INPUT),
        (["Memset (Device)"], OTHER),
        (["aten::empty"], OTHER),
    ],
)
def test_part_of(names: list[str], part: str) -> None:
    assert part_of(names) == part


@pytest.mark.parametrize(("module", "part"), [(lrn_triton, LRN), (augment_triton, INPUT)])
def test_our_kernels_are_recognised_by_name(module: ModuleType, part: str) -> None:
    """A CUDA graph leaves nothing but the name."""
    names = [name for name in vars(module) if name.endswith("_kernel")]
    assert len(names) >= 2
    assert [part_of([name]) for name in names] == [part] * len(names)


def test_kernels_count_once_with_or_without_an_operator() -> None:
    """Microseconds per step: products 100 and 120, LRN 80 and 80, the second of each without an operator."""
    seconds = seconds_by_part(training_steps(), cuda=True)
    expected = {PRODUCTS: 100 + 120, LRN: 80 + 80, INPUT: 20}
    assert {part: spent * 1e6 / STEPS for part, spent in seconds.items() if spent} == pytest.approx(expected)


def test_a_kernel_belongs_to_the_operators_around_its_own() -> None:
    """Kernels of the same name, which only the launching operator tells apart."""
    events = recorded(
        event("input", 0, 100, is_user_annotation=True),
        *launched(event("aten::copy_", 10, 20), on_gpu("copy_kernel", 200, 230)),
        event("aten::conv2d", 110, 190),
        *launched(event("aten::copy_", 120, 130), on_gpu("copy_kernel", 230, 240)),
        on_gpu("copy_kernel", 240, 260),
    )
    seconds = seconds_by_part(events, cuda=True)
    assert (seconds[INPUT], seconds[CONVOLUTIONS], seconds[OTHER]) == pytest.approx((30e-6, 10e-6, 20e-6))


def test_a_kernel_of_two_operators_counts_once() -> None:
    """A call of the CUDA library with an operator's id lists that operator's kernels, and precedes it."""
    kernel = on_gpu("copy_kernel", 200, 230)
    call = event("cudaDeviceSynchronize", 0, 5, thread=2)
    call.append_kernel(kernel.name, 0, kernel.time_range.elapsed_us())
    events = recorded(call, event("aten::conv2d", 10, 60), *launched(event("aten::copy_", 20, 30), kernel))
    seconds = seconds_by_part(events, cuda=True)
    assert sum(seconds.values()) == pytest.approx(30e-6)
    assert seconds[CONVOLUTIONS] == pytest.approx(30e-6)


def test_a_kernel_whose_operator_was_merged_into_another_is_not_lost() -> None:
    """PyTorch merges an operator with a sole inner operator of the same name, and drops its own kernels."""
    events = recorded(
        *launched(event("aten::mm", 0, 50), on_gpu("gemm", 100, 140)),
        *launched(event("aten::mm", 10, 40), on_gpu("gemm", 140, 150)),
    )
    assert sum(e.device_type == DeviceType.CPU for e in events) == 1
    assert seconds_by_part(events, cuda=True)[PRODUCTS] == pytest.approx(50e-6)


@pytest.mark.gpu
def test_the_kernels_of_a_replayed_cuda_graph_count() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    torch.mm(a, a)  # cuBLAS cannot be initialised within a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(a, a)
    seconds = profile_step(graph.replay)
    assert seconds[PRODUCTS] > 0
    assert seconds[PRODUCTS] == pytest.approx(sum(seconds.values()) - seconds[OTHER])


def step_of(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    model, images = model.to(DEVICE), images.to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        optimizer.zero_grad()
        with record_function("input"):
            batch = images.clone()
        model(batch).sum().backward()
        optimizer.step()

    step()
    return step


def test_no_convolutions_no_time_in_convolutions() -> None:
    seconds = profile_step(step_of(nn.Linear(400, 400), torch.randn(400, 400)))
    assert tuple(seconds) == PARTS
    assert seconds[CONVOLUTIONS] == seconds[LRN] == 0
    assert min(seconds[PRODUCTS], seconds[INPUT], seconds[OPTIMIZER], seconds[OTHER]) > 0


def test_eager_normalisation_is_found_forward_and_backward() -> None:
    """With a 1x1 convolution of 3 channels nearly all of the time is LocalResponseNorm's."""
    images = torch.randn(32 if DEVICE == "cuda" else 8, 3, 64, 64)
    model = nn.Sequential(nn.Conv2d(3, 96, 1), nn.ReLU(), nn.LocalResponseNorm(5))
    seconds = profile_step(step_of(model, images))
    operators = sum(seconds.values()) - seconds[OTHER]  # which includes other load on the machine
    assert seconds[LRN] > operators / 2
    assert seconds[CONVOLUTIONS] > 0
