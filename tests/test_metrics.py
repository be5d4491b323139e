"""Errors and losses compared with scikit-learn and torch, and the mean over views."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import nn
from torch.nn import functional as F

from fastalex.config import Precision, RuntimeConfig
from fastalex.runtime import choose_runtime
from fastalex.training.metrics import errors, predict


def test_errors_agree_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (500,), generator=generator)
    logits = torch.randn(500, 10, generator=generator) + 1.5 * F.one_hot(labels, 10)
    probabilities = logits.softmax(dim=1)
    result = errors(probabilities, labels)
    for k, error in ((1, result.top1_error), (5, result.top5_error)):
        accuracy = top_k_accuracy_score(labels, probabilities, k=k, labels=range(10))
        assert error == pytest.approx(1 - accuracy, abs=1e-12)
    assert 0 < result.top5_error < result.top1_error < 1
    loss = log_loss(labels, logits.double().softmax(dim=1), labels=range(10))
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.images == 500


def test_ties_are_broken_like_argmax() -> None:
    """The confusion matrix uses argmax, and the two must agree."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randint(0, 3, (500, 20), generator=generator) / 30
    labels = torch.randint(0, 20, (500,), generator=generator)
    result = errors(probabilities, labels)
    assert result.top1_error == pytest.approx(1 - (probabilities.argmax(1) == labels).double().mean().item())
    first = errors(torch.full((1, 20), 0.05), torch.tensor([0]))
    assert (first.top1_error, first.top5_error) == (0.0, 0.0)


def test_fewer_than_five_classes() -> None:
    result = errors(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]), torch.tensor([1, 2]))
    assert result.top1_error == 0.5
    assert result.top5_error == 0.0


def test_zero_probability_gives_a_finite_loss_and_nan_stays_nan() -> None:
    certain = errors(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert 80 < certain.loss < 90  # -ln of the smallest normal float
    assert torch.tensor(errors(torch.full((1, 2), torch.nan), torch.tensor([1])).loss).isnan()


def test_predict_averages_the_views_of_an_image_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.5))
    images = torch.randn(6, 3, 2, 2)  # two images of three views
    labels = torch.tensor([3, 0])
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32))
    probabilities, returned = predict(network, [(images, labels)], runtime)
    expected = torch.stack([network[1](images[i : i + 3].flatten(1)).softmax(1).mean(0) for i in (0, 3)])
    torch.testing.assert_close(probabilities, expected)
    assert torch.equal(returned, labels)
    assert network.training  # as before


def test_the_softmax_of_bf16_logits_is_computed_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 100, generator=generator).bfloat16()
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.bf16))
    probabilities, _ = predict(nn.Identity(), [(logits, torch.zeros(8, dtype=torch.int64))], runtime)
    exact = logits.double().softmax(dim=1)
    assert (logits.softmax(dim=1).double() / exact - 1).abs().max() > 1e-3
    torch.testing.assert_close(probabilities.double(), exact, rtol=1e-5, atol=0)
