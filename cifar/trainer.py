"""The training loop: step, log, validate, save. It knows nothing of files, of Hydra or of W&B."""

import ctypes
import functools
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cifar.checkpoint import State, Window
from cifar.data.batches import Batches
from cifar.distributed import world
from cifar.graph import Graphs
from cifar.signals import Interrupted, Stop
from cifar.stack import Faster
from cifar.tta import VIEWS

log = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]  # images (b, 3, h, w) -> logits (b, classes)
Loss = Callable[[Tensor, Tensor], Tensor]  # (logits (b, classes), targets) -> mean loss ()
Schedule = Callable[[int], float]  # step, counted from 0 -> factor of each group's learning rate
Record = Callable[[dict[str, Any]], None]  # takes one logged event
Save = Callable[[State, bool], None]  # takes the state, and whether its validation is the best so far
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteError(RuntimeError):
    """The loss or a gradient became infinite or not a number; the message names the step and the images."""


@dataclass(kw_only=True)
class Trainer:
    """How a network is trained; see `conf/trainer/default.yaml` for what each setting means."""

    epochs: PositiveInt = 5
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: PositiveInt | None = None
    onednn: bool = True
    compile: bool = False
    cuda_graph: bool = False
    channels_last: bool = False
    accumulate: PositiveInt = 1
    clip_norm: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    log_every: NonNegativeInt = 100
    checkpoint_every: PositiveInt | None = None
    keep_last: PositiveInt = 2
    eval_batch_size: PositiveInt = 500
    tta: Literal["none", "flip", "flip_translate"] = "none"
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where this machine lacks the device, or the device the precision."""
        self.torch_device = pick_device(self.device)
        if self.precision == "fp16" and self.torch_device.type == "cpu":
            raise ValueError("trainer.precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.torch_device.type == "cpu":
            keep_freed_memory()
        torch.backends.mkldnn.enabled = self.onednn  # type: ignore[assignment]  # of the whole process, as the device is
        self.world = world()
        self.world.check(self.torch_device)
        if self.cuda_graph:
            self._check_cuda_graph()
            Graphs(self)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and convolution weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: dict[str, Any],
        settings: dict[str, Any] | None = None,
    ) -> State:
        """Return the state of a run that has not taken a step yet; `model` is on the training device already.

        `data` describes what it is trained on, `settings` is its configuration; see `State`.
        """
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        ema = None
        if self.ema_decay is not None:
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay), use_buffers=True)
        return State(
            model=model,
            optimizer=optimizer,
            ema=ema,
            scaler=torch.amp.GradScaler(self.torch_device.type, enabled=self.precision == "fp16"),
            window=Window.empty(self.torch_device),
            data=data,
            settings=settings or {},
        )

    def fit(
        self,
        state: State,
        loss: Loss,
        schedule: Schedule,
        train: Batches,
        val: Batches | None,
        record: Record,
        save: Save,
        stop: Stop | None = None,
    ) -> None:
        """Train from `state` on until `epochs` are done, changing `state` in place.

        Each logged event goes to `record`; `save(state, is_best)` is called at checkpoints. Raises Interrupted, after
        saving, when `stop` asks to; NonFiniteError, before the weights change, as `on_nonfinite` says.
        """
        forward = torch.compile(state.model) if self.compile else state.model
        forward = self.world.replicate(forward, self.torch_device)
        stop = Stop() if stop is None else stop  # a Stop is false until a signal came
        with stop.deferred(), logging_redirect_tqdm():
            for epoch in range(state.epoch, self.epochs):
                state.model.train()
                clock = time.perf_counter()
                for images, targets in self._bar(train.epoch(epoch, start=state.batch), epoch, state.batch, len(train)):
                    set_learning_rates(state.optimizer, schedule(state.step))
                    whole = train.images_in(state.batch)
                    if not self.step(state, forward, loss, images, targets, whole):
                        self._skip(state, train.indices(epoch, state.batch))
                    state.batch += 1
                    state.step += 1
                    state.images += whole
                    if state.batch == len(train):
                        continue  # what follows an epoch's last step comes after the loop
                    if self.log_every and state.batch % self.log_every == 0:
                        clock = self._lap(state, "train", clock)
                        self._log_running(state, epoch, record)
                    if stop or (self.checkpoint_every and state.step % self.checkpoint_every == 0):
                        clock = self._lap(state, "train", clock)
                        save(state, False)
                        if stop:
                            raise stop.interrupted(f"at step {state.step}")
                clock = self._lap(state, "train", clock)
                row = {"lr": state.optimizer.param_groups[0]["lr"]}
                is_best = False
                if val is not None:
                    try:
                        with stop.deferred(False):
                            row |= self.validate(state, loss, val)
                    except Interrupted:
                        save(state, False)
                        raise stop.interrupted(f"at step {state.step}, before its validation") from None
                    clock = self._lap(state, "eval", clock)
                    is_best = state.best is None or row["val/accuracy"] > state.best["value"]
                    if is_best:
                        state.best = {"metric": "val/accuracy", "value": row["val/accuracy"], "epoch": epoch + 1}
                state.epoch, state.batch = epoch + 1, 0
                row = state.window.take() | row | {"images_per_second": state.images / state.seconds["train"]}
                if state.skipped:
                    row["train/skipped"] = state.skipped
                self._record(state, state.epoch, row, record)
                log.info("epoch %d/%d: %s", state.epoch, self.epochs, describe(row))
                save(state, is_best)
                if stop:
                    raise stop.interrupted(f"at the end of epoch {state.epoch}")

    def step(
        self, state: State, forward: Forward, loss: Loss, images: Tensor, targets: Tensor, whole: int | None = None
    ) -> bool:
        """Take one optimizer step on a batch, and add its loss and accuracy to `state.window`.

        Returns False, the weights unchanged and the window too, where the loss or a gradient is not finite.

        With `accumulate` = k the batch is computed in k parts whose gradients add up to the whole batch's: less memory,
        same step (but for BatchNorm, which sees parts). With several processes, `images` are this one's of `whole`.
        """
        whole = len(images) if whole is None else whole
        # A batch that overflows has been through BatchNorm's running statistics by the time it shows.
        before = [buffer.clone() for buffer in state.model.buffers()] if self.on_nonfinite == "skip" else []
        total, correct, finite = self.backward(state, forward, loss, images, targets, whole)
        if not finite:
            for buffer, value in zip(state.model.buffers(), before, strict=bool(before)):
                buffer.copy_(value)
            return False
        self.update(state)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        state.window.add(total, correct, whole)
        return True

    def backward(
        self, state: State, forward: Forward, loss: Loss, images: Tensor, targets: Tensor, whole: int
    ) -> tuple[Tensor, Tensor, Tensor | bool]:
        """Give each parameter its gradient of the mean loss over the batch of `whole` images.

        Returns that loss (), how many predictions were right (), and whether loss and gradients are finite, bool (); nothing
        waits for the device.
        """
        for parameter in state.parameters:
            parameter.grad = None
        losses, rights = [], []
        parts = images.chunk(self.accumulate)
        for part, part_targets in zip(parts, targets.chunk(self.accumulate), strict=True):
            with self.world.part(forward, part is parts[-1]):
                with self.autocast():
                    logits = forward(part)
                    value = loss(logits, part_targets) if len(part) else logits.sum()
                if len(part) < whole:
                    value = value * (len(part) / whole)
                losses.append(value.detach())
                rights.append(count_correct(logits, part_targets))
                if self.world.size > 1:
                    self.world.offer(state.model, losses, rights, len(images) / whole)
                state.scaler.scale(value).backward()
        total, correct = functools.reduce(torch.add, losses), functools.reduce(torch.add, rights)
        if self.world.size > 1:
            total, correct = self.world.join(state.model)
        state.scaler.unscale_(state.optimizer)
        checked = [total]
        # In fp16 a gradient may overflow: the scaler sees it, leaves out the step and lowers its scale.
        if self.precision != "fp16":
            checked += [parameter.grad for parameter in state.parameters if parameter.grad is not None]
        return total, correct, all_finite(checked)

    def update(self, state: State) -> None:
        """Change the weights by their gradients."""
        if self.clip_norm is not None:
            gradients = [parameter.grad for parameter in state.parameters if parameter.grad is not None]
            nn.utils.clip_grads_with_norm_(state.parameters, self.clip_norm, nn.utils.get_total_norm(gradients))
        state.scaler.step(state.optimizer)
        state.scaler.update()

    def validate(self, state: State, loss: Loss, val: Batches) -> dict[str, float]:
        """Return loss and accuracy on the validation split as `val/loss`, `val/accuracy`."""
        logits = self.infer(state.evaluated, val)
        return {"val/loss": loss(logits, val.labels).item(), "val/accuracy": accuracy(logits, val.labels)}

    def test(self, state: State, loss: Loss, test: Batches, record: Record) -> None:
        """Record loss and accuracy on the test split, of all of it and of each class, as `test/...`; say them too."""
        clock = time.perf_counter()
        logits = self.infer(state.evaluated, test)
        row = {"test/loss": loss(logits, test.labels).item(), "test/accuracy": accuracy(logits, test.labels)}
        log.info("accuracy on the %s test images: %.2f %%", f"{len(logits):,}", 100 * row["test/accuracy"])
        for label, name in enumerate(state.data["classes"]):
            of_class = test.labels == label
            if of_class.any():
                row[f"test/accuracy/{name}"] = accuracy(logits[of_class], test.labels[of_class])
                log.info("accuracy for class %-12s %.1f %%", name, 100 * row[f"test/accuracy/{name}"])
        self._lap(state, "eval", clock)
        self._record(state, state.epoch, row, record)

    @torch.inference_mode()
    def infer(self, model: nn.Module, batches: Batches) -> Tensor:
        """Return the logits, float32 (n, classes), of every image in the split's own order, in evaluation mode."""
        model.eval()
        with self.autocast(), Faster():
            logits = torch.cat([VIEWS[self.tta](model, images) for images in batches.in_order()]).float()
        return self.world.gather(logits)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs at the chosen precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=AMP_DTYPES[self.precision])

    def _check_cuda_graph(self) -> None:
        if self.torch_device.type != "cuda":
            raise ValueError(f"trainer.cuda_graph=true: needs a CUDA device; this run's is {self.torch_device.type}")
        if self.precision == "fp16":
            raise ValueError(
                "trainer.cuda_graph=true: not with trainer.precision=fp16, whose loss scale changes; use bf16"
            )
        if self.world.size > 1:
            raise ValueError("trainer.cuda_graph=true: for one process; gradients of several meet outside of a graph")

    def _skip(self, state: State, indices: Tensor) -> None:
        shown = ", ".join(map(str, indices[:16].tolist())) + (", ..." if len(indices) > 16 else "")
        happened = (
            f"the loss or a gradient is not finite at step {state.step + 1} (epoch {state.epoch + 1}), "
            f"on the training split's images {shown}"
        )
        if self.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{happened}; the weights are as before. Lower optimizer.lr, set trainer.clip_norm, or go on without "
                "such batches: trainer.on_nonfinite=skip"
            )
        state.skipped += 1
        log.warning("skipped: %s", happened)

    def _bar(self, batches: Any, epoch: int, done: int, total: int) -> Any:
        # disable=None: tqdm draws on a terminal and keeps silent elsewhere, where plain lines are logged instead.
        disable = not self.world.leads or (None if self.progress is None else not self.progress)
        label = f"epoch {epoch + 1}/{self.epochs}"
        return tqdm(batches, label, total, initial=done, leave=False, disable=disable, unit="step", dynamic_ncols=True)

    def _lap(self, state: State, phase: str, since: float) -> float:
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        state.seconds[phase] += now - since
        return now

    def _log_running(self, state: State, epoch: int, record: Record) -> None:
        row = state.window.take() | {"lr": state.optimizer.param_groups[0]["lr"]}
        log.info(
            "[%d, %5d] loss: %.3f  accuracy: %.3f", epoch + 1, state.batch, row["train/loss"], row["train/accuracy"]
        )
        self._record(state, epoch + 1, row, record)

    def _record(self, state: State, epoch: int, row: dict[str, Any], record: Record) -> None:
        state.rows += 1
        seconds = state.seconds["train"] + state.seconds["eval"]
        record({"epoch": epoch, "step": state.step, "seconds": round(seconds, 3)} | row)


