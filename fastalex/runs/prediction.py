"""Predictions of a trained network for any number of image files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastalex.config import Config, OnError
from fastalex.data import Views
from fastalex.data.decode import DamagedImageError
from fastalex.data.windows import reason, windows
from fastalex.errors import ConfigError, DataError
from fastalex.runs.weights import TrainedNetwork
from fastalex.runtime import Runtime
from fastalex.training.evaluation import TEN_CROP, evaluation_batch, evaluation_loader
from fastalex.training.limits import explained
from fastalex.training.metrics import EVALUATION_PASSES, predict_batches


def predict_images(
    trained: TrainedNetwork,
    paths: Iterable[Path],
    *,
    runtime: Runtime | None = None,
    views: int = 1,
    batch_size: int | None = None,
    workers: int | None = None,
    on_error: OnError = OnError.fail,
    on_skip: Callable[[Path, str], None] = lambda path, reason: None,
) -> Iterator[tuple[list[Path], Tensor]]:
    """Return an iterator over the class probabilities of image files, batch by batch in the paths' order.

    Images are prepared as the evaluation of the run prepares them, so the probabilities are those that
    :func:`fastalex.training.evaluation.evaluate_model` finds for the same images. Memory does not grow with
    the number of images.

    Args:
        trained: the network, as :func:`fastalex.runs.weights.open_weights` returns it.
        paths: the image files.
        runtime: the device, dtype and memory format; None for those of the run on the fastest device here.
        views: 1 for the centre crop; 10 for the mean over corners, centre and their mirror images (5 views
            without the mirror images if the run has ``data.flip=none``).
        batch_size: images in a batch, with ten views a tenth as many; None for that of the run.
        workers: as ``loader.workers``; None for that of the run.
        on_error: whether a damaged or missing file ends the predictions or is left out.
        on_skip: called with each file that is left out, and the reason.

    Returns:
        An iterator over the paths of B images, and their probabilities, fp32 ``(B, classes)`` on the CPU.

    Raises:
        ConfigError: ``views`` is neither 1 nor 10, or ``batch_size`` is below 1, or ``workers`` below -1.
        CheckpointError: the weights belong to another network.
        DataError: in an iteration, a file is damaged or cannot be read, and is not to be left out.
        ShortageError: in an iteration, memory, shared memory or file descriptors are used up.
    """
    if views not in (1, TEN_CROP):
        raise ConfigError(f"views={views}: choose 1, the centre crop, or {TEN_CROP}")
    config = trained.loading(batch_size, workers)
    kind = Views.center if views == 1 else Views.ten_crop
    model = trained.model().eval()
    return _batches(model, paths, config, runtime or trained.runtime(), kind, on_error, on_skip)


def _batches(
    model: nn.Module,
    paths: Iterable[Path],
    config: Config,
    runtime: Runtime,
    views: Views,
    on_error: OnError,
    on_skip: Callable[[Path, str], None],
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield what :func:`predict_images` yields."""
    try:
        with explained(config, training=False):
            network = runtime.compiled(runtime.place(model), variants=EVALUATION_PASSES)
            for window in windows(paths, config.loader, evaluation_batch(config, views), on_error):
                of_window = replace(config, loader=window.loader)
                loader = evaluation_loader(network, window.images, of_window, runtime, views)
                for probabilities, labels in predict_batches(network, loader, runtime):
                    places = labels.cpu()
                    damaged = window.damaged[places]
                    for place in places[damaged].tolist():
                        on_skip(window.paths[place], reason(window.paths[place]))
                    whole = [window.paths[place] for place in places[~damaged].tolist()]
                    yield whole, probabilities.cpu()[~damaged]
    except DamagedImageError as error:
        raise DataError(
            f"{error.path} is not a whole image ({error.reason}); replace or remove it, or leave it out with "
            "on_error=skip"
        ) from None


def most_probable(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the most probable classes, the first of equal ones first.

    Args:
        probabilities: fp32 ``(B, classes)``.
        count: number of classes, at most all.

    Returns:
        Their probabilities, fp32 ``(B, count)``, and numbers, int64 ``(B, count)``.
    """
    ordered, classes = torch.sort(probabilities, dim=1, descending=True, stable=True)
    return ordered[:, :count], classes[:, :count]
