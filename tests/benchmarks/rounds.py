"""Stands in for pytest-benchmark's fixture."""

from __future__ import annotations

from collections.abc import Callable


class Rounds:
    """What pytest-benchmark's fixture does, without its statistics."""

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()
