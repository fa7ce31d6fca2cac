import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from cifar import checkpoint
from cifar.config import CONF
from cifar.data.batches import Batches, Normalize
from cifar.data.dataset import Split
from cifar.loss import cross_entropy
from cifar.models.mlp import MLP
from cifar.models.net import Net
from cifar.trainer import NonFiniteError, Trainer, accuracy, count_correct, pick_device

CLASSES = [str(label) for label in range(10)]


def images(n: int, size: int = 32, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    return Split(
        torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (n,), generator=generator),
    )


def batches(split: Split, batch_size: int = 8, **settings) -> Batches:
    return Batches(split, Normalize((0.5,) * 3, (0.5,) * 3), batch_size, **settings)


def fit(trainer: Trainer, model: nn.Module, split: Split, val: Split | None = None, lr: float = 0.05, **optimizer):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **optimizer)
    state = trainer.start(model, optimizer, {"classes": CLASSES, "image_shape": [3, 8, 8], "steps": 0})
    rows: list[dict] = []
    saved: list[tuple[int, bool]] = []
    trainer.fit(
        state,
        cross_entropy,
        lambda step: 1.0,
        batches(split),
        val and batches(val),
        rows.append,
        lambda state, is_best: saved.append((state.step, is_best)),
    )
    return state, rows, saved


