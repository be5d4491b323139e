"""The progress bar of a training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from fastalex.config import Config


def by_crop(config: Config, steps: int) -> list[tuple[str, int]]:
    """Return a label and the number of steps for each size of the images, in order.

    Args:
        config: of the run.
        steps: the number of steps of the whole run.
    """
    crops = config.epochs_by_crop()
    if len(crops) == 1:
        return [("", steps)]
    return [(f"{crop}x{crop}", steps * epochs // config.train.epochs) for epochs, crop in crops]


class ProgressBar:
    """Shows the steps of a training, in one bar for each part of it.

    The steps of a part take equally long, those of another part do not, so the bar's time left is that of its
    part.

    Args:
        parts: label and number of steps of each part, in order.
        step: the number of steps taken so far.
    """

    def __init__(self, parts: Sequence[tuple[str, int]], step: int) -> None:
        self._later = list(parts)
        while len(self._later) > 1 and step >= self._later[0][1]:
            step -= self._later.pop(0)[1]
        self._bar = self._next_bar(step)

    def update(self) -> None:
        """Count a step."""
        if self._later and self._bar.n == self._bar.total:
            self._bar.close()
            self._bar = self._next_bar(0)
        self._bar.update()

    def show_loss(self, loss: float) -> None:
        """Show a loss from now on."""
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def write(self, line: str) -> None:
        """Print a line to standard output, above the bar."""
        self._bar.write(line, file=sys.stdout)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _next_bar(self, step: int) -> tqdm:
        label, steps = self._later.pop(0)
        return tqdm(
            desc=label or None,
            total=steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )
