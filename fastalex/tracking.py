"""A run's folder: what is written to it, and when."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastalex import plots
from fastalex.config import Config
from fastalex.errors import ConfigError
from fastalex.files import write_text
from fastalex.trainer import Epoch

VERSIONS = ("fastalex", "torch", "torchvision", "numba", "numpy")


class RunFolder:
    """The folder of one run. Every file in it is whole at any moment.

    Args:
        path: made by Hydra; where another run already writes there, a numbered neighbour is taken instead.
        given: whether the user named the folder. It is then taken or refused, never renamed.
        config: written to ``config.yaml``.

    Raises:
        ConfigError: if the user named a folder that already holds a run.
    """

    def __init__(self, path: Path, given: bool, config: Config) -> None:
        self.path = _claim(path, given)
        self._writer = SummaryWriter(self.path / "tensorboard")
        self._epochs: list[Epoch] = []
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))

    def augmented_inputs(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        """Show what the network is trained on: up to 32 normalised images ``(N, 3, H, W)``."""
        shown = images[:32].float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        self._writer.add_images("augmented inputs", shown.clamp(0, 1), 0)

    def loss(self, step: int, value: float) -> None:
        """Record the mean training loss up to a step."""
        self._writer.add_scalar("loss/train", value, step)

    def epoch(self, epoch: Epoch) -> None:
        """Record an epoch: a line of ``metrics.jsonl``, TensorBoard, and ``losses.png`` drawn anew."""
        self._epochs.append(epoch)
        lines = [json.dumps(dataclasses.asdict(entry)) for entry in self._epochs]
        write_text(self.path / "metrics.jsonl", "\n".join(lines) + "\n")
        for name, value in (
            ("loss/validation", epoch.validation_loss),
            ("error/train top-1", epoch.train_top1_error),
            ("error/validation top-1", epoch.validation_top1_error),
            ("error/validation top-5", epoch.validation_top5_error),
            ("images per second", epoch.images_per_second),
            ("FLOP/s utilization", epoch.flops_utilization),
            ("learning rate", epoch.learning_rate),
        ):
            if value is not None:
                self._writer.add_scalar(name, value, epoch.step)
        self._writer.flush()
        plots.losses(self._epochs, self.path / "losses.png")

    def summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` and close the TensorBoard file."""
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        self._writer.close()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's figures."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in VERSIONS}}


def _claim(path: Path, given: bool) -> Path:
    """Make the folder ours. Two runs started in the same second are handed the same path by Hydra."""
    for attempt in range(1, 1000):
        candidate = path if attempt == 1 else path.with_name(f"{path.name}-{attempt}")
        candidate.mkdir(parents=True, exist_ok=True)
        try:
            (candidate / "tensorboard").mkdir()  # exactly one process succeeds
            return candidate
        except FileExistsError:
            if given:
                break
    raise ConfigError(f"hydra.run.dir={path}: already holds a run; name another folder")