def pick_device(name: str) -> torch.device:
    """Return the torch device for `trainer.device`; `auto` is CUDA, else MPS, else the CPU. ValueError if it isn't there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        there = ", ".join(device for device, is_there in present.items() if is_there)
        raise ValueError(
            f"trainer.device={name}: this machine (with this build of torch) has none; use auto or {there}"
        )
    return torch.device(name)


def keep_freed_memory() -> None:
    """Have this process keep freed memory for its next use, where the C library is glibc.

    By default it goes back to the system, and each step gets its activations' pages anew, zeroed one by one: an eighth of the
    time of a large network's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    # Setting either fixes the other, which else grows with what is freed: both or none.
    if mallopt is not None and mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, -1)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to its initial one times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether no number in any of them is infinite or not a number, bool (), in one pass on their device."""
    found = torch.zeros((), device=tensors[0].device)
    # The kernel of torch.amp.GradScaler: it sets the flag and divides by a scale, here 1.
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(found))
    return found == 0


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how many predictions are right, int64 (); of mixed targets the heaviest class counts."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.argmax(1) == labels).sum()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction, 0 to 1, of right predictions."""
    return count_correct(logits, labels).item() / len(labels)


def describe(row: dict[str, Any]) -> str:
    """Return the accuracies (in percent) and losses of an epoch's row as a person reads them."""
    parts = [f"train loss {row['train/loss']:.3f}, accuracy {row['train/accuracy']:.1%}"]
    if "val/loss" in row:
        parts.append(f"validation loss {row['val/loss']:.3f}, accuracy {row['val/accuracy']:.1%}")
    return "; ".join([*parts, f"{row['images_per_second']:,.0f} images/s"])
