"""The plan of an epoch: each image once, distributions, ranks and seeds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from fastalex.config import Flip
from fastalex.data.sampling import (
    EpochPlan,
    center_offset,
    evaluation_plan,
    training_plan,
    training_samples,
)
from fastalex.errors import ConfigError


def plan(num_images: int = 24, **changes: object) -> EpochPlan:
    options = {"flip": Flip.random, "max_offset": 32, "seed": 3, "epoch": 0, "batch_size": 4, **changes}
    return training_plan(num_images, **options)  # type: ignore[arg-type]


STEPS = [[0.2, 0.2, 0.2], [0.1, 0.0, -0.1], [0.01, -0.02, 0.01]]


def same(a: EpochPlan, b: EpochPlan) -> bool:
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in ("indices", "offsets", "flips"))


@pytest.mark.parametrize("flip", [Flip.none, Flip.random])
def test_every_image_once(flip: Flip) -> None:
    assert sorted(plan(flip=flip).indices.tolist()) == list(range(24))


def test_flip_both_uses_each_image_once_each_way() -> None:
    both = plan(flip=Flip.both)
    assert Counter(zip(both.indices.tolist(), both.flips.tolist(), strict=True)) == {
        (image, flip): 1 for image in range(24) for flip in (False, True)
    }


def test_alternate_mirrors_each_image_every_other_epoch() -> None:
    mirrored = []
    for epoch in range(3):
        drawn = plan(1000, flip=Flip.alternate, epoch=epoch, batch_size=1)
        flips = torch.empty(1000, dtype=torch.bool)
        flips[drawn.indices] = drawn.flips
        mirrored.append(flips)
    assert torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0])
    assert abs(int(mirrored[0].sum()) - 500) < 5 * 15.8  # Binomial(1000, 1/2)


def test_types_and_ranges() -> None:
    drawn = plan(5000, max_offset=3, batch_size=1)
    assert (drawn.indices.dtype, drawn.offsets.dtype, drawn.flips.dtype) == (
        torch.int64,
        torch.int32,
        torch.bool,
    )
    places = Counter(map(tuple, drawn.offsets.tolist()))
    assert set(places) == {(top, left) for top in range(4) for left in range(4)}
    # Binomial(5000, 1/16) and Binomial(5000, 1/2), within five standard deviations.
    assert all(abs(count - 5000 / 16) < 5 * 17.2 for count in places.values())
    assert abs(int(drawn.flips.sum()) - 2500) < 5 * 35.4
    assert not plan(flip=Flip.none).flips.any()
    assert not plan(max_offset=0).offsets.any()


def test_crops_at_one_place_leave_order_and_flips_as_they_are() -> None:
    drawn, fixed = plan(), plan(offset=16)
    assert (fixed.offsets == 16).all()
    assert (drawn.offsets != 16).any()
    assert torch.equal(fixed.indices, drawn.indices)
    assert torch.equal(fixed.flips, drawn.flips)


@pytest.mark.parametrize("flip", list(Flip))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_epoch(flip: Flip, world_size: int) -> None:
    """Disjoint, of equal length, in whole batches; the dropped samples are fewer than one more batch."""
    num_images, batch_size = 50, 4
    samples = num_images * (2 if flip is Flip.both else 1)
    ranks = [
        plan(num_images, flip=flip, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    expected = training_samples(num_images, flip=flip, batch_size=batch_size, world_size=world_size)
    assert {len(rank) for rank in ranks} == {expected}
    assert expected % batch_size == 0
    assert 0 <= samples - expected * world_size < batch_size * world_size
    seen = Counter(
        (image, flipped) if flip is Flip.both else image
        for rank in ranks
        for image, flipped in zip(rank.indices.tolist(), rank.flips.tolist(), strict=True)
    )
    assert set(seen.values()) == {1}


def test_a_step_has_the_same_samples_on_any_number_of_ranks() -> None:
    alone = plan(48, batch_size=12)
    shared = [plan(48, batch_size=4, rank=rank, world_size=3) for rank in range(3)]
    for step in range(4):
        together = torch.cat([rank.batch(step, 4).indices for rank in shared])
        assert sorted(together.tolist()) == sorted(alone.batch(step, 12).indices.tolist())


def test_seed_and_epoch_decide() -> None:
    assert same(plan(), plan())
    assert same(plan(seed=-1), plan(seed=-1))
    drawn = [plan(500, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            for field in ("indices", "offsets", "flips"):
                assert not torch.equal(getattr(one, field), getattr(other, field))


def by_image(drawn: EpochPlan) -> dict[tuple[int, bool], tuple[float, ...]]:
    assert drawn.colors is not None
    samples = zip(drawn.indices.tolist(), drawn.flips.tolist(), drawn.colors.tolist(), strict=True)
    return {(image, flip): tuple(color) for image, flip, color in samples}


def test_no_colours_without_steps() -> None:
    assert plan().colors is None
    assert plan().batch(0, 2).colors is None


def test_colours_change_nothing_else() -> None:
    assert same(plan(), plan(color_steps=STEPS))


def test_colours_have_the_covariance_of_the_paper() -> None:
    """The factors are N(0, 0.1) and independent."""
    count = 40_000
    colors = plan(count, color_steps=STEPS, batch_size=1).colors
    assert colors is not None
    assert colors.dtype == torch.float32
    steps = torch.tensor(STEPS, dtype=torch.float64)
    factors = torch.linalg.solve(steps.T, colors.double().T).T / 0.1
    # Of N(0, 1), a mean, a variance and a covariance deviate by 1, sqrt 2 and 1, over the root of the count.
    assert factors.mean(0).abs().max() < 5 / count**0.5
    assert (factors.T @ factors / count - torch.eye(3)).abs().max() < 5 * (2 / count) ** 0.5


@pytest.mark.parametrize("flip", [Flip.random, Flip.both])
def test_colours_depend_on_image_seed_and_epoch_alone(flip: Flip) -> None:
    options = {"color_steps": STEPS, "flip": flip}
    alone = by_image(plan(48, batch_size=12, **options))
    shared = [plan(48, batch_size=4, rank=rank, world_size=3, **options) for rank in range(3)]
    together = {key: color for each in shared for key, color in by_image(each).items()}
    assert together == alone
    assert len(set(alone.values())) == len(alone)  # a draw for each sample
    for other in (plan(48, epoch=1, **options), plan(48, seed=4, **options)):
        assert not set(by_image(other).values()) & set(alone.values())


def test_batches_have_their_rows_of_colours() -> None:
    drawn = plan(color_steps=STEPS)
    assert drawn.colors is not None
    batch = drawn.batch(1, 4)
    assert batch.colors is not None
    assert torch.equal(batch.colors, drawn.colors[4:8])
    assert torch.equal(torch.cat([drawn.batch(i, 4).colors for i in range(6)]), drawn.colors)


def test_the_dropped_images_change() -> None:
    dropped = [set(range(10)) - set(plan(10, epoch=epoch).indices.tolist()) for epoch in range(20)]
    assert all(len(images) == 2 for images in dropped)
    assert len(set().union(*dropped)) > 5


def test_batches_are_slices() -> None:
    drawn = plan(10, batch_size=5)
    assert [len(drawn.batch(number, 4)) for number in range(3)] == [4, 4, 2]
    assert torch.equal(drawn.batch(1, 4).offsets, drawn.offsets[4:8])


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size=25 .* train.batch_size=24 or less"):
        plan(24, batch_size=25)
    with pytest.raises(ConfigError, match=r"train.batch_size=32 .* train.batch_size=24 or less"):
        plan(24, batch_size=8, world_size=4)
    assert len(plan(24, batch_size=48, flip=Flip.both)) == 48


@pytest.mark.parametrize("num_images", [0, 1, 7, 12])
@pytest.mark.parametrize("world_size", [1, 2, 5, 13])
def test_evaluation_sees_each_image_once(num_images: int, world_size: int) -> None:
    ranks = [evaluation_plan(num_images, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(torch.cat(ranks).tolist()) == list(range(num_images))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("resize", [224, 225, 226, 227, 228, 231])
def test_center_is_torchvisions(resize: int) -> None:
    rows = torch.arange(resize).expand(1, resize, resize)
    assert int(F.center_crop(rows, [224, 224])[0, 0, 0]) == center_offset(resize, 224)
