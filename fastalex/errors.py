"""Errors that the person at the keyboard can mend.

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


class DeviceMemoryError(FastalexError):
    """The memory of a card is full."""

    exit_status = 1


class CompileLimitError(FastalexError):
    """The network was called in more ways than it may be compiled for."""

    exit_status = 1


class LostProcessError(FastalexError):
    """Another process of the run has ended or does not answer."""

    exit_status = 1


class ReportedError(FastalexError):
    """The first process of the run has an error and says so itself; this one only ends as well.

    Args:
        exit_status: of that error.
    """

    def __init__(self, exit_status: int) -> None:
        super().__init__("the first process has the error")
        self.exit_status = exit_status


class StoppedError(BaseException):
    """The run was told to stop by a signal, and has saved what it had.

    Not an Exception, as KeyboardInterrupt is none: whoever takes every error of a library for a damaged file
    must not take this for one.

    Args:
        message: says how to go on.
        signal: its number; the exit status is 128 more, as a shell reports a process that a signal ended.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal
