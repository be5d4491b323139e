"""Where a network errs: figures of each class, the pairs it confuses, and pictures that can be read."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastalex import plots
from fastalex.text import shortened, wrapped
from fastalex.training.metrics import errors
from fastalex.training.per_class import class_figures, confused_classes, confusion_counts, most_confused

LONG = "a class with a rather long name of several words, number"


def test_figures_of_each_class_are_those_of_their_definition() -> None:
    classes = [f"class {i}" for i in range(9)]
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200, 9, generator=generator).softmax(dim=1)
    probabilities[:, 8] = 0  # never predicted
    labels = torch.randint(1, 9, (200,), generator=generator)  # class 0 has no images
    found = class_figures(probabilities, labels.numpy(), classes)
    assert [each.name for each in found] == classes
    predicted = probabilities.argmax(dim=1)
    for i, each in enumerate(found):
        own = labels == i
        assert each.images == int(own.sum())
        if i == 8:
            assert (each.precision, each.recall, each.top1_error) == (None, 0, 1)
        else:
            assert each.precision == pytest.approx(own[predicted == i].double().mean().item())
        if i == 0:
            assert (each.precision, each.recall, each.top1_error, each.top5_error) == (0, None, None, None)
        else:
            of_class = errors(probabilities[own], labels[own])
            assert each.recall == pytest.approx(1 - of_class.top1_error)
            assert each.top1_error == pytest.approx(of_class.top1_error)
            assert each.top5_error == pytest.approx(of_class.top5_error)


def test_counts_have_the_true_class_in_the_row() -> None:
    probabilities = torch.tensor([[0.1, 0.9, 0.0], [0.2, 0.8, 0.0], [0.9, 0.1, 0.0]])
    counts = confusion_counts(probabilities, np.array([0, 0, 2]))
    assert counts.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_the_most_confused_pairs_come_first() -> None:
    counts = np.array([[90, 5, 5], [0, 10, 0], [7, 5, 8]])
    found = most_confused(counts, 3)
    assert [(each.actual, each.predicted, each.count) for each in found] == [(2, 0, 7), (2, 1, 5), (0, 1, 5)]
    assert [each.share for each in found] == [0.35, 0.25, 0.05]
    assert len(most_confused(counts, 100)) == 4
    assert most_confused(np.eye(3, dtype=np.int64), 10) == []


def test_confused_classes_are_those_of_the_pairs() -> None:
    counts = np.diag(np.full(6, 50))
    counts[4, 1], counts[0, 5], counts[1, 2] = 9, 8, 7
    assert confused_classes(counts, 6) == [4, 1, 0, 5, 2]
    assert confused_classes(counts, 4) == [4, 1, 0, 5]
    assert confused_classes(counts, 3) == [4, 1]


def texts(draw: Callable[[Path], None], path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    """Draw a figure; return its texts, as they are laid out."""
    figures: list[Figure] = []
    save = plots.save

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    draw(path)
    return [text for text in figures[0].findobj(Text) if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("classes", [2, 41])
def test_names_in_a_confusion_matrix_do_not_overlap(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{LONG} {i}" for i in range(classes)]
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 10, (classes, classes))
    drawn = texts(lambda path: plots.confusion_matrix(matrix, names, path), tmp_path / "m.png", monkeypatch)
    labels = [text for text in drawn if text.get_text().startswith("a class") and not text.get_rotation()]
    assert len({text.get_text() for text in labels}) == len(labels) == min(classes, plots.MOST_CONFUSED)
    boxes = sorted((text.get_window_extent() for text in labels), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)
    others = [text for text in drawn if text.get_text() == "any other class"]
    assert len(others) == (classes > plots.ALL_CLASSES)


def test_the_counts_of_the_chosen_classes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the picture has all images of its class."""
    matrix = np.full((50, 50), 2)
    drawn = texts(
        lambda path: plots.confusion_matrix(matrix, [str(i) for i in range(50)], path),
        tmp_path / "m.png",
        monkeypatch,
    )
    centred = [int(text.get_text()) for text in drawn if text.get_ha() == text.get_va() == "center"]
    assert sum(centred) == plots.MOST_CONFUSED * 100


def test_captions_of_mistakes_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [np.zeros((8, 8, 3), np.uint8)] * 8
    captions = [(f"{LONG} {i}", 0.9, "WITHOUT_BLANKS_" * 10) for i in range(8)]
    drawn = texts(lambda path: plots.mistakes(images, captions, path), tmp_path / "m.png", monkeypatch)
    shown = ("90%", "The most confident")  # the axes have texts too, which are off
    boxes = [text.get_window_extent() for text in drawn if any(part in text.get_text() for part in shown)]
    assert len(boxes) == 9
    overlaps = [(i, j) for i in range(9) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert overlaps == []


def test_a_network_without_mistakes_is_drawn(tmp_path: Path) -> None:
    plots.confusion_matrix(np.eye(50, dtype=int), [str(i) for i in range(50)], tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 0


@pytest.mark.parametrize("text", ["short", "x" * 24, "y" * 25, f"{LONG} 17", "z" * 500])
def test_shortened_text_fits_and_keeps_both_ends(text: str) -> None:
    found = shortened(text, 24)
    assert len(found) == min(len(text), 24)
    assert (found[0], found[-1]) == (text[0], text[-1])
    lines = wrapped(text, 24, 2).split("\n")
    assert len(lines) <= 2
    assert max(map(len, lines)) <= 24
    if len(text) <= 24:
        assert found == lines[0] == text
