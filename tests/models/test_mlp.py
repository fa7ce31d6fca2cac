import pytest
import torch
from torch import nn

from cifar.loss import cross_entropy, mean_squared_error
from cifar.models.mlp import MLP

BATCH, CLASSES, LR = 7, 4, 0.3


def softmax_cross_entropy(z, y):
    """The loss and its derivative by the logits: L = -1/b sum log p_y, dL/dz = (p - y) / b."""
    p = torch.exp(z) / torch.exp(z).sum(1, keepdim=True)
    return -(y * torch.log(p)).sum() / BATCH, (p - y) / BATCH


def squared_error(z, y):
    """The loss and its derivative by the logits: L = 1/(b k) sum (z - y)^2, dL/dz = 2 (z - y) / (b k)."""
    return ((z - y) ** 2).sum() / (BATCH * CLASSES), 2 * (z - y) / (BATCH * CLASSES)


@pytest.mark.parametrize("widths", [[], [6], [6, 5]])
@pytest.mark.parametrize(
    ("loss_function", "by_hand"), [(cross_entropy, softmax_cross_entropy), (mean_squared_error, squared_error)]
)
def test_step_equals_the_textbook(widths, loss_function, by_hand):
    torch.manual_seed(0)
    model = MLP((3, 2, 2), CLASSES, widths).double()
    images = torch.randn(BATCH, 3, 2, 2, dtype=torch.float64)
    labels = torch.arange(BATCH) % CLASSES
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = [layer.weight.detach().clone() for layer in layers]
    biases = [layer.bias.detach().clone() for layer in layers]

    # Forward: z = W a + b and a = max(z, 0), the examples as rows.
    activations, preactivations = [images.reshape(BATCH, 12)], []
    for w, b in zip(weights, biases, strict=True):
        preactivations.append(activations[-1] @ w.T + b)
        activations.append(preactivations[-1].clamp(min=0))
    loss, d_z = by_hand(preactivations[-1], torch.eye(CLASSES, dtype=torch.float64)[labels])

    # Backward, the chain rule: dL/dW = sum dL/dz a^T, dL/db = sum dL/dz, dL/da = W^T dL/dz, dL/dz = dL/da where z > 0.
    d_weights, d_biases = [], []
    for i in reversed(range(len(weights))):
        d_weights.insert(0, d_z.T @ activations[i])
        d_biases.insert(0, d_z.sum(0))
        if i > 0:
            d_z = (d_z @ weights[i]) * (preactivations[i - 1] > 0)

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    logits = model(images)
    autograd_loss = loss_function(logits, labels)
    autograd_loss.backward()
    optimizer.step()

    tight = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(logits.detach(), preactivations[-1], **tight)
    torch.testing.assert_close(autograd_loss.detach(), loss, **tight)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(layer.weight.grad, d_weights[i], **tight)
        torch.testing.assert_close(layer.bias.grad, d_biases[i], **tight)
        torch.testing.assert_close(layer.weight.detach(), weights[i] - LR * d_weights[i], **tight)
        torch.testing.assert_close(layer.bias.detach(), biases[i] - LR * d_biases[i], **tight)


@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        ({}, [(64, 3072), (64, 64), (10, 64)]),
        ({"widths": []}, [(10, 3072)]),
        ({"widths": [20, 8, 30]}, [(20, 3072), (8, 20), (30, 8), (10, 30)]),
    ],
)
def test_layers(arguments, shapes):
    model = MLP((3, 32, 32), 10, **arguments)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == shapes
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 1] == [(rows,) for rows, _ in shapes]
