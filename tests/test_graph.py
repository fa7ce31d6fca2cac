"""Recorded steps against plain ones. No GPU is needed: a tape of operations on the CPU stands in for a CUDA graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar import graph
from cifar.data.batches import Batches, Normalize
from cifar.data.dataset import Split
from cifar.graph import WARM_UP, Graphs
from cifar.loss import cross_entropy
from cifar.models.mlp import MLP
from cifar.models.speednet import SpeedNet
from cifar.optimizer import adamw, muon, sgd
from cifar.schedule import cosine
from cifar.trainer import NonFiniteError, Trainer


class Tape(TorchDispatchMode):
    """Records operations with the very tensors and numbers they were given, as a CUDA graph does, and can repeat them.

    As there, recording changes nothing that was there before, a number from Python stays what it was, results come to lie
    where they lay, and reading a number back is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for given in tree_leaves((arguments, keywords)):  # all: BatchNorm does not declare what it changes
            if isinstance(given, Tensor) and given.data_ptr() not in self.before:
                self.before[given.data_ptr()] = given, given.clone()
        result = operation(*arguments, **keywords)
        self.calls.append((operation, arguments, keywords, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, value in reversed(self.before.values()):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for operation, arguments, keywords, result in self.calls:
            again = operation(*arguments, **keywords)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


tapes: list[Tape] = []


def capture(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    tape = Tape()
    with tape:
        result = function()
    tape.undo()
    tapes.append(tape)
    return result, tape.replay


@pytest.fixture(autouse=True)
def on_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "capture", capture)
    tapes.clear()


def split(n: int, size: int = 8) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.randint(0, 10, (n,), generator=generator))


def fit(
    trainer: Trainer, model: Callable[[], nn.Module], optimizer: Callable, n: int = 44, size: int = 8
) -> tuple[Any, list[dict]]:
    torch.manual_seed(0)
    network = model().to(trainer.torch_device)
    batches = Batches(
        split(n, size).to(trainer.torch_device), Normalize((0.5,) * 3, (0.5,) * 3, trainer.torch_device), 8
    )
    state = trainer.start(network, optimizer(network.parameters()), {"classes": list("0123456789")})
    rows: list[dict] = []
    schedule = cosine(trainer.epochs * len(batches), warmup=0.2)
    trainer.fit(state, cross_entropy, schedule, batches, None, rows.append, lambda state, is_best: None)
    return state, rows


def mlp() -> nn.Module:
    return MLP((3, 8, 8), 10, widths=[16])


# Rates on the device are float32, and Adam goes on computing with them in float64: alone there is rounding to be seen.
ROUNDED = {"adamw, clipping"}
RECIPES: dict[str, tuple[dict[str, Any], Callable[[], nn.Module], Callable, int]] = {
    "sgd": ({}, mlp, lambda p: sgd(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), 8),
    "no momentum": ({}, mlp, lambda p: sgd(p, lr=0.1, momentum=0.0), 8),
    "adamw, clipping": ({"clip_norm": 0.5}, mlp, lambda p: adamw(p, lr=0.01), 8),
    "averaged weights": ({"ema_decay": 0.8}, mlp, lambda p: sgd(p, lr=0.1), 8),
    "bf16": ({"precision": "bf16"}, mlp, lambda p: sgd(p, lr=0.1), 8),
    "muon, BatchNorm, parts": (
        {"accumulate": 2, "channels_last": True, "on_nonfinite": "skip"},
        lambda: SpeedNet((3, 16, 16), 10, widths=[4, 6]),
        lambda p: muon(p, lr=0.1, normalize=True),
        16,
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recorded_steps_are_the_plain_ones(name: str) -> None:
    settings, model, optimizer, size = RECIPES[name]
    trainers = [Trainer(epochs=5, log_every=2, device="cpu", **settings) for _ in range(2)]
    Graphs(trainers[1])
    (plain, plain_rows), (recorded, rows) = (fit(trainer, model, optimizer, size=size) for trainer in trainers)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if name in ROUNDED else {"rtol": 0, "atol": 0}
    assert len(tapes) == 4  # two halves of a step for full batches of 8, and for each epoch's last one of 4
    for (key, expected), value in zip(
        plain.state_dict()["model"].items(), recorded.state_dict()["model"].values(), strict=True
    ):
        torch.testing.assert_close(value, expected, **tolerance, msg=lambda shown, key=key: f"{key}: {shown}")
    for left, right in zip(
        tree_leaves(plain.optimizer.state_dict()), tree_leaves(recorded.optimizer.state_dict()), strict=True
    ):
        torch.testing.assert_close(right, left, **tolerance)
    if plain.ema is not None:
        for expected, value in zip(plain.ema.parameters(), recorded.ema.parameters(), strict=True):
            assert torch.equal(expected, value)
    times = ("seconds", "images_per_second")
    for row, expected_row in zip(rows, plain_rows, strict=True):
        values = {key: value for key, value in row.items() if key not in times}
        assert values == pytest.approx({key: expected_row[key] for key in values}, rel=tolerance["rtol"], abs=0)
    assert all(isinstance(group["lr"], float) for group in recorded.optimizer.param_groups)  # as checkpoints keep it


def test_a_trainer_records_anew_for_another_run() -> None:
    trainer = Trainer(epochs=3, device="cpu")
    graphs = Graphs(trainer)
    for _ in range(2):
        state, _ = fit(trainer, mlp, lambda p: sgd(p, lr=0.1, momentum=0.9), n=40)
        assert graphs._seen.total() == state.step == 15
    assert len(tapes) == 4


def test_a_rate_that_was_recorded_as_a_number_would_show() -> None:
    """What the comparison above is worth: a graph whose rates are never filled in again ends elsewhere."""
    trainers = [Trainer(epochs=5, device="cpu") for _ in range(2)]
    graphs = Graphs(trainers[1])

    def stale(state: Any) -> None:
        graphs._update(state) if graphs._current is None else graphs._current.update()

    trainers[1].update = stale
    (plain, _), (other, _) = (fit(trainer, mlp, lambda p: sgd(p, lr=0.1)) for trainer in trainers)
    assert not torch.equal(plain.parameters[0], other.parameters[0])


def test_what_is_not_finite_stops_at_the_same_step_with_the_same_weights() -> None:
    trainers = [Trainer(epochs=40, device="cpu") for _ in range(2)]
    Graphs(trainers[1])
    ends = []
    for trainer in trainers:
        states: list[Any] = []
        start = trainer.start
        trainer.start = lambda *given, start=start, states=states: states.append(start(*given)) or states[0]
        with pytest.raises(NonFiniteError) as raised:
            fit(trainer, mlp, lambda p: sgd(p, lr=1e4))
        ends.append((states[0].step, str(raised.value), [p.detach().clone() for p in states[0].parameters]))
    assert ends[0][0] > 2 * WARM_UP
    assert ends[0][:2] == ends[1][:2]
    assert all(map(torch.equal, ends[0][2], ends[1][2]))


def test_a_loss_that_waits_for_the_device_cannot_be_recorded() -> None:
    trainer = Trainer(device="cpu")
    Graphs(trainer)
    model = mlp()
    state = trainer.start(model, sgd(model.parameters()), {})

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        value = cross_entropy(logits, targets)
        return value * (2 if value.item() > 1e9 else 1)

    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    for _ in range(WARM_UP):
        assert trainer.step(state, model, loss, images, labels)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        trainer.step(state, model, loss, images, labels)


def test_only_on_cuda() -> None:
    with pytest.raises(ValueError, match=r"^trainer\.cuda_graph=true: needs a CUDA device; this run's is cpu$"):
        Trainer(device="cpu", cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RECIPES)
def test_graphs_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    settings, model, optimizer, size = RECIPES[name]
    plain, recorded = (
        fit(Trainer(epochs=5, device="cuda", cuda_graph=on, **settings), model, optimizer, size=size)[0]
        for on in (False, True)
    )
    for expected, value in zip(plain.parameters, recorded.parameters, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
