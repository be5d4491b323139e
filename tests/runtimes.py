"""Runtimes and loaders for tests, independent of the machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastalex.config import DataConfig, Graph, LoaderConfig
from fastalex.data import ImageSet, Loader, build_loader
from fastalex.distributed.processes import World
from fastalex.runtime import Runtime


class Folding(nn.Module):
    """A network that consumes lazy batches, like AlexNet."""

    stride_over_crops = 4


def a_runtime(
    device: str = "cpu", dtype: torch.dtype = torch.float32, *, channels_last: bool = True
) -> Runtime:
    """Create an eager runtime without Winograd; the thread count stays as it is."""
    return Runtime(
        device=torch.device(device),
        dtype=dtype,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        compile=False,
        graph=Graph.network,
        winograd=False,
        fused_bias=False,
        factored=False,
        threads=torch.get_num_threads(),
        hardware="of a test",
    )


def loader_on(
    images: ImageSet,
    data: DataConfig,
    loader: LoaderConfig,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    graph: Graph = Graph.network,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> Loader:
    """Call ``build_loader`` with a runtime and world of the given attributes."""
    runtime = replace(a_runtime(device, dtype, channels_last=channels_last), graph=graph)
    return build_loader(images, data, loader, runtime=runtime, world=World(rank, world_size), **options)
