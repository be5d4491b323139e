"""The rows of the study's table: title, published errors, and the seeds that each is run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastalex.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Attributes:
        title: what it is; of an ablation, what it changes.
        published: the study's top-1 and top-5 error, ten-crop, where it has this row.
        figure: the study's loss figure to draw anew.
        seeds: of the generator, a run each.
        base: the row that this one changes one thing of, in the comparison of ablations.
        group: the name by which ``rows=`` selects this row together with others; empty for none.
    """

    title: str
    published: tuple[float, float] | None = None
    figure: str = ""
    seeds: tuple[int, ...] = (0,)
    base: str = ""
    group: str = ""


def _claim(title: str) -> Row:
    """A row of the claims: :mod:`fastalex.study.claims`."""
    return Row(title, seeds=SEEDS, group=CLAIMS)


def _short(change: str) -> Row:
    """A row of short runs that only the claims need: a change of :data:`BASE`."""
    return Row(change, seeds=SEEDS, base=BASE, group=CLAIMS)


CLAIMS = "claims"
SEEDS = (0, 1, 2)  # of a row whose difference from another has an interval
TENTH = "AlexNet on a tenth of the images"
SHORT = "ablation_"  # what the names of short runs on all images begin with
BASE = f"{SHORT}base"


ROWS = {
    "alexnet": Row("AlexNet", (0.1397, 0.0072), "losses_alexnet_without_init.png"),
    "alexnet_fast": Row("AlexNet by the default settings", (0.1397, 0.0072)),
    "alexnet_long": Row("AlexNet with Muon, for twice the default's epochs", (0.1397, 0.0072)),
    "alexnet_112": Row("AlexNet at half the crop"),
    "alexnet_paper_init": Row(
        "AlexNet, the paper's initialisation", (0.9, 0.5), "losses_alexnet_with_init.png"
    ),
    "alexnet_paper_init_mended": Row("AlexNet, the paper's initialisation, corrected"),
    "resnet18": Row("ResNet-18", (0.0970, 0.0044), "losses_resnet18.png"),
    "alexnet_bn": Row("AlexNet, batch normalisation for LRN"),
    "mobilenet_v3_small": Row("MobileNetV3-Small"),
    "alexnet_study_recipe": Row("AlexNet, the first epochs of the study's recipe"),
    BASE: Row("AlexNet at a smaller crop", seeds=SEEDS),
    "ablation_no_lrn": Row("without LRN", seeds=SEEDS, base=BASE),
    "ablation_non_overlapping_pool": Row("non-overlapping pooling", seeds=SEEDS, base=BASE),
    "ablation_no_dropout": Row("without dropout", seeds=SEEDS, base=BASE),
    "alexnet_tiny": Row("AlexNet on Tiny ImageNet", group="tiny_imagenet"),
    "claim_base": _claim(TENTH),
    "claim_no_lrn": _claim(f"{TENTH}, without LRN"),
    "claim_high_rate": _claim(f"{TENTH}, at three times the rate"),
    "claim_high_rate_no_lrn": _claim(f"{TENTH}, at three times the rate, without LRN"),
    "claim_non_overlapping_pool": _claim(f"{TENTH}, with 2x2 pooling"),
    "claim_no_dropout": _claim(f"{TENTH}, without dropout"),
    "claim_no_augmentation": _claim(f"{TENTH}, without crops and flips"),
    "claim_no_random_crop": _claim(f"{TENTH}, without random crops"),
    "claim_no_flip": _claim(f"{TENTH}, without flips"),
    "claim_pca_color": _claim(f"{TENTH}, with PCA colour"),
    "claim_two_towers": _claim(f"{TENTH}, in two towers"),
    "claim_batch_norm": _claim(f"{TENTH}, with batch normalisation for LRN"),
    "claim_no_weight_decay": _claim(f"{TENTH}, without weight decay"),
    "claim_default_init": _claim(f"{TENTH}, from PyTorch's initialisation"),
    "claim_paper_init": _claim(f"{TENTH}, from the paper's initialisation"),
    "claim_resnet18": _claim("ResNet-18 on the same images"),
    "claim_relu": _claim("a four-layer network with ReLU"),
    "claim_tanh": _claim("a four-layer network with tanh"),
    "ablation_no_weight_decay": _short("without weight decay"),
    "ablation_high_rate": _short("at three times the rate"),
    "ablation_high_rate_no_lrn": _short("at three times the rate, without LRN"),
}


def select(names: Sequence[str]) -> list[str]:
    """Return the names of rows, each once.

    Args:
        names: of rows and of groups; none for the rows that are in no group.

    Raises:
        ConfigError: a name is neither.
    """
    groups: dict[str, list[str]] = {}
    for name, row in ROWS.items():
        groups.setdefault(row.group, []).append(name)
    chosen: list[str] = []
    for name in names or [""]:
        if name not in ROWS and name not in groups:
            choices = ", ".join(dict.fromkeys(row.group or one for one, row in ROWS.items()))
            raise ConfigError(
                f"rows={name}: there is no such row; choose from {choices}, or a file of configs/row/"
            )
        chosen += [name] if name in ROWS else groups[name]
    return list(dict.fromkeys(chosen))


def run_folder(results: Path, name: str, seed: int) -> Path:
    """Return where a row's run with this seed lies."""
    folder = results / name
    return folder / f"seed_{seed}" if len(ROWS[name].seeds) > 1 else folder
