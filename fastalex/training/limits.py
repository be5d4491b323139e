"""One-line errors for the limits of GPU memory and of torch.compile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from fastalex.config import Config
from fastalex.errors import CompileLimitError, DeviceMemoryError

# Out-of-memory messages of CUDA and its libraries, which allocate without PyTorch's allocator.
_FULL = re.compile(r"CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED")


@contextmanager
def explained(config: Config, remedy: str | None = None) -> Iterator[None]:
    """Context that turns a limit's exception into a one-line error that says what to change.

    Args:
        config: the run's configuration, whose values the message names.
        remedy: what to change where the memory is full; None for the settings of a training.

    Raises:
        DeviceMemoryError: the GPU's memory is full; the message has PyTorch's figures.
        CompileLimitError: the network was called in more variants than :meth:`Runtime.compiled` allows.
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
        remedy = remedy or (
            f"lower train.batch_size={train.batch_size}, raise train.accumulate={train.accumulate}, which "
            f"divides a batch, or lower data.resize={data.resize} and with it data.crop={data.crop}"
        )
        raise DeviceMemoryError(f"{str(error).splitlines()[0]} -- {remedy}") from error
