"""What a checkpoint costs: seconds a save against seconds an epoch, at the default interval (each epoch's end).

python benchmarks/saving.py            on the CPU, generated images of CIFAR's size and number
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from cifar import checkpoint
from cifar.loss import cross_entropy
from cifar.models.mlp import MLP
from cifar.models.net import Net
from cifar.models.resnet import ResNet
from cifar.optimizer import sgd
from cifar.run import Run
from cifar.trainer import Trainer

DATA = {"classes": [], "mean": [], "std": [], "image_shape": [], "steps": 0}


def measure(name: str, model: nn.Module, batch_size: int, steps: int, folder: Path) -> None:
    trainer = Trainer(device="cpu", ema_decay=0.99)
    state = trainer.start(model, sgd(model.parameters(), lr=1e-4), DATA)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    trainer.step(state, model, cross_entropy, images, labels)
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step(state, model, cross_entropy, images, labels)
    epoch = (time.perf_counter() - started) / steps * (45_000 / batch_size)

    run, saves = Run(folder / name), []
    for _ in range(15):
        state.step += 1
        started = time.perf_counter()
        newest = run.step_checkpoint(state.step)
        checkpoint.save(state.state_dict(), newest)
        run.keep(newest, is_best=True, count=2)
        saves.append(time.perf_counter() - started)
    save, size = statistics.median(saves), newest.stat().st_size / 1e6
    print(f"| {name} | {batch_size} | {epoch:.1f} | {size:.1f} | {1000 * save:.1f} | {save / epoch:.2%} |")


if __name__ == "__main__":
    print(
        "| model | batch | seconds an epoch | MB a checkpoint | ms a save (median of 15) | share |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        measure("mlp", MLP((3, 32, 32), 10), 64, 200, Path(temporary))
        measure("net", Net((3, 32, 32), 10), 64, 200, Path(temporary))
        measure("resnet18", ResNet((3, 32, 32), 10), 128, 4, Path(temporary))
