"""How a run ends that meets a limit of the card or of the compiler: with one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from fastalex.config import Config
from fastalex.errors import CompileLimitError, DeviceMemoryError

# How CUDA and its libraries say it where PyTorch's allocator is not asked.
_FULL = re.compile(r"CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED")


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Context in which a limit that is met is an error of one line, which says what to change.

    Args:
        config: of the run, whose values the line names.

    Raises:
        DeviceMemoryError: the card's memory is full; with PyTorch's figures.
        CompileLimitError: the network was called in more ways than ``Runtime.compiled`` was told of.
    """
    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise CompileLimitError(
            f"torch.compile has compiled the network for {torch._dynamo.config.recompile_limit} kinds of "
            "batches, and the run has one more; train with runtime.compile=false"
        ) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not _FULL.search(str(error)):
            raise
        train, data = config.train, config.data
        raise DeviceMemoryError(
            f"{str(error).splitlines()[0]} -- lower train.batch_size={train.batch_size}, raise "
            f"train.accumulate={train.accumulate}, which divides a batch, or lower data.resize={data.resize} "
            f"and with it data.crop={data.crop}"
        ) from error
