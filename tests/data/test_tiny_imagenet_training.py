"""Training on a generated data set in Tiny ImageNet's layout, with two classes of different colours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastalex import train

COLOURS = {"n01443537": (200, 40, 40), "n01629819": (40, 40, 200)}


def coloured(path: Path, colour: tuple[int, int, int], rng: np.random.Generator) -> None:
    pixels = np.clip(rng.normal(colour, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_tree(root: Path, per_class: int = 40) -> None:
    rng = np.random.default_rng(0)
    annotations = []
    for wnid, colour in COLOURS.items():
        for i in range(per_class):
            coloured(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", colour, rng)
        for _ in range(per_class // 4):
            name = f"val_{len(annotations)}.JPEG"
            coloured(root / "val" / "images" / name, colour, rng)
            annotations.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))


@pytest.mark.usefixtures("tiny_network")
def test_training_learns_the_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    write_tree(tmp_path / "tiny-imagenet-200")
    overrides = [
        "data=tiny_imagenet",
        f"data.root={tmp_path}",
        "data.resize=36",
        "data.crop=32",
        "model=resnet18",  # a group without options
        "model.name=tiny",
        "train.batch_size=8",
        "train.epochs=6",  # 48 steps: after 16, batch normalisation's running averages have not converged
        "runtime.precision=fp32",
        "hydra.run.dir=run",
    ]
    monkeypatch.setattr(sys, "argv", ["fastalex", *overrides])
    train.main()
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["train_images"], summary["validation_images"]) == (64, 16)
    assert summary["ten_crop"]["images"] == 20  # val, which is the test set
    # Chance is 0.5; the classes differ by eight standard deviations in every pixel.
    assert summary["top1_error"] <= 0.1
    assert summary["best_on_validation"]["validation_top1_error"] <= 0.1
