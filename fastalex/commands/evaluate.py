"""``python -m fastalex.evaluate weights=RUN``: a run's test errors, and its mistakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import astuple, fields
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryFile

import torch

from fastalex import plots
from fastalex.config import EvaluateConfig
from fastalex.data import ImageSet, load_splits, resolve_loader
from fastalex.errors import CheckpointError, ConfigError, OutputError
from fastalex.files import write_csv, write_text
from fastalex.runs.weights import open_weights
from fastalex.text import aligned, shortened
from fastalex.training.evaluation import Evaluation, evaluate_model
from fastalex.training.limits import explained
from fastalex.training.memory import room_for_images
from fastalex.training.metrics import EVALUATION_PASSES
from fastalex.training.per_class import (
    ClassFigures,
    Confusion,
    class_figures,
    confusion_counts,
    most_confused,
)

MISTAKES = 12  # images in mistakes.png
CONFUSED_PAIRS = 10


def run(config: EvaluateConfig) -> Evaluation:
    """Evaluate trained weights on their data set's test images.

    Writes ``evaluation.json``, ``per_class.csv``, ``confusion_matrix.png`` and ``mistakes.png`` to the folder
    of the weights, or to ``output``, which is created.

    Raises:
        FastalexError: if the weights or the data cannot be used, or nothing can be written to the folder.
    """
    trained = open_weights(*_given(config))
    run_config = trained.loading(config.batch_size, config.loader.workers)
    if config.data.root is not None:
        run_config.data.root = config.data.root
    model = trained.model()
    runtime = trained.runtime(config.runtime.device, config.runtime.precision)
    print(f"weights of {trained.source}\n{runtime}")
    splits = load_splits(run_config.data, run_config.seed)
    if not splits.is_measurable:
        raise ConfigError(f"{trained.where}: was trained on synthetic data, where an error means nothing")
    if list(splits.classes) != trained.classes:
        raise CheckpointError(
            f"{trained.where}: knows other classes than data.root={run_config.data.root} has: "
            f"{_difference(trained.classes, splits.classes)}"
        )
    if trained.digest not in (None, splits.digest):
        print(
            f"fastalex: warning: data.root={run_config.data.root}: the images are not those of the run; the "
            "errors are too low if some that it was trained on are now in the test set",
            file=sys.stderr,
        )
    folder = _output(config, trained.source.parent)
    if run_config.loader.name == "resident":  # the images may be of other sizes than the run's
        run_config.loader.name = "auto"
    with explained(run_config, training=False):
        room = room_for_images(model, run_config, runtime)
        run_config.loader = resolve_loader(run_config.loader, splits, room)
        network = runtime.compiled(runtime.place(model), variants=EVALUATION_PASSES)
        evaluation = evaluate_model(network, splits.test, run_config, runtime)
    print(evaluation.table(f"{splits.source}, {len(splits.test):,} test images"))
    counts = confusion_counts(evaluation.probabilities, splits.test.labels)
    confused = most_confused(counts, CONFUSED_PAIRS)
    if confused:
        print(_confused_table(confused, splits.classes))

    figures = {"weights": trained.source.name, **evaluation.as_dict()}
    write_text(folder / "evaluation.json", json.dumps(figures, indent=2) + "\n")
    _write_per_class(
        class_figures(evaluation.probabilities, splits.test.labels, splits.classes), folder / "per_class.csv"
    )
    plots.confusion_matrix(counts, splits.classes, folder / "confusion_matrix.png")
    _draw_mistakes(splits.test, trained.classes, evaluation.probabilities, folder / "mistakes.png")
    print(f"evaluation.json, per_class.csv, confusion_matrix.png and mistakes.png are in {folder}")
    return evaluation


def _output(config: EvaluateConfig, beside: Path) -> Path:
    """Return the folder to write to, after checking that this is possible: an evaluation may take hours."""
    folder = beside if config.output is None else Path(config.output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: nothing can be written to it ({error.strerror}); name another with output=FOLDER"
        ) from None
    return folder


def _given(config: EvaluateConfig) -> tuple[str, str]:
    """Return the path of the weights, and the key that names it."""
    if config.weights and config.checkpoint:
        raise ConfigError(f"checkpoint={config.checkpoint}: is another name of weights=; give one of them")
    if not config.weights and not config.checkpoint:
        raise ConfigError("weights: has no value; give it as weights=RUN, a run's folder")
    return (config.weights, "weights") if config.weights else (config.checkpoint, "checkpoint")


def _draw_mistakes(images: ImageSet, classes: list[str], probabilities: torch.Tensor, path: Path) -> None:
    confidence, predicted = probabilities.max(dim=1)
    wrong = predicted != torch.from_numpy(images.labels)
    ranked = torch.where(wrong, confidence, -1.0).argsort(descending=True)
    worst = ranked[: min(MISTAKES, int(wrong.sum()))].tolist()
    captions = [(classes[predicted[i]], confidence[i].item(), classes[images.labels[i]]) for i in worst]
    plots.mistakes([images.image(i) for i in worst], captions, path)


def _write_per_class(figures: Sequence[ClassFigures], path: Path) -> None:
    rows = (
        [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in astuple(each)] for each in figures
    )
    write_csv(path, [[field.name for field in fields(ClassFigures)], *rows])


def _confused_table(confused: Sequence[Confusion], classes: Sequence[str]) -> str:
    """Return the pairs as a text table."""
    rows = [("most confused: true", "predicted", "images", "of the class")]
    for pair in confused:
        actual, predicted = (shortened(classes[i], 40) for i in (pair.actual, pair.predicted))
        rows.append((actual, predicted, str(pair.count), f"{pair.share:.1%}"))
    return aligned(rows, right=(2, 3))


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    pairs = enumerate(zip_longest(theirs, ours), 1)
    number, names = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    known, found = ("none" if name is None else repr(name) for name in names)
    return f"class {number} is {known} there and {found} here, of {len(theirs)} and {len(ours)}"
