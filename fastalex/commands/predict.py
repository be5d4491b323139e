"""``python -m fastalex.predict weights=RUN images=PATH``: what a trained network sees in images of yours."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from fastalex.config import OnError, PredictConfig
from fastalex.data.paths import ImagePaths
from fastalex.errors import DataError, OutputError
from fastalex.runs.prediction import most_probable, predict_images
from fastalex.runs.prediction_file import Row, prediction_file
from fastalex.runs.signals import StopSignals
from fastalex.runs.weights import open_weights
from fastalex.text import aligned, printable, shortened

TOP = 5  # classes of an image, of those that there are
FEW = 20  # images of which a table is printed
OUTPUT = "predictions.csv"


def run(config: PredictConfig) -> int:
    """Predict the classes of images; print a table of a few, write a file of many.

    Args:
        config: the weights, the images, and where the predictions go.

    Returns:
        The number of images that were predicted.

    Raises:
        FastalexError: if the weights, the images or the file cannot be used.
    """
    trained = open_weights(config.weights)
    paths = ImagePaths(config.images, missing_ok=config.on_error is OnError.skip)
    top = min(TOP, len(trained.classes))
    few = len(paths) <= FEW
    if not few and not config.output and Path(OUTPUT).exists():
        raise OutputError(
            f"{OUTPUT}: exists; name another file with output=FILE, or replace it with output={OUTPUT}"
        )
    output = config.output or (None if few else OUTPUT)
    file = (
        nullcontext(lambda rows: None) if output is None else prediction_file(Path(output).expanduser(), top)
    )
    runtime = trained.runtime(config.runtime.device, config.runtime.precision)
    print(f"weights of {trained.source}\n{runtime}")

    shown: list[Row] = []
    skipped = 0

    def skip(path: Path, reason: str) -> None:
        nonlocal skipped
        skipped += 1
        bar.update()
        bar.write(f"fastalex: warning: {printable(path)} is left out: {reason}", file=sys.stderr)

    batches = predict_images(
        trained,
        paths,
        runtime=runtime,
        views=config.views,
        batch_size=config.batch_size,
        workers=config.loader.workers,
        on_error=config.on_error,
        on_skip=skip,
    )
    predicted = 0
    began = time.perf_counter()
    with StopSignals(), file as write, _bar(len(paths), disable=few) as bar:
        for batch, probabilities in batches:
            rows = _rows(batch, *most_probable(probabilities, top), trained.classes)
            write(rows)
            shown += rows if few else []
            predicted += len(rows)
            bar.update(len(rows))
        if not predicted:
            raise DataError(f"images={config.images}: no image is left: {skipped} damaged or missing")
    seconds = time.perf_counter() - began
    if shown:
        print(_table(shown))
    left_out = f", {skipped} left out" if skipped else ""
    written = f"; {output}" if output is not None else ""
    print(f"{predicted:,} image{'s' * (predicted != 1)} in {seconds:.1f} s{left_out}{written}")
    return predicted


def _bar(images: int, *, disable: bool) -> tqdm:
    return tqdm(
        total=images,
        unit="image",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 20,
        disable=disable,
    )


def _rows(paths: Sequence[Path], probabilities: Tensor, numbers: Tensor, classes: Sequence[str]) -> list[Row]:
    """Return the row of each of B images, from the probabilities and numbers of its classes, ``(B, top)``."""
    rows: list[Row] = []
    for path, *ranks in zip(paths, numbers.tolist(), probabilities.tolist(), strict=True):
        row: Row = [str(path)]
        for number, probability in zip(*ranks, strict=True):
            row += [classes[number], probability]
        rows.append(row)
    return rows


def _table(rows: Sequence[Row]) -> str:
    """Return the predictions as a text table: the path, then the classes, the most probable first."""
    lines = []
    for path, *cells in rows:
        pairs = zip(cells[::2], cells[1::2], strict=True)
        classes = [f"{shortened(str(name), 20)} {share:.1%}" for name, share in pairs]
        lines.append([shortened(printable(Path(str(path))), 50), *classes])
    return aligned(lines)
