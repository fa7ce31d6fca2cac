"""The whole state of a run in one named object, saved atomically and verified on load.

A checkpoint holds tensors and plain values only, so reading one (`torch.load(weights_only=True)`) never runs code.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar.atomic import replacing

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another model; the message names the file."""


@dataclass
class Window:
    """Running sums since the last logged event, kept on the device: reading them is what would stall it."""

    loss: Tensor  # sum over images of the training loss, float64 ()
    correct: Tensor  # number of images predicted right, int64 ()
    images: int = 0

    @classmethod
    def empty(cls, device: torch.device) -> "Window":
        """Return a window over no images yet."""
        # MPS has no float64.
        real = torch.float32 if device.type == "mps" else torch.float64
        return cls(torch.zeros((), dtype=real, device=device), torch.zeros((), dtype=torch.int64, device=device))

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Add one step: its mean loss, its number of right predictions, its number of images."""
        self.loss.add_(loss, alpha=images)
        self.correct.add_(correct)
        self.images += images

    def take(self) -> dict[str, float]:
        """Return mean loss and accuracy as `train/loss`, `train/accuracy`, and start over."""
        images = self.images or math.nan  # every batch was skipped: there is no mean
        values = {"train/loss": self.loss.item() / images, "train/accuracy": self.correct.item() / images}
        self.loss.zero_()
        self.correct.zero_()
        self.images = 0
        return values


@dataclass
class State:
    """Everything that a run is between two steps. What is not in here does not survive a kill."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    window: Window
    data: dict[str, Any]  # what it is trained on: {classes, mean, std, image_shape, steps (an epoch)}
    settings: dict[str, Any] = field(default_factory=dict)  # the configuration it is trained by: plain values
    ema: torch.optim.swa_utils.AveragedModel | None = None
    epoch: int = 0  # finished epochs
    batch: int = 0  # finished steps of the epoch under way
    step: int = 0  # finished steps of all epochs
    rows: int = 0  # events logged
    best: dict[str, Any] | None = None  # {metric, value, epoch} of the best validation so far
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "eval": 0.0})
    images: int = 0  # images trained on
    skipped: int = 0  # steps left out because the loss or a gradient was not finite
    wandb_id: str | None = None  # the W&B run that a resumed run goes on logging to

    def __post_init__(self) -> None:
        """Keep the list of parameters, which every step goes through."""
        self.parameters = list(self.model.parameters())

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated, tested and shipped: the averaged weights where there are such."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": {"loss": self.window.loss, "correct": self.window.correct, "images": self.window.images},
            "data": self.data,
            "rng": generator_states(self.window.loss.device),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "rows": self.rows,
            "best": self.best,
            "seconds": dict(self.seconds),
            "images": self.images,
            "skipped": self.skipped,
            "settings": self.settings,
            "wandb_id": self.wandb_id,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a saved state into this one; CheckpointError where it is one of another model or lacks a part.

        The optimizer's settings (learning rate, momentum, ...) stay those of the configuration, so that a run can go on with
        others; its accumulated state is restored.
        """
        missing = [key for key in self.state_dict() if key not in saved]
        if missing:
            raise CheckpointError(f"lacks {', '.join(missing)}; it was not written by this version of the trainer")
        for key in ("classes", "image_shape"):
            if saved["data"][key] != self.data[key]:
                raise CheckpointError(f"was saved on data with {key} {saved['data'][key]}, not {self.data[key]}")
        if saved["batch"] and saved["data"]["steps"] != self.data["steps"]:
            raise CheckpointError(
                f"was saved within an epoch of {saved['data']['steps']} steps, and this run's has {self.data['steps']}: "
                "data and data.batch_size must stay as they were until the epoch's end"
            )
        load_weights(self.model, saved["model"])
        if (self.ema is None) != (saved["ema"] is None):
            raise CheckpointError("was saved with trainer.ema_decay " + ("on" if self.ema is None else "off"))
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"was saved with another optimizer: {error}") from None
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(settings)
        self.scaler.load_state_dict(saved["scaler"])
        self.window.loss.copy_(saved["window"]["loss"])
        self.window.correct.copy_(saved["window"]["correct"])
        self.window.images = saved["window"]["images"]
        restore_generators(saved["rng"], self.window.loss.device)
        self.epoch, self.batch, self.step = saved["epoch"], saved["batch"], saved["step"]
        self.rows, self.best = saved["rows"], saved["best"]
        self.images, self.skipped = saved["images"], saved["skipped"]
        self.seconds, self.wandb_id = dict(saved["seconds"]), saved["wandb_id"]


def evaluated_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return, from a loaded checkpoint, the weights that are evaluated: the averaged ones where there are such."""
    if content["ema"] is None:
        return content["model"]
    return {name.removeprefix("module."): value for name, value in content["ema"].items() if name != "n_averaged"}


def resume(state: State, paths: Sequence[Path]) -> Path | None:
    """Put the first valid checkpoint of `paths`, newest first, into `state`; return its path, or None if there is none at all.

    A damaged one is skipped, and that is said. CheckpointError where all are damaged (a fresh start would hide it), or where
    a valid one does not fit this run, listing what differs.
    """
    damaged = []
    for path in paths:
        try:
            content = load(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            log.warning("skipped a checkpoint: %s; going on from %s", reason, path)
        try:
            state.load_state_dict(content)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return path
    if damaged:
        raise CheckpointError(f"no valid checkpoint to go on from: {'; '.join(damaged)}")
    return None


def load_evaluated(model: nn.Module, path: Path) -> None:
    """Load into `model` the weights that the checkpoint at `path` is evaluated by."""
    load_weights(model, evaluated_weights(load(path)))


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `weights` into `model`; CheckpointError listing what differs if they are another model's."""
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in weights]
    differences += [f"{name} is not in this model" for name in weights if name not in own]
    differences += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if differences:
        shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
        raise CheckpointError(f"holds another model's weights: {shown}")
    model.load_state_dict(weights)


def save(content: dict[str, Any], path: Path) -> None:
    """Write `content` (tensors and plain values) to `path`, whole or not at all, with a digest of it inside.

    CheckpointError naming the path where it can't be written; what was there before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary:
            torch.save(content | {"digest": digest(content)}, temporary)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError without a path in torch's writer
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: the checkpoint could not be written ({reason}); earlier ones are kept"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and verify its digest; CheckpointError if it is missing or damaged. Never runs code."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch reports a damaged file as any of a dozen exceptions, some with a page of advice.
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or "model" not in content:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer (it has no `model`)")
    expected = content.pop("digest", None)
    if expected != digest(content):
        raise CheckpointError(f"{path}: damaged (its content does not match its digest)")
    return content


def digest(content: Any) -> str:
    """Return the SHA-256 of a nest of dictionaries, lists, tensors and plain values: names, types, shapes and every byte."""
    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            hasher.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
            hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            hasher.update(f"dict {len(value)}".encode())
            for key, item in value.items():
                hasher.update(repr(key).encode())
                feed(item)
        elif isinstance(value, list | tuple):
            hasher.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value:
                feed(item)
        else:
            hasher.update(f"{type(value).__name__} {value!r}".encode())

    feed(content)
    return hasher.hexdigest()


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators, from which dropout and the like draw.

    Data order and augmentation need none (see Batches).
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Put torch's global generators into the states that `generator_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
