"""Work beside the training: one piece at a time, and never a queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """A thread for work that comes up again and again, such as writing the newest state.

    Who has such work asks :attr:`due`, and leaves it out if it is not: the next state says what this one
    would have said. So nothing waits in a queue, and training waits for nothing.

    Args:
        name: of the thread.
        every_seconds: from the start of one piece to that of the next, at least; the first has its turn so
            many seconds from now.
    """

    def __init__(self, name: str, every_seconds: float) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._every_seconds = every_seconds
        self._began = time.monotonic()
        self._pending: Future[None] | None = None

    @property
    def due(self) -> bool:
        """Whether the piece before has ended, and began long enough ago."""
        busy = self._pending is not None and not self._pending.done()
        return not busy and time.monotonic() - self._began >= self._every_seconds

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the piece that is under way, if there is one, and start another, due or not.

        Raises:
            Exception: that of the piece before.
        """
        self.wait()
        self._began = time.monotonic()
        self._pending = self._thread.submit(work)

    def check(self) -> None:
        """Raise the error of a piece that has ended, without waiting for one that has not."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the piece that is under way, if there is one, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last piece, end the thread and raise the error, if there is one."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
