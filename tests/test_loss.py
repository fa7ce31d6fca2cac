import math
from collections.abc import Callable

import pytest
import torch

from cifar.loss import cross_entropy, mean_squared_error

LOGITS = [[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]]
LABELS = [2, 0]
PROBABILITIES = [[0.2, 0.0, 0.8], [0.5, 0.25, 0.25]]


def one_hot(label: int) -> list[float]:
    return [float(k == label) for k in range(3)]


@pytest.mark.parametrize("targets", [[one_hot(label) for label in LABELS], PROBABILITIES])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_formula(targets: list[list[float]], smoothing: float) -> None:
    total = 0.0
    for z, q in zip(LOGITS, targets, strict=True):
        normaliser = math.log(sum(math.exp(zk) for zk in z))
        total -= sum(((1 - smoothing) * qk + smoothing / 3) * (zk - normaliser) for zk, qk in zip(z, q, strict=True))
    loss = cross_entropy(torch.tensor(LOGITS), torch.tensor(targets), label_smoothing=smoothing)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(total / 2, abs=1e-6)


@pytest.mark.parametrize("targets", [[one_hot(label) for label in LABELS], PROBABILITIES])
def test_mean_squared_error_is_the_formula(targets: list[list[float]]) -> None:
    squares = [(zk - qk) ** 2 for z, q in zip(LOGITS, targets, strict=True) for zk, qk in zip(z, q, strict=True)]
    loss = mean_squared_error(torch.tensor(LOGITS), torch.tensor(targets))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(squares) / 6, abs=1e-6)
    assert loss == torch.nn.MSELoss()(torch.tensor(LOGITS), torch.tensor(targets))


@pytest.mark.parametrize("loss", [cross_entropy, mean_squared_error])
def test_labels_count_as_one_hot_targets(loss: Callable[..., torch.Tensor]) -> None:
    hot = torch.tensor([one_hot(label) for label in LABELS])
    torch.testing.assert_close(loss(torch.tensor(LOGITS), torch.tensor(LABELS)), loss(torch.tensor(LOGITS), hot))


def test_gradients_are_the_formulas() -> None:
    logits, labels = torch.tensor(LOGITS, requires_grad=True), torch.tensor(LABELS)
    hot = torch.tensor([one_hot(label) for label in LABELS])
    (of_entropy,) = torch.autograd.grad(cross_entropy(logits, labels), logits)
    (of_squares,) = torch.autograd.grad(mean_squared_error(logits, labels), logits)
    torch.testing.assert_close(of_entropy, (logits.detach().exp() / logits.detach().exp().sum(1, True) - hot) / 2)
    torch.testing.assert_close(of_squares, 2 * (logits.detach() - hot) / 6)
