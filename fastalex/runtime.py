"""The device, dtype and compilation of a run, chosen from the hardware unless configured."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import cast

import torch
from torch import Tensor, nn

from fastalex.config import Graph, Precision, RuntimeConfig
from fastalex.distributed.processes import ALONE, World
from fastalex.errors import ConfigError

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}

VERSIONS = ("fastalex", "torch", "torchvision", "numba", "numpy")


@dataclass(frozen=True)
class Runtime:
    """A device, and how the network computes on it.

    Attributes:
        device: the device of parameters and batches.
        dtype: of activations, and of the batches that loaders yield; master weights stay fp32.
        memory_format: of batches and convolution weights.
        compile: whether the network runs under ``torch.compile``.
        graph: what a GPU records as a CUDA graph.
        winograd: whether convolutions use Winograd's algorithm where they can.
        fused_bias: whether the kernel after a convolution adds its bias, where there is one that can.
        factored: whether training keeps the gradients of wide fully connected layers as factors.
        threads: number of CPU threads.
        hardware: name of the CPU or GPU.
    """

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    compile: bool
    graph: Graph
    winograd: bool
    fused_bias: bool
    factored: bool
    threads: int
    hardware: str

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether small gradients would underflow without loss scaling: fp16 has five exponent bits."""
        return self.dtype == torch.float16

    @property
    def channels_last(self) -> bool:
        """Whether the memory format is channels-last."""
        return self.memory_format == torch.channels_last

    def autocast(self) -> AbstractContextManager:
        """Context in which convolutions and matrix products compute in ``dtype``."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device and the memory format, and choose its layers' kernels.

        Args:
            model: the network; it is modified.
        """
        for module in model.modules():
            if hasattr(module, "winograd"):  # fastalex.models.winograd's convolutions
                module.winograd = self.winograd  # type: ignore[assignment]
                module.matrix_units = cpu_has_matrix_units()  # type: ignore[assignment]
            if hasattr(module, "fused_bias"):  # fastalex.models.alexnet's pooling
                module.fused_bias = self.fused_bias  # type: ignore[assignment]
        return model.to(self.device).to(memory_format=self.memory_format)

    def compiled(self, model: nn.Module, *, variants: int, graphs: bool = True) -> nn.Module:
        """Return the network to call, compiled if ``compile`` is set; it shares ``model``'s parameters.

        Earlier compilations are discarded, so that a second run in one process starts like the first.

        Args:
            model: the network, on the device.
            variants: number of combinations of batch shape, training mode and gradient mode in which it will
                be called. Each is compiled. A call in one more raises
                ``torch._dynamo.exc.FailOnRecompileLimitHit``; by default, PyTorch would warn once and run all
                later calls uncompiled.
            graphs: whether a GPU may record a pass as a CUDA graph, if ``graph`` is ``network``. The next
                pass then overwrites the outputs and gradients of the last, so pass False to keep gradients
                over several passes.
        """
        if not self.compile:
            return model
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = variants
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Batch and crop keep their size for many steps, so specialise on it. On a GPU, a CUDA graph launches
        # all kernels of a pass at once.
        recorded = graphs and self.device.type == "cuda" and self.graph is Graph.network
        mode = "reduce-overhead" if recorded else "default"
        return cast(nn.Module, torch.compile(model, dynamic=False, mode=mode))

    def static(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose address stays the same: a CUDA graph reads it in place, without a copy."""
        if self.compile and self.device.type == "cuda":
            torch._dynamo.mark_static_address(tensor)
        return tensor

    def synchronize(self) -> None:
        """Wait until the device has finished all work; does nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __str__(self) -> str:
        layout = "channels-last" if self.channels_last else "NCHW"
        mode = ("compiled" if self.compile else "eager") + (", Winograd" if self.winograd else "")
        precision = str(self.dtype).removeprefix("torch.")
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.hardware} ({self.device}), {precision}, {layout}, {mode}, {threads}"


