"""Errors that the person at the keyboard can mend.

A command line turns each into one line and exit status 2; a bug stays a traceback.
"""


class FastalexError(Exception):
    """Base class: the message is one line that says what is wrong, where, and what to do."""


class ConfigError(FastalexError, ValueError):
    """A configuration key has a value that cannot work."""


class DataError(FastalexError):
    """A data set is missing, empty or damaged."""


class CheckpointError(FastalexError):
    """A checkpoint is missing, damaged or belongs to another network."""


class MissingDependencyError(FastalexError, ImportError):
    """An optional package is not installed."""
