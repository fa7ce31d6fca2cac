"""What the trainer costs: its rate with all that a user has by default, against a bare loop over the same model and batches.

    python -m benchmarks.overhead IMAGES [--rounds 5]

With the trainer go metrics, W&B offline, the finite check and a progress bar. Both do the same steps at batch 128 on
the same images; they alternate, and medians are compared. Then the time from the command to the end of the first step.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cifar import checkpoint
from cifar.data.batches import Batches, Normalize
from cifar.data.imagefolder import ImageFolder
from cifar.logger import wandb
from cifar.loss import cross_entropy
from cifar.models.net import Net
from cifar.models.resnet import ResNet
from cifar.optimizer import sgd
from cifar.run import Job, Run
from cifar.schedule import constant
from cifar.trainer import Trainer

STEPS = {"net": 390, "resnet18": 6}  # an epoch
EPOCHS = {"net": 4, "resnet18": 1}
FIRST_STEP = """
import sys, time
from cifar.trainer import Trainer
step = Trainer.step
def timed(*arguments):
    step(*arguments)
    print("FIRST", time.time(), flush=True)
    raise SystemExit(1)
Trainer.step = timed
sys.argv[1:] = {arguments}
from cifar.train import cli
cli()
"""


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Net((3, 32, 32), 10) if name == "net" else ResNet((3, 32, 32), 10)


def bare(name: str, batches: Batches) -> float:
    network = model(name).train()
    optimizer = sgd(network.parameters(), lr=0.01, momentum=0.9)
    started = time.perf_counter()
    for epoch in range(EPOCHS[name]):
        for images, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return time.perf_counter() - started


def whole(name: str, batches: Batches) -> float:
    with tempfile.TemporaryDirectory() as folder, wandb(Job(Path(folder)), {}, None, mode="offline") as logger:
        run, trainer, network = (
            Run(Path(folder)),
            Trainer(epochs=EPOCHS[name], device="cpu", progress=True),
            model(name),
        )
        state = trainer.start(network, sgd(network.parameters(), lr=0.01, momentum=0.9), {"steps": len(batches)})

        def record(row: dict) -> None:
            run.log(row)
            logger.log(row)

        def save(state: checkpoint.State, is_best: bool) -> None:
            checkpoint.save(state.state_dict(), run.step_checkpoint(state.step))
            run.keep(run.step_checkpoint(state.step), is_best, trainer.keep_last)

        trainer.fit(state, cross_entropy, constant(EPOCHS[name] * len(batches)), batches, None, record, save)
        return state.seconds["train"]  # without the checkpoint at each epoch's end


def first_step(images: Path) -> float:
    """Seconds from starting the command to the end of the first step, W&B offline, images in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["data=imagefolder", f"data.root={images}", f"hydra.run.dir={folder}/run", "logger.mode=offline"]
        code = FIRST_STEP.format(arguments=arguments)
        started = time.time()
        said = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"WANDB_SILENT": "true"},
        ).stdout
        return float(said.partition("FIRST ")[2].split()[0]) - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    images = arguments.images.resolve()
    data = ImageFolder(root=str(images), val_size=0, batch_size=128).load()
    print("| model | steps | bare loop, images/s | trainer, images/s | rate kept |\n|---|---|---|---|---|")
    for name, steps in STEPS.items():
        split = data.train.take(torch.arange(128 * steps))
        batches = Batches(split, Normalize(data.mean, data.std), 128)
        times = [(bare(name, batches), whole(name, batches)) for _ in range(arguments.rounds + 1)][1:]
        kept = statistics.median(plain / ours for plain, ours in times)
        rates = [128 * steps * EPOCHS[name] / statistics.median(column) for column in zip(*times, strict=True)]
        print(f"| {name} | {steps * EPOCHS[name]:,} | {rates[0]:,.0f} | {rates[1]:,.0f} | {kept:.1%} |", flush=True)
    first = [first_step(images) for _ in range(arguments.rounds)]
    print(
        f"\nFirst step done after {statistics.median(first):.2f} s ({min(first):.2f} to {max(first):.2f}, n = {len(first)})"
    )


if __name__ == "__main__":
    main()
