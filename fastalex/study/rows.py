"""The rows of the study's table: title, published errors, and the seeds that each is run with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Attributes:
        title: what it is; of an ablation, what it changes.
        published: the study's top-1 and top-5 error, ten-crop, where it has this row.
        figure: the study's loss figure to draw anew.
        seeds: of the generator, a run each.
        base: the row that this one changes one thing of, in the comparison of ablations.
    """

    title: str
    published: tuple[float, float] | None = None
    figure: str = ""
    seeds: tuple[int, ...] = (0,)
    base: str = ""


BASE = "ablation_base"


ROWS = {
    "alexnet": Row("AlexNet", (0.1397, 0.0072), "losses_alexnet_without_init.png"),
    "alexnet_112": Row("AlexNet at half the crop"),
    "alexnet_paper_init": Row(
        "AlexNet, the paper's initialisation", (0.9, 0.5), "losses_alexnet_with_init.png"
    ),
    "alexnet_paper_init_mended": Row("AlexNet, the paper's initialisation, mended"),
    "resnet18": Row("ResNet-18", (0.0970, 0.0044), "losses_resnet18.png"),
    "alexnet_bn": Row("AlexNet, batch normalisation for LRN"),
    "mobilenet_v3_small": Row("MobileNetV3-Small"),
    "alexnet_study_recipe": Row("AlexNet, the first epochs of the study's recipe"),
    BASE: Row("AlexNet at a smaller crop", seeds=(0, 1)),
    "ablation_no_lrn": Row("without LRN", seeds=(0, 1), base=BASE),
    "ablation_non_overlapping_pool": Row("non-overlapping pooling", seeds=(0, 1), base=BASE),
    "ablation_no_dropout": Row("without dropout", seeds=(0, 1), base=BASE),
}


def run_folder(results: Path, name: str, seed: int) -> Path:
    """Return where a row's run with this seed lies."""
    folder = results / name
    return folder / f"seed_{seed}" if len(ROWS[name].seeds) > 1 else folder
