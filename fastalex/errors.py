"""Errors that the user can correct.

A command turns each into one line on standard error and an exit status; a bug stays a traceback.
"""


class FastalexError(Exception):
    """Base class: the message is one line that says what is wrong, where, and what to do."""

    exit_status = 2


class ConfigError(FastalexError, ValueError):
    """A configuration key has a value that cannot work."""


class DataError(FastalexError):
    """A data set is missing, empty or damaged."""


class CheckpointError(FastalexError):
    """A checkpoint is missing, damaged or belongs to another network."""


class MissingDependencyError(FastalexError, ImportError):
    """An optional package is not installed."""


class OutputError(FastalexError):
    """A file cannot be written."""


class DivergedError(FastalexError):
    """The loss is no longer a number."""

    exit_status = 1


class ShortageError(FastalexError):
    """Memory, shared memory, file descriptors or processes are used up."""

    exit_status = 1


class DeviceMemoryError(ShortageError):
    """The memory of a card is full."""


class CompileLimitError(FastalexError):
    """The network was called in more ways than it may be compiled for."""

    exit_status = 1


class LostProcessError(FastalexError):
    """Another process of the run has ended or does not answer."""

    exit_status = 1


class ReportedError(FastalexError):
    """Rank 0 has an error and prints it; this rank only ends with the same status.

    Args:
        exit_status: that of rank 0's error.
    """

    def __init__(self, exit_status: int) -> None:
        super().__init__("rank 0 has the error")
        self.exit_status = exit_status


class StoppedError(BaseException):
    """A signal stopped the run, which has saved its state.

    Like KeyboardInterrupt, it is not an Exception: code that takes every error of a library for a damaged
    file must not catch it.

    Args:
        message: says how to resume.
        signal: the signal's number; the exit status is 128 more, as a shell reports it.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal
