"""SIGTERM and SIGINT stop a run gracefully: it finishes its step and saves its state."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from fastalex.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context in which the first SIGTERM or SIGINT raises StoppedError, and a second ends the process.

    Within :meth:`deferred` the first only sets ``received``. In a thread other than the main one, signals
    keep their handlers.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context that a signal does not interrupt: its owner checks ``received``."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
        if not self._deferred:
            raise StoppedError(f"stopped by {self.received.name}", number)
