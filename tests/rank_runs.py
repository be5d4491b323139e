"""Complete runs on several ranks, one under each option that adds a collective.

``torchrun --nproc-per-node=2 tests/rank_runs.py FOLDER`` trains on FOLDER/images, and writes each run to
FOLDER/NAME and the runs' return values on each rank to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from fastalex.config import (
    CheckpointConfig,
    Color,
    Compression,
    Config,
    DataConfig,
    DistributedConfig,
    Flip,
    LoaderConfig,
    ModelConfig,
    Precision,
    RuntimeConfig,
    Schedule,
    Stage,
    Strategy,
    TrainConfig,
)
from fastalex.distributed.processes import World, joined
from fastalex.errors import FastalexError, StoppedError
from fastalex.models import MODELS
from fastalex.runs import run as runs
from fastalex.runs.launch import Request, train_on
from fastalex.runs.signals import StopSignals
from fastalex.training import flops
from fastalex.training.evaluation import evaluate_model
from tests import ranks, tiny


def make_images(folder: Path) -> None:
    """Write the images of two classes, 30 each."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            pixels = (level + rng.integers(-50, 50, (16, 16, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def a_config(images: Path) -> Config:
    """Two epochs on a folder of images, 16x16 pixels in two classes."""
    return Config(
        model=ModelConfig("tiny"),
        data=DataConfig("imagefolder", root=str(images), resize=36, crop=32, flip=Flip.none),
        loader=LoaderConfig("resident"),
        train=TrainConfig(epochs=2, batch_size=12, lr=0.01),
        runtime=RuntimeConfig(device="cpu", precision=Precision.fp32, threads=1),
        checkpoint=CheckpointConfig(every_seconds=3600.0),
    )


def hybrid(config: Config) -> None:
    config.model = ModelConfig("narrow_alexnet")
    config.data.resize, config.data.crop = 64, 63
    config.runtime.winograd = False  # slow at this size
    config.distributed = DistributedConfig(Strategy.hybrid)
    config.checkpoint.every_steps = 2


def profiled(config: Config) -> None:
    config.profile, config.train.epochs = True, 4


def stages(config: Config) -> None:
    config.train.stages = [Stage(epochs=1, resize=34, crop=32)]


def fine_tuned(config: Config) -> None:
    """Starts from the weights of the first option's run, which is beside the images."""
    config.init_from = str(Path(config.data.root).parent / "plain")
    config.train.freeze, config.train.head_lr = ["0", "1"], 0.1


def set_in(section: str, **values: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for key, value in values.items():
            setattr(getattr(config, section), key, value)

    return change


# The changes that each option makes to a_config. With CutMix each rank draws its own mixes, so its steps are
# not those of a single process.
OPTIONS: dict[str, Callable[[Config], None]] = {
    "plain": lambda config: None,
    "averaged weights": set_in("train", ema_decay=0.5),
    "checkpoints by steps": set_in("checkpoint", every_steps=1),
    "checkpoints by seconds": set_in("checkpoint", every_seconds=0.0),
    "accumulation": set_in("train", accumulate=3),
    "plateau": set_in("train", schedule=Schedule.plateau, patience=0),
    "stages": stages,
    "shifted colours": set_in("data", color=Color.pca),
    "CutMix": set_in("train", cutmix=0.5),
    "initial weights and frozen layers": fine_tuned,
    "compressed gradients": set_in("distributed", compression=Compression.bf16),
    "hybrid": hybrid,
    "divergence": set_in("train", lr=1e30, clip_norm=0.0),
    "profile": profiled,
}
DIVERGES, PROFILED = "divergence", "profile"


def register() -> None:
    """Have ``model.name`` name the networks of these runs, in this process."""
    tiny.register(dropout=0.0)
    MODELS["narrow_alexnet"] = ranks.narrow_alexnet


def run(name: str, images: Path, folder: Path, world: World) -> dict[str, Any]:
    """Train under an option.

    Args:
        name: key of :data:`OPTIONS`.
        images: folder of the images.
        folder: parent of the run's folder.
        world: the ranks; with one process, ``distributed`` has its defaults.

    Returns:
        The folder that the run returned; after an error, its class and exit status.
    """
    register()
    config = a_config(images)
    OPTIONS[name](config)
    if world.size == 1:  # the hybrid needs several processes, and computes the same as one
        config.distributed = DistributedConfig()
    request = Request(config, folder / name, True, {})
    try:
        # Half of a run's time would be the measurement of the peak rate, by products of this size.
        with mock.patch.dict(flops.MATMUL_SIZE, cpu=64), StopSignals() as signals:
            return {"folder": str(train_on(world, request, signals, time.perf_counter()))}
    except (FastalexError, StoppedError) as error:
        return {"error": type(error).__name__, "status": error.exit_status}


def resumed(folder: Path, world: World) -> dict[str, Any]:
    """Resume a copy of the hybrid's run from the older of its checkpoints, by the command line."""
    copy = folder / "hybrid again"
    world.on_main(lambda: shutil.copytree(folder / "hybrid", copy) and None)
    (older,) = copy.glob("checkpoint-*.pt")
    world.sum(0)  # both have found it
    return ranks.command([f"resume={older}"], world)


def main(folder: Path) -> None:
    results: dict[str, Any] = {"evaluations": {}}
    with joined(60) as world:
        for name in OPTIONS:
            with mock.patch.object(runs, "evaluate_model", side_effect=evaluate_model) as evaluations:
                where = folder if world.main else folder / "other"
                results[name] = run(name, folder / "images", where, world)
            results["evaluations"][name] = evaluations.call_count
        results["resumed"] = resumed(folder, world)
    (folder / f"{world.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
