"""A stack of networks against each network by itself: losses, gradients, running statistics, random numbers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from cifar import stack
from cifar.loss import cross_entropy, mean_squared_error
from cifar.models.mlp import MLP
from cifar.models.net import Net
from cifar.models.resnet import ResNet
from cifar.models.speednet import SpeedNet
from cifar.stack import CannotStackError, Stack

N, BATCH = 3, 6
MODELS = {
    "net": (lambda: Net((3, 32, 32), 10), 32),
    "mlp": (lambda: MLP((3, 8, 8), 10, [16]), 8),
    "resnet": (lambda: ResNet((3, 16, 16), 10, [1, 1], 8), 16),
    "speednet": (lambda: SpeedNet((3, 16, 16), 10, [8, 8, 8]), 16),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=10), 32),
}


def batches(side: int, shared: bool, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(BATCH, 3, side, side, generator=generator) for _ in range(N)]
    labels = [torch.randint(10, (BATCH,), generator=generator) for _ in range(N)]
    return ([images[0]] * N, [labels[0]] * N) if shared else (images, labels)


def assert_equal_to_alone(networks, alone, images, targets, losses, returned, parts: int = 1) -> None:
    totals, rights, finite = returned
    assert finite == [True] * N
    for j, reference in enumerate(alone):
        pieces = [
            (reference(part), own) for part, own in zip(images[j].chunk(parts), targets[j].chunk(parts), strict=True)
        ]
        value = sum(losses[j](logits, own) * (len(own) / BATCH) for logits, own in pieces)
        value.backward()
        torch.testing.assert_close(totals[j], value.detach(), rtol=1e-5, atol=1e-6)
        labels = targets[j] if targets[j].ndim == 1 else targets[j].argmax(1)
        assert rights[j] == (torch.cat([logits for logits, _ in pieces]).argmax(1) == labels).sum()
        for (name, ours), theirs in zip(networks[j].named_parameters(), reference.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None, name
            else:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=f"network {j}: {name}")
                assert ours.grad.is_contiguous()
        for (name, ours), theirs in zip(networks[j].named_buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=f"network {j}: {name}")


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no rule for attention: it loops
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_each_network_has_the_gradients_it_would_have_alone(
    name: str, shared: bool, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "TRACE_AFTER", 0 if traced else 10)
    make, side = MODELS[name]
    networks = [make() for _ in range(N)]
    alone = copy.deepcopy(networks)
    images, labels = batches(side, shared)
    returned = Stack(networks).backward(images, labels, [cross_entropy] * N, nullcontext())
    assert_equal_to_alone(networks, alone, images, labels, [cross_entropy] * N, returned)


def test_large_convolutions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "BIG_CONVOLUTION", {"cpu": 0})
    turns = []
    monkeypatch.setattr(
        stack, "in_turn", lambda *arguments, of=stack.in_turn, **k: turns.append(1) or of(*arguments, **k)
    )
    make, side = MODELS["resnet"]
    networks = [make() for _ in range(N)]
    alone = copy.deepcopy(networks)
    images, labels = batches(side, shared=False)
    returned = Stack(networks).backward(images, labels, [cross_entropy] * N, nullcontext())
    assert len(turns) == 6
    assert_equal_to_alone(networks, alone, images, labels, [cross_entropy] * N, returned)


@pytest.mark.parametrize("shared", [True, False])
def test_each_network_has_its_own_loss(shared: bool) -> None:
    networks = [Net((3, 32, 32), 10) for _ in range(N)]
    alone = copy.deepcopy(networks)
    losses = [
        partial(cross_entropy, label_smoothing=0.1),
        mean_squared_error,
        partial(cross_entropy, label_smoothing=0.2),
    ]
    images, labels = batches(32, shared)
    returned = Stack(networks).backward(images, labels, losses, nullcontext())
    assert_equal_to_alone(networks, alone, images, labels, losses, returned)


@pytest.mark.parametrize("traced", [True, False])
def test_mixed_targets_and_parts_of_a_batch(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "TRACE_AFTER", 0 if traced else 10)
    networks = [Net((3, 32, 32), 10) for _ in range(N)]
    alone = copy.deepcopy(networks)
    images, labels = batches(32, shared=False)
    targets = [0.7 * F.one_hot(own, 10).float() + 0.3 * F.one_hot(own.flip(0), 10).float() for own in labels]
    returned = Stack(networks).backward(images, targets, [cross_entropy] * N, nullcontext(), parts=4)
    assert_equal_to_alone(networks, alone, images, targets, [cross_entropy] * N, returned, parts=4)


def test_networks_stay_views_of_the_stack() -> None:
    networks = [nn.BatchNorm1d(4) for _ in range(N)]
    stacked = Stack(networks)
    with torch.no_grad():
        networks[1].weight.fill_(7)
        networks[2].running_mean.fill_(8)
    assert stacked.parameters["weight"][:, 0].tolist() == [1, 7, 1]
    assert stacked.buffers["running_mean"][:, 0].tolist() == [0, 0, 8]
    assert networks[2].state_dict()["running_mean"].tolist() == [8] * 4


def test_a_network_that_diverged_is_told_apart() -> None:
    networks = [Net((3, 32, 32), 10) for _ in range(N)]
    with torch.no_grad():
        networks[1].fc3.weight.fill_(float("inf"))
    images, labels = batches(32, shared=True)
    stacked = Stack(networks)
    for _ in range(stack.TRACE_AFTER + 2):  # traced in the end
        *_, finite = stacked.backward(images, labels, [cross_entropy] * N, nullcontext())
        assert finite == [True, False, True]
    assert all(p.grad.isfinite().all() for j in (0, 2) for p in networks[j].parameters())


def test_a_loss_that_is_no_number_is_seen_with_finite_gradients() -> None:
    networks = [Net((3, 32, 32), 10) for _ in range(N)]
    images, labels = batches(32, shared=True)
    losses = [cross_entropy, lambda logits, targets: cross_entropy(logits, targets) + float("nan"), cross_entropy]
    *_, finite = Stack(networks).backward(images, labels, losses, nullcontext())
    assert finite == [True, False, True]


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_is_each_networks_own(shared: bool) -> None:
    rates = [0.0, 0.3, 0.6]
    networks = [nn.Sequential(nn.Dropout(rate), MLP((3, 8, 8), 10, [32], dropout=rate)) for rate in rates]
    alone = copy.deepcopy(networks)
    images, labels = batches(8, shared)
    states = [torch.Generator().manual_seed(j).get_state() for j in range(N)]

    @contextmanager
    def draw(j: int) -> Iterator[None]:
        torch.set_rng_state(states[j])
        yield
        states[j] = torch.get_rng_state()

    stacked = Stack(networks, draw)
    stacked.rehearse(images[0], nullcontext())
    totals, *_ = stacked.backward(images, labels, [cross_entropy] * N, nullcontext())
    for j, reference in enumerate(alone):
        torch.manual_seed(j)
        value = cross_entropy(reference(images[j]), labels[j])
        value.backward()
        torch.testing.assert_close(totals[j], value.detach())
        for ours, theirs in zip(networks[j].parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_what_cannot_be_stacked_says_so_and_changes_nothing() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(192), nn.Linear(192, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.norm(images.flatten(1))
            return self.out(x + torch.randn_like(x))

    networks = [Noisy() for _ in range(N)]
    before = copy.deepcopy(networks[0].state_dict())
    generator = torch.get_rng_state()
    with pytest.raises(CannotStackError, match="random"):
        Stack(networks).rehearse(torch.randn(4, 3, 8, 8, generator=torch.Generator()), nullcontext())
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in networks[0].state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 2, 3, 4, 6)])
def test_pooling_equals_torchs_ties_included(shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 3, shape).float()  # of four pixels, mostly two or more are the largest
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    pooled = stack._HalvingPool.apply(ours)
    expected = F.max_pool2d(theirs.flatten(0, -4), 2).view_as(pooled)
    assert torch.equal(pooled, expected)
    gradient = torch.randn_like(pooled)
    pooled.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("arguments", "side", "halves"),
    [((2,), 8, True), ((2, 2), 8, True), (((2, 2), (2, 2)), 8, True), ((2,), 7, False), ((3,), 8, False),
     ((2, 1), 8, False), ((2, 2, 1), 8, False), ((2, None, 0, 2), 8, False), ((2, None, 0, 1, False, True), 8, False)],
)  # fmt: skip
def test_only_halving_pools_are_replaced(arguments: tuple, side: int, halves: bool) -> None:
    assert stack._halves(torch.zeros(1, 1, side, side), *arguments) == halves
