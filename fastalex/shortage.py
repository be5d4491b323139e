"""Errors that mean that memory, shared memory, file descriptors or processes are used up.

Every library reports them in its own way: this is the one place that knows their classes and messages.
"""

from __future__ import annotations

import errno
import mmap
import re
import resource
import shutil
from enum import Enum
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


class Shortage(Enum):
    """What is used up."""

    device = "the card's memory is full"
    memory = "out of memory"
    shared_memory = "out of shared memory (/dev/shm)"
    output = "no space left for what is printed"
    descriptors = "too many open files"
    processes = "too many processes and threads"


# Messages, which are searched in this order: what says "memory" may mean shared memory.
_MESSAGES = {
    # of PyTorch's allocator, and of CUDA and its libraries, which allocate without it
    Shortage.device: r"CUDA out of memory|CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    Shortage.descriptors: r"[Tt]oo many open files|received 0 items of ancdata",
    # PyTorch 2.11 adds another error's number to the first.
    Shortage.shared_memory: r"shared memory.*No space left on device|unable to allocate shared memory|"
    r"unable to resize file .*No space left",
    # of PyTorch's allocator, C++, the C library and the dynamic linker
    Shortage.memory: r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|"
    r"Cannot allocate memory|failed to map segment from shared object",
}
_CODES = {
    errno.ENOMEM: Shortage.memory,
    errno.EMFILE: Shortage.descriptors,
    errno.ENFILE: Shortage.descriptors,
    errno.EAGAIN: Shortage.processes,
}
# Python's, where there is no memory for a stack either
_NO_THREAD = re.compile(r"can't start new thread")
_STACK = 64 << 20  # bytes, and more than enough
_SEMAPHORES = 1 << 20  # as _STACK
# oneDNN says no more than this, of a full memory as of a defect.
_ONEDNN = re.compile(r"could not (create|execute) a (primitive|memory object|memory)\b")
_SCARCE = 4 << 30  # bytes; where as many can be had, oneDNN's error is taken for a defect


def shortage(error: BaseException) -> Shortage | None:
    """Return what an error says is used up; None if it is of another kind.

    Args:
        error: of any library; an error that torch's DataLoader hands on from a worker is recognised too.
    """
    import torch  # a command that ends before it needs PyTorch does not wait for it

    if isinstance(error, torch.OutOfMemoryError):
        return Shortage.device
    if isinstance(error, MemoryError):
        return Shortage.memory
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno == errno.ENOSPC and error.filename is None and not error.args[2:]:
            # A semaphore has no file name, nor has standard output; other files are named.
            free = shared_memory_free()
            return Shortage.shared_memory if free is not None and free < _SEMAPHORES else Shortage.output
        return _CODES.get(error.errno)
    text = str(error)
    if _NO_THREAD.search(text):
        return Shortage.processes if has_room(_STACK) else Shortage.memory
    for kind, pattern in _MESSAGES.items():
        if re.search(pattern, text):
            return kind
    return Shortage.memory if _ONEDNN.search(text) and not has_room(_SCARCE) else None


def reason(error: BaseException) -> str:
    """Return the line of an error's message that says what is used up, without a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    known = re.compile("|".join([*_MESSAGES.values(), _NO_THREAD.pattern, _ONEDNN.pattern]))
    line = next((line for line in lines if known.search(line)), lines[0])
    # PyTorch begins with a place in its own source.
    return re.sub(r"^.*?(?=DefaultCPUAllocator)", "", line).removesuffix(".")


def described(kind: Shortage, error: BaseException) -> str:
    """Return what is used up, and what an error adds to it, on one line.

    Args:
        kind: what :func:`shortage` found.
        error: the error.
    """
    if not str(error) or (isinstance(error, OSError) and error.errno is not None):
        return kind.value
    return f"{kind.value} ({reason(error)})"


def prevented(error: BaseException, size: int) -> bool:
    """Whether an error in reading a file is a shortage's; a damaged file may ask for any amount of memory.

    Args:
        error: what the file's reader raised.
        size: of the file, in bytes.
    """
    kind = shortage(error)
    return kind is not None and (kind is not Shortage.memory or not has_room(size))


def has_room(size: int) -> bool:
    """Whether this process may map that many more bytes, within ``ulimit -v`` and the system's limits."""
    try:
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            return True
    except OSError:
        return False


def shared_memory_free() -> int | None:
    """Return how many bytes are free in ``/dev/shm``; None on a system without it.

    More can be reserved there, but a process that then writes to it is killed (SIGBUS).
    """
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def address_space() -> int | None:
    """Return the most bytes that this process may map (``ulimit -v``); None if it has no such limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
