"""Plots of a run and of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastalex.files import replacing
from fastalex.text import shortened, wrapped
from fastalex.training.epoch import Epoch
from fastalex.training.per_class import confused_classes

TRAIN, VALIDATION = "tab:blue", "tab:orange"
ALL_CLASSES = 40  # the most classes of which a confusion matrix is drawn in full
MOST_CONFUSED = 30  # classes in the confusion matrix of more
NAME, CAPTION = 30, 30  # characters of a class name on an axis, and in a line above an image


def losses(epochs: Sequence[Epoch], path: Path) -> None:
    """Plot loss, error and learning rate over the epochs, one panel each.

    Args:
        epochs: the run's epochs, in order.
        path: of the PNG file.

    Raises:
        OutputError: the file cannot be written, as in the other functions here.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, error, rate = figure.subplots(1, 3)
    x = [epoch.epoch for epoch in epochs]
    marker = "o" if len(x) <= 40 else ""
    loss.plot(x, [epoch.train_loss for epoch in epochs], color=TRAIN, marker=marker, ms=3, label="training")
    error.plot(
        x,
        [epoch.train_top1_error for epoch in epochs],
        color=TRAIN,
        marker=marker,
        ms=3,
        label="training top-1",
    )
    validated = [epoch for epoch in epochs if epoch.validation_top1_error is not None]
    if validated:
        x_validated = [epoch.epoch for epoch in validated]
        validation = np.array([epoch.validation_top1_error for epoch in validated])
        style = {"color": VALIDATION, "marker": marker, "ms": 3}
        loss.plot(x_validated, [epoch.validation_loss for epoch in validated], label="validation", **style)
        error.plot(x_validated, validation, label="validation top-1", **style)
        best = int(validation.argmin())
        # A ring and a legend entry: a label beside the point would overlap the curves of some runs.
        ring = {"color": "black", "marker": "o", "mfc": "none", "ms": 7, "ls": ""}
        error.plot(x_validated[best], validation[best], label=f"best {validation[best]:.2%}", **ring)
    loss.set(title="Cross-entropy", ylabel="nats")
    error.yaxis.set_major_formatter(PercentFormatter(1))
    error.set(title="Error")
    rate.plot(x, [epoch.learning_rate for epoch in epochs], color="tab:green", marker=marker, ms=3)
    rate.set(title="Learning rate at the end of the epoch")
    for panel in (loss, error, rate):
        panel.set_ylim(0, 1.05 * panel.dataLim.y1 or None)  # so that a constant is not drawn on the border
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    loss.legend()
    error.legend()
    save(figure, path)


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Plot how often class i (row) was predicted as class j (column), coloured by its share of the row.

    Of more than ``ALL_CLASSES`` classes, the plot has those of the most confused pairs, and a last column of
    what was predicted as any other class.

    Args:
        matrix: counts, integer ``(classes, classes)``.
        classes: names of the classes.
        path: of the PNG file.
    """
    title = "Confusion matrix (test images, counts)"
    rows = columns = [shortened(name, NAME) for name in classes]
    images = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    if len(classes) > ALL_CLASSES:
        chosen = confused_classes(matrix, MOST_CONFUSED)
        title = f"The {len(chosen)} most confused of {len(classes):,} classes (test images, counts)"
        rows = [rows[i] for i in chosen]
        columns = [*rows, "any other class"]
        inside = matrix[np.ix_(chosen, chosen)]
        images = images[chosen]
        others = matrix[chosen].sum(axis=1, keepdims=True) - inside.sum(axis=1, keepdims=True)
        matrix = np.hstack([inside, others])
    side = max(5.0, 0.42 * len(rows) + 2)
    figure = Figure(figsize=(side + 2, side + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if not rows:
        axes.axis("off")
        axes.set_title("No class was taken for another")
        save(figure, path)
        return
    shares = matrix / images
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    # parse_math=False, because a class name may contain a $.
    axes.set_xticks(
        range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            size = 8 if count < 10_000 else 6
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=size)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    save(figure, path)


def mistakes(images: Sequence[np.ndarray], captions: Sequence[tuple[str, float, str]], path: Path) -> None:
    """Show misclassified images with captions.

    Args:
        images: RGB images, each uint8 ``(H, W, 3)``; the most confident mistake first.
        captions: of each image: the predicted class, its probability and the true class.
        path: of the PNG file.
    """
    columns = 4
    rows = max(1, -(-len(images) // columns))
    layout = ConstrainedLayoutEngine(h_pad=0.1)  # inches, between captions and what is above them
    figure = Figure(figsize=(2.6 * columns, 3.3 * rows), layout=layout)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, image, (predicted, confidence, actual) in zip(panels, images, captions, strict=False):
        panel.imshow(image, interpolation="nearest")
        lines = [wrapped(f"{predicted} ({confidence:.0%}),", CAPTION, 2), wrapped(f"is {actual}", CAPTION, 2)]
        panel.set_title("\n".join(lines), fontsize=8, parse_math=False)
    figure.suptitle("The most confident mistakes" if images else "No mistakes")
    save(figure, path)


def loss_curves(epochs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plot training and validation loss over the epochs.

    Args:
        epochs: the lines of ``metrics.jsonl``.
        title: of the plot.
        path: of the PNG file.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(epochs) <= 40 else ""
    for name, color in (("train", TRAIN), ("validation", VALIDATION)):
        points = [(epoch["epoch"], epoch[f"{name}_loss"]) for epoch in epochs]
        shown = [(x, loss) for x, loss in points if loss is not None]
        axes.plot(*zip(*shown, strict=True), color=color, marker=marker, ms=3, label=name)
    axes.set(title=title, xlabel="epoch", ylabel="cross-entropy, nats", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def differences(
    points: Sequence[tuple[str, float, float | None, bool | None]], label: str, path: Path
) -> None:
    """Plot differences of errors, a line each, with their intervals.

    Args:
        points: of each line its text, the difference, half the interval (None where it is not known), and
            whether the interval is above 0 (True), below (False) or contains 0 (None).
        label: of the axis of the differences.
        path: of the PNG file.
    """
    colors = {True: "tab:green", False: "tab:red", None: "tab:gray"}
    names = {True: "interval above 0", False: "interval below 0", None: "interval contains 0, or unknown"}
    figure = Figure(figsize=(8.4, 0.34 * len(points) + 1.7), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", lw=0.8)
    for verdict in dict.fromkeys(point[3] for point in points):
        lines = [place for place, point in enumerate(points) if point[3] is verdict]
        axes.errorbar(
            [points[place][1] for place in lines],
            lines,
            xerr=[points[place][2] or 0.0 for place in lines],
            fmt="o",
            ms=5,
            capsize=3,
            color=colors[verdict],
            label=names[verdict],
        )
    axes.set_yticks(range(len(points)), [point[0] for point in points], parse_math=False)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    save(figure, path)


def error_curves(
    curves: Mapping[str, Sequence[Sequence[float]]], level: float, title: str, path: Path
) -> None:
    """Plot the errors of several runs over the epochs.

    Args:
        curves: by the label in the legend, the runs that have it, each the errors of its epochs.
        level: an error that a horizontal line marks.
        title: of the plot.
        path: of the PNG file.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (label, runs), color in zip(curves.items(), (TRAIN, VALIDATION, "tab:green"), strict=False):
        for number, errors in enumerate(runs):
            epochs = range(1, len(errors) + 1)
            axes.plot(epochs, errors, color=color, label="" if number else label, alpha=0.8, lw=1.2)
    axes.axhline(level, color="black", lw=0.8, ls=":")
    axes.set(title=title, xlabel="epoch", ylabel="top-1 error", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def sweep(points: Mapping[str, Mapping[str, Sequence[float]]], key: str, note: str, path: Path) -> None:
    """Plot the validation error of a sweep's runs against the swept value: each run, mean and spread.

    The bars are the standard deviation of a value's runs, which differ in their seed, on either side of the
    mean.

    Args:
        points: the top-1 errors of the runs, by line (its other swept values, for the legend) and by value.
        key: the swept key.
        note: a remark below the title; empty for none.
        path: of the PNG file.
    """
    values = list(dict.fromkeys(value for line in points.values() for value in line))
    places = _numbers(values)
    numeric = places is not None
    places = places or {value: float(place) for place, value in enumerate(values)}
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    seeds = max(len(errors) for line in points.values() for errors in line.values())
    for number, (line, by_value) in enumerate(points.items()):
        # Names have no order that a line could follow; beside each other, bars do not hide each other.
        shift = 0.0 if numeric else 0.08 * (number - (len(points) - 1) / 2)
        ordered = sorted((places[value] + shift, errors) for value, errors in by_value.items())
        mean = [float(np.mean(errors)) for _, errors in ordered]
        spread = [float(np.std(errors, ddof=1)) if len(errors) > 1 else 0.0 for _, errors in ordered]
        bars = axes.errorbar(
            [x for x, _ in ordered],
            mean,
            spread if seeds > 1 else None,
            marker="o",
            ms=5,
            capsize=4,
            ls="-" if numeric else "",
            label=line,
        )
        x, y = zip(*((x, error) for x, errors in ordered for error in errors), strict=True)
        axes.scatter(x, y, s=14, color=bars[0].get_color(), alpha=0.45, zorder=3)
    if numeric and min(places.values()) > 0 and max(places.values()) >= 5 * min(places.values()):
        axes.set_xscale("log")
    axes.set_xticks(list(places.values()), values, parse_math=False)
    axes.minorticks_off()
    if not numeric:
        axes.set_xlim(-0.5, len(values) - 0.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    remarks = [f"mean and standard deviation of up to {seeds} runs" if seeds > 1 else "", note]
    title = ["Validation error of the final weights", "; ".join(filter(None, remarks))]
    axes.set_title("\n".join(filter(None, title)), fontsize=10)
    axes.set_xlabel(key, parse_math=False)
    axes.set_ylabel("top-1 error")
    axes.grid(alpha=0.3)
    if any(points):
        axes.legend(fontsize=8)
    save(figure, path)


def _numbers(values: Sequence[str]) -> dict[str, float] | None:
    """Return texts as numbers; None if one is not a finite number, or two are the same."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return None
    distinct = len(set(numbers.values())) == len(values)
    return numbers if distinct and np.isfinite(list(numbers.values())).all() else None


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically.

    Args:
        figure: the figure.
        path: of the file, whose suffix names the format.

    Raises:
        OutputError: the file cannot be written.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
