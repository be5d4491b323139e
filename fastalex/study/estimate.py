"""The time that a run would take on this machine, from a few steps of its network."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from itertools import pairwise

import torch

from fastalex.config import Config, DataConfig, Flip
from fastalex.config.plain import model_options
from fastalex.data import Views, build_loader, load_splits, resolve_loader
from fastalex.data.cifar import holds_cifar10
from fastalex.models import create_model
from fastalex.runtime import choose_runtime
from fastalex.training.limits import explained
from fastalex.training.memory import room_for_images
from fastalex.training.timing import WARMUP_STEPS
from fastalex.training.trainer import Trainer

MEASURED_STEPS = 4
TEST_VIEWS = 11  # of each test image: the centre crop, and ten
# A forward pass is a third of the arithmetic of a training step.
EVALUATION_COST = 1 / 3


class Estimator:
    """Estimates the times of runs.

    Measures each network, crop, batch and optimizer once, and counts each data set once.

    Attributes:
        machine: the runtime of the last measurement, in words; empty before the first.
        without_images: whether a run's images are still to be downloaded.
    """

    def __init__(self) -> None:
        self.machine = ""
        self.without_images = False
        self._rates: dict[tuple[object, ...], float] = {}
        self._numbers: dict[tuple[object, ...], tuple[int, int, int]] = {}

    def seconds(self, config: Config) -> float:
        """Estimate the seconds of a run: its training, its validations and its tests.

        Args:
            config: of the run.

        Raises:
            FastalexError: the images cannot be read, or the network does not fit the device.
        """
        training, validation, test = self._numbers_of_images(config)
        views = 2 if config.data.flip is Flip.both else 1
        train = config.train
        parts = ((epochs, self._rate(config, crop)) for epochs, crop in config.epochs_by_crop())
        seconds = sum(epochs * views * training / rate for epochs, rate in parts)
        evaluated = train.epochs * validation + 2 * TEST_VIEWS * test
        return seconds + EVALUATION_COST * evaluated / self._rate(config, config.data.crop)

    def assumptions(self) -> str:
        """Say what the estimates so far rest on, one assumption per line."""
        lines = [
            f"measured: the median of {MEASURED_STEPS} steps of each network, crop and batch on random "
            f"pixels, after {WARMUP_STEPS} to warm up; {self.machine}",
            "evaluation: a third of the time of a training step per image; validation after each epoch, and "
            f"{TEST_VIEWS} views of each test image with the final weights and with the best",
            "not counted: compilation, decoding and copies of images, checkpoints",
            "an interrupted run counts in full",
            "other work on this machine now makes the times longer",
        ]
        if self.without_images:
            lines.append("images: CIFAR-10's own numbers, because they are still to be downloaded")
        return "\n".join(f"- {line}" for line in lines)

    def _numbers_of_images(self, config: Config) -> tuple[int, int, int]:
        """Training, validation and test images; CIFAR-10's own numbers where it is still to be downloaded."""
        data = config.data
        key = (data.name, data.root, data.validation_fraction, data.train_fraction)
        if key not in self._numbers:
            if data.name == "cifar10" and data.download and not holds_cifar10(data.root):
                self.without_images = True
                validation = math.ceil(50_000 * data.validation_fraction)
                training = 50_000 - validation
                training -= math.ceil((1 - data.train_fraction) * training)
                self._numbers[key] = training, validation, 10_000
            else:
                splits = load_splits(replace(data, download=False), config.seed, progress=False)
                self._numbers[key] = len(splits.train), len(splits.validation), len(splits.test)
        return self._numbers[key]

    def _rate(self, config: Config, crop: int) -> float:
        """Training images/s on random pixels."""
        options = model_options(config.model)
        key = (config.model.name, *options.values(), crop, config.train.batch_size, config.train.optimizer)
        if key in self._rates:
            return self._rates[key]
        with explained(config):
            runtime = choose_runtime(config.runtime)
            self.machine = str(runtime)
            images = (WARMUP_STEPS + MEASURED_STEPS) * config.train.batch_size
            data = DataConfig("synthetic", resize=crop, crop=crop, images=images)
            splits = load_splits(data, 0, progress=False)
            torch.manual_seed(0)
            model = create_model(config.model.name, len(splits.classes), **options)
            room = room_for_images(model, replace(config, data=data), runtime)
            loader = build_loader(
                splits.train,
                data,
                resolve_loader(config.loader, splits, room),
                views=Views.random,
                batch_size=config.train.batch_size,
                runtime=runtime,
                network=model,
            )
            runtime.place(model)
            # A rate at which no network diverges.
            recipe = replace(config.train, epochs=1, stages=[], lr=1e-6, muon_lr=1e-6)
            ends: list[float] = []

            def ended(step: int, loss: float | None) -> None:
                runtime.synchronize()
                ends.append(time.perf_counter())

            Trainer(model, recipe, loader, None, runtime, on_step=ended).run_epoch()
        # The median, because a step that other work has interrupted may take many times as long.
        seconds = statistics.median(end - begin for begin, end in pairwise(ends[WARMUP_STEPS - 1 :]))
        self._rates[key] = config.train.batch_size / seconds
        return self._rates[key]