def choose_runtime(config: RuntimeConfig, world: World = ALONE) -> Runtime:
    """Choose the runtime, and set this process's thread count, allocator and current GPU accordingly.

    Args:
        config: the configuration; ``auto`` and null values are chosen from the hardware.
        world: the ranks that share the machine; each takes one GPU, or its share of the cores.

    Raises:
        ConfigError: the device does not exist, or does not support the precision.
    """
    device = _device(config.device)
    if device.type == "cuda" and world.size > 1 and device.index is None:
        device = _device(f"cuda:{world.local_rank}")
    if device.type == "cuda" and device.index is not None:
        # Otherwise calls that name no GPU, such as pinning memory, create a 500 MB context on the first one.
        torch.cuda.set_device(device)
    threads = _initial_threads()
    if config.threads:
        threads = config.threads
    elif world.local_size > 1:  # torchrun leaves each process one thread
        threads = max(1, available_cores() // world.local_size)
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_pages()
    else:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    dtype = DTYPES[_precision(config.precision, device)]
    if config.graph is Graph.step:
        _check_step_graph(device, dtype, world)
    return Runtime(
        device=device,
        dtype=dtype,
        memory_format=torch.channels_last if config.channels_last else torch.contiguous_format,
        compile=device.type == "cuda" if config.compile is None else config.compile,
        graph=config.graph,
        winograd=config.winograd and device.type == "cpu",
        # These two on a GPU only if asked for, until a card has run them (docs/gpu.md).
        fused_bias=bool(config.fused_bias),
        factored=device.type == "cpu" if config.factored is None else config.factored,
        threads=threads,
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
    )


@cache
def _initial_threads() -> int:
    """PyTorch's number of threads before this module changed it; by itself, one for each physical core."""
    return torch.get_num_threads()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"runtime.device={name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device={name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; "
            "use runtime.device=cpu, or check the driver and that torch is a CUDA build"
        )
    return device


def _precision(precision: Precision, device: torch.device) -> Precision:
    if device.type == "cuda":
        computes_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        computes_bf16 = cpu_computes_bf16()
        if precision is Precision.fp16:
            raise ConfigError("runtime.precision=fp16: is for GPUs; on a CPU use bf16 or fp32")
    if precision is not Precision.auto:
        return precision
    if computes_bf16:
        return Precision.bf16
    return Precision.fp16 if device.type == "cuda" else Precision.fp32


def _check_step_graph(device: torch.device, dtype: torch.dtype, world: World) -> None:
    """Refuse to record whole steps where that is not possible.

    Raises:
        ConfigError: on a CPU, in fp16, whose loss scaler decides on the host, or with several ranks.
    """
    reasons = {
        "is for a GPU; on a CPU use runtime.graph=network": device.type != "cuda",
        "is not for fp16, whose loss scaler works outside graphs; use runtime.graph=network": (
            dtype == torch.float16
        ),
        "is for one process; use runtime.graph=network": world.size > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"runtime.graph=step: {reason}")


def available_cores() -> int:
    """Return the number of cores this process may use; in a container or under taskset, not all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_computes_bf16() -> bool:
    """Whether the CPU has bf16 instructions; without them, bf16 is slower than fp32."""
    return _cpu_has("avx512_bf16", "amx_bf16", "bf16")


def cpu_has_matrix_units() -> bool:
    """Whether the CPU multiplies bf16 matrices by units of their own: Intel's AMX."""
    return _cpu_has("amx_bf16")


def _cpu_has(*capabilities: str) -> bool:
    """Whether the CPU has at least one of these capabilities, by PyTorch's names."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in capabilities)


def cpu_name() -> str:
    """Return the processor's name as PyTorch reports it, else the platform's."""
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's figures."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in VERSIONS}}


def keep_pages() -> None:
    """Stop glibc's malloc from returning freed memory to the kernel between steps.

    By default glibc maps each activation above 32 MiB anew, and the first touch of each page faults, which
    takes a large part of a step's time. Does nothing with other C libraries.
    """
    set_malloc_thresholds(2**31 - 1)  # the largest int: only blocks of 2 GiB or more are mapped


def set_malloc_thresholds(size: int) -> None:
    """Set glibc's thresholds for mapping a block on its own and for trimming the heap.

    Args:
        size: both thresholds, in bytes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    mallopt(m_mmap_threshold, size)
    mallopt(m_trim_threshold, size)
