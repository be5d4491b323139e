"""One-line errors for the limits of memory, of open files and of torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from fastalex.config import Config
from fastalex.data.workers import num_workers
from fastalex.errors import CompileLimitError, DeviceMemoryError, FastalexError, ShortageError
from fastalex.shortage import Shortage, address_space, described, reason, shortage


@contextmanager
def explained(config: Config, *, training: bool = True) -> Iterator[None]:
    """Context that turns a limit's exception into a one-line error that says what to change.

    Args:
        config: the run's configuration, whose values the message names.
        training: whether the user can change the settings of a training; otherwise ``batch_size``.

    Raises:
        DeviceMemoryError: the GPU's memory is full; the message has PyTorch's figures.
        ShortageError: memory, shared memory, file descriptors or processes are used up.
        CompileLimitError: the network was called in more variants than :meth:`Runtime.compiled` allows.
    """
    try:
        yield
    except FastalexError:
        raise
    except FailOnRecompileLimitHit as error:
        raise CompileLimitError(
            f"torch.compile has compiled the network for {torch._dynamo.config.recompile_limit} kinds of "
            "batches, and the run has one more; train with runtime.compile=false"
        ) from error
    except Exception as error:
        kind = shortage(error)
        if kind is None:
            raise
        if kind is Shortage.device:
            raise DeviceMemoryError(f"{reason(error)} -- {_smaller(config, kind, training)}") from error
        raise ShortageError(f"{described(kind, error)} -- {_remedy(config, kind, training)}") from error


def _remedy(config: Config, kind: Shortage, training: bool) -> str:
    """What to change where something else than a card's memory is used up."""
    # The other loaders prepare images in threads.
    workers = num_workers(config.loader) if config.loader.name in ("torchvision", "auto") else 0
    fewer = f"lower loader.workers={workers}" if workers else ""
    if kind is Shortage.memory:
        limit = address_space()
        more = "free some memory" if limit is None else f"raise ulimit -v {limit >> 10}"
        choices = [more, fewer, _smaller(config, kind, training)]
    elif kind is Shortage.shared_memory:
        choices = ["give it more room (docker run --shm-size=1g)", fewer, _smaller(config, kind, training)]
    elif kind is Shortage.output:
        choices = ["free some on the disk that standard output goes to"]
    elif kind is Shortage.descriptors:
        choices = ["allow more (ulimit -n)", fewer]
    else:
        choices = ["allow more (ulimit -u)", fewer, "set runtime.threads=1"]
    return ", or ".join(choice for choice in choices if choice)


def _smaller(config: Config, kind: Shortage, training: bool) -> str:
    train, data = config.train, config.data
    if not training:
        return f"lower batch_size={train.batch_size}"
    batch = f"lower train.batch_size={train.batch_size}"
    if kind is Shortage.shared_memory:
        return batch
    accumulate = f"raise train.accumulate={train.accumulate}, which divides a batch"
    return f"{batch}, {accumulate}, or lower data.resize={data.resize} and with it data.crop={data.crop}"
