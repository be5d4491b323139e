"""Background work: one task at a time, never a queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """A thread for a recurring task, such as writing the newest state.

    The caller skips the task while it is not :attr:`due`: the next state replaces this one. So nothing
    queues, and training does not wait.

    Args:
        name: the thread's name.
        every_seconds: the least time between two starts, and from now to the first.
    """

    def __init__(self, name: str, every_seconds: float) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._every_seconds = every_seconds
        self._began = time.monotonic()
        self._pending: Future[None] | None = None

    @property
    def due(self) -> bool:
        """Whether the last task has ended, and started at least ``every_seconds`` ago."""
        busy = self._pending is not None and not self._pending.done()
        return not busy and time.monotonic() - self._began >= self._every_seconds

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the current task, if there is one, and start another, due or not.

        Raises:
            Exception: the error of the task before.
        """
        self.wait()
        self._began = time.monotonic()
        self._pending = self._thread.submit(work)

    def check(self) -> None:
        """Raise the error of a task that has ended, without waiting for one that has not."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the current task, if there is one, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last task, end the thread, and raise the task's error, if there is one."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