def test_golden_step_of_the_tutorial() -> None:
    """One step of `experiment=tutorial`, composed and built as the entry does, against the tutorial's own lines in plain torch."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides=["experiment=tutorial", "trainer.device=cpu"])
    assert (cfg.data.batch_size, cfg.data.val_size, cfg.trainer.epochs, cfg.trainer.log_every) == (4, 0, 2, 2000)
    split = images(4)

    torch.manual_seed(cfg.seed)
    trainer = instantiate(cfg.trainer)
    model = instantiate(cfg.model, _partial_=True)((3, 32, 32), 10)
    optimizer = instantiate(cfg.optimizer, _partial_=True)(model.parameters())
    schedule = instantiate(cfg.schedule, _partial_=True)(25_000)
    state = trainer.start(model, optimizer, {})
    training = Batches(split, Normalize(tuple(cfg.data.mean), tuple(cfg.data.std)), cfg.data.batch_size, seed=cfg.seed)
    inputs, targets = next(iter(training.epoch(0)))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * schedule(0)
    trainer.step(state, model, instantiate(cfg.loss, _partial_=True), inputs, targets)

    # The tutorial, https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html, written out.
    torch.manual_seed(cfg.seed)
    conv1, conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
    fc1, fc2, fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)
    layers = nn.ModuleDict({"conv1": conv1, "conv2": conv2, "fc1": fc1, "fc2": fc2, "fc3": fc3})
    order = training.order(0)
    x = (split.images[order].float() / 255 - 0.5) / 0.5
    x = F.max_pool2d(F.relu(conv1(x)), 2)
    x = F.max_pool2d(F.relu(conv2(x)), 2)
    x = torch.flatten(x, 1)
    outputs = fc3(F.relu(fc2(F.relu(fc1(x)))))
    log_probabilities = outputs - outputs.logsumexp(1, keepdim=True)
    loss = -log_probabilities[range(4), split.labels[order]].mean()
    before = {name: parameter.detach().clone() for name, parameter in layers.named_parameters()}
    loss.backward()

    assert state.window.loss.item() / 4 == pytest.approx(loss.item(), rel=1e-6), "the loss differs from cross-entropy"
    for name, reference in layers.named_parameters():
        ours = dict(model.named_parameters())[name]
        torch.testing.assert_close(
            ours.grad, reference.grad, msg=f"the gradient of {name} differs", rtol=1e-5, atol=1e-7
        )
        # SGD's first step: the momentum buffer starts as the gradient itself.
        updated = before[name] - 0.001 * reference.grad
        torch.testing.assert_close(ours.detach(), updated, msg=f"the updated {name} differs", rtol=1e-6, atol=1e-8)

    # A second step on the same batch shows the momentum: v = 0.9 v + g, w = w - lr v.
    first = {name: parameter.grad.clone() for name, parameter in layers.named_parameters()}
    layers.load_state_dict(model.state_dict())
    trainer.step(state, model, instantiate(cfg.loss, _partial_=True), inputs, targets)
    layers.zero_grad()
    x = F.max_pool2d(F.relu(conv2(F.max_pool2d(F.relu(conv1(inputs)), 2))), 2).flatten(1)
    before = {name: parameter.detach().clone() for name, parameter in layers.named_parameters()}
    F.nll_loss(fc3(F.relu(fc2(F.relu(fc1(x))))).log_softmax(1), targets).backward()
    for name, reference in layers.named_parameters():
        updated = before[name] - 0.001 * (0.9 * first[name] + reference.grad)
        ours = dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(
            ours, updated, msg=f"{name} after two steps differs: momentum?", rtol=1e-6, atol=1e-8
        )


def test_fit_equals_a_plain_loop() -> None:
    split, val = images(20, 8), images(12, 8, seed=1)
    torch.manual_seed(3)
    state, rows, saved = fit(Trainer(epochs=3, log_every=1, device="cpu"), MLP((3, 8, 8), 10), split, val, momentum=0.9)

    torch.manual_seed(3)
    model = MLP((3, 8, 8), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, best, training = [], -1.0, batches(split)
    for epoch in range(3):
        order = training.order(epoch)
        for start in range(0, 20, 8):
            index = order[start : start + 8]
            optimizer.zero_grad()
            loss = F.cross_entropy(model((split.images[index].float() / 255 - 0.5) / 0.5), split.labels[index])
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
        logits = model((val.images.float() / 255 - 0.5) / 0.5)
        row = next(row for row in rows if row["epoch"] == epoch + 1 and "val/loss" in row)
        assert row["val/loss"] == pytest.approx(F.cross_entropy(logits, val.labels).item(), rel=1e-5)
        assert row["val/accuracy"] == (logits.argmax(1) == val.labels).double().mean().item()
        assert saved[epoch] == (3 * (epoch + 1), row["val/accuracy"] > best)
        best = max(best, row["val/accuracy"])
    assert state.best["value"] == best
    for ours, reference in zip(state.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert (state.epoch, state.step, state.images, state.rows) == (3, 9, 60, 9)


def test_running_loss_is_the_mean_since_the_last_line() -> None:
    split = images(40, 8)
    model = MLP((3, 8, 8), 10)
    _, every, _ = fit(Trainer(epochs=1, log_every=1, device="cpu"), model, split, lr=0.0)
    _, second, _ = fit(Trainer(epochs=1, log_every=2, device="cpu"), model, split, lr=0.0)
    losses = [row["train/loss"] for row in every]
    assert [row["step"] for row in second] == [2, 4, 5]
    assert [row["train/loss"] for row in second] == pytest.approx(
        [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    )


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulate_takes_the_same_step(parts: int) -> None:
    split = images(8, 8)
    torch.manual_seed(0)
    whole, rows, _ = fit(Trainer(epochs=1, device="cpu"), MLP((3, 8, 8), 10), split)
    torch.manual_seed(0)
    in_parts, part_rows, _ = fit(Trainer(epochs=1, device="cpu", accumulate=parts), MLP((3, 8, 8), 10), split)
    for ours, reference in zip(in_parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)
    assert part_rows[0]["train/loss"] == pytest.approx(rows[0]["train/loss"], rel=1e-6)


def test_clip_norm_scales_the_gradient_to_the_norm() -> None:
    split = images(8, 8)
    torch.manual_seed(0)
    model = MLP((3, 8, 8), 10)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state, _, _ = fit(Trainer(epochs=1, device="cpu", clip_norm=0.01), model, split, lr=1.0)
    change = torch.cat([(new - old).flatten() for new, old in zip(state.model.parameters(), before, strict=True)])
    assert change.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_ema_is_the_average_of_the_weights_and_what_is_evaluated() -> None:
    split = images(24, 8)
    torch.manual_seed(0)
    trajectory = []
    model = MLP((3, 8, 8), 10)
    trainer = Trainer(epochs=1, device="cpu", ema_decay=0.8)
    original = trainer.step

    def step(*arguments) -> bool:
        finite = original(*arguments)
        trajectory.append([parameter.detach().clone() for parameter in model.parameters()])
        return finite

    trainer.step = step  # type: ignore[method-assign]
    state, _, _ = fit(trainer, model, split)
    assert len(trajectory) == 3
    average = trajectory[0]
    for weights in trajectory[1:]:
        average = [0.8 * mean + 0.2 * weight for mean, weight in zip(average, weights, strict=True)]
    assert state.evaluated is not model
    for ours, reference in zip(state.evaluated.parameters(), average, strict=True):
        torch.testing.assert_close(ours, reference)


def test_schedule_multiplies_each_groups_learning_rate() -> None:
    split = images(16, 8)
    torch.manual_seed(0)
    model = MLP((3, 8, 8), 10, widths=[])
    weight, bias = model.parameters()
    first_weight, first_bias = weight.detach().clone(), bias.detach().clone()
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.0}])
    trainer = Trainer(epochs=1, device="cpu", log_every=1)
    state = trainer.start(model, optimizer, {})
    rows: list[dict] = []
    factors = [0.5, 0.0]
    trainer.fit(state, cross_entropy, factors.__getitem__, batches(split), None, rows.append, lambda *_: None)
    assert [row["lr"] for row in rows] == [0.05, 0.0]
    index = batches(split).order(0)[:8]
    x = ((split.images[index].float() / 255 - 0.5) / 0.5).flatten(1)
    p = (x @ first_weight.T + first_bias).softmax(1)
    gradient = (p - F.one_hot(split.labels[index], 10)).T @ x / 8
    torch.testing.assert_close(weight.detach(), first_weight - 0.05 * gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(bias.detach(), first_bias)


def test_bf16_stays_near_fp32() -> None:
    split = images(32, 32)
    torch.manual_seed(0)
    _, exact, _ = fit(Trainer(epochs=1, device="cpu"), Net((3, 32, 32), 10), split)
    torch.manual_seed(0)
    _, mixed, _ = fit(Trainer(epochs=1, device="cpu", precision="bf16"), Net((3, 32, 32), 10), split)
    assert mixed[0]["train/loss"] == pytest.approx(exact[0]["train/loss"], rel=0.02)
    assert mixed[0]["train/loss"] != exact[0]["train/loss"]


def test_channels_last_computes_the_same() -> None:
    split = images(16, 32)
    trainer = Trainer(epochs=1, device="cpu", channels_last=True)
    torch.manual_seed(0)
    model = Net((3, 32, 32), 10).to(memory_format=trainer.memory_format)
    laid_out = batches(split, memory_format=trainer.memory_format)
    assert next(iter(laid_out.epoch(0)))[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(trainer.infer(model, laid_out), Trainer(device="cpu").infer(model, batches(split)))


def test_infer_is_in_the_splits_order_and_in_evaluation_mode() -> None:
    split = images(20, 8)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10))
    model.train()
    logits = Trainer(device="cpu").infer(model, batches(split))
    expected = model[2](((split.images.float() / 255 - 0.5) / 0.5).flatten(1))
    torch.testing.assert_close(logits, expected.detach())


def test_accuracy_counts() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 1.0], [0.0, 3.0]])
    assert accuracy(logits, torch.tensor([0, 0, 0, 1])) == 0.75
    mixed = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.1, 0.9], [0.5, 0.5]])
    assert count_correct(logits, mixed).item() == 2


def test_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match=r"trainer\.device=cuda: this machine .* use auto or cpu"):
        pick_device("cuda")
    assert pick_device("auto").type in ("cpu", "mps")
    with pytest.raises(ValueError, match=r"trainer\.precision=fp16 needs a GPU"):
        Trainer(device="cpu", precision="fp16")


def test_checkpoint_every_saves_between_epochs() -> None:
    _, _, saved = fit(Trainer(epochs=2, device="cpu", checkpoint_every=2), MLP((3, 8, 8), 10), images(24, 8))
    assert saved == [(2, False), (3, False), (4, False), (6, False)]


def test_loss_of_chance_at_the_start() -> None:
    _, rows, _ = fit(Trainer(epochs=1, device="cpu"), MLP((3, 8, 8), 10), images(200, 8), lr=0.0)
    assert rows[0]["train/loss"] == pytest.approx(math.log(10), rel=0.05)


def poisoned(where: str, at: int):
    """A loss that is, at its call number `at` (from 1), not a number itself or in its gradient."""
    calls = 0

    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls != at:
            return cross_entropy(logits, targets)
        if where == "loss alone":  # a constant: the gradient is as ever
            return cross_entropy(logits, targets) + math.nan
        return (
            cross_entropy(logits, targets) * math.nan
            if where == "loss"
            else cross_entropy(NanGradient.apply(logits), targets)
        )

    return loss


@pytest.mark.parametrize("where", ["loss", "loss alone", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_finite_stops_before_the_weights_change(where: str, precision: str) -> None:
    split = images(40, 8)

    def run(loss, epochs: int = 1):
        torch.manual_seed(0)
        model = MLP((3, 8, 8), 10)
        trainer = Trainer(epochs=epochs, device="cpu", ema_decay=0.9, precision=precision)
        state = trainer.start(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), {})
        seen: list[dict] = []
        return (
            state,
            lambda: trainer.fit(state, loss, lambda step: 1.0, batches(split), None, seen.append, lambda *_: None),
            seen,
        )

    state, fit_it, rows = run(poisoned(where, at=4))
    indices = ", ".join(map(str, batches(split).order(0)[24:32].tolist()))
    with pytest.raises(NonFiniteError, match=rf"at step 4 \(epoch 1\), on the training split's images {indices};"):
        fit_it()
    assert (state.step, state.batch, state.window.images, rows) == (3, 3, 24, [])

    # The same three steps without what comes after.
    expected, fit_three, _ = run(poisoned("loss", at=4))
    with pytest.raises(NonFiniteError):
        fit_three()
    for key in ("model", "ema", "optimizer"):
        assert checkpoint.digest(state.state_dict()[key]) == checkpoint.digest(expected.state_dict()[key])
    assert all(value.isfinite().all() for value in state.model.state_dict().values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skip_goes_on_as_if_the_batch_had_not_been(where: str) -> None:
    split = images(40, 8)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    model = network()
    trainer = Trainer(epochs=1, device="cpu", on_nonfinite="skip")
    state = trainer.start(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), {})
    rows: list[dict] = []
    trainer.fit(state, poisoned(where, at=2), lambda step: 1.0, batches(split), None, rows.append, lambda *_: None)
    assert (state.step, state.skipped, rows[-1]["train/skipped"]) == (5, 1, 1)

    reference = network()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for number, (inputs, targets) in enumerate(batches(split).epoch(0), start=1):
        if number != 2:
            optimizer.zero_grad()
            loss = F.cross_entropy(reference(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=f"{name} differs")
    assert rows[-1]["train/loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_other_kernels_compute_the_same() -> None:
    split = images(8)
    torch.manual_seed(0)
    model = Net((3, 32, 32), 10)
    trainer = Trainer(device="cpu", onednn=False)
    assert not torch.backends.mkldnn.enabled
    plain = trainer.infer(model, batches(split))
    trainer = Trainer(device="cpu")
    assert torch.backends.mkldnn.enabled
    torch.testing.assert_close(trainer.infer(model, batches(split)), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_kept() -> None:
    code = """
import resource, torch
from cifar.trainer import Trainer

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

anew = faults()
Trainer(device="cpu")
faults()
print(anew, faults())
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    anew, kept = map(int, run.stdout.split())
    assert anew > 50_000
    assert kept < 1_000


def test_threads_are_set() -> None:
    Trainer(device="cpu", threads=2)
    assert torch.get_num_threads() == 2
    Trainer(device="cpu")
    assert torch.get_num_threads() == 2


def test_evaluation_pools_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another form, bit for bit: torch's kernel takes half of a small network's evaluation on a CPU."""
    from cifar import stack

    pooled = []
    plain = stack._HalvingPool.apply
    monkeypatch.setattr(stack._HalvingPool, "apply", lambda x: pooled.append(x.shape) or plain(x))
    model, split = Net((3, 32, 32), 10), images(8)
    logits = Trainer(device="cpu").infer(model, batches(split))
    assert pooled == [(8, 6, 28, 28), (8, 16, 10, 10)]
    with torch.no_grad():
        assert torch.equal(logits, model((split.images.float() / 255 - 0.5) / 0.5))
