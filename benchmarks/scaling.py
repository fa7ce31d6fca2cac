"""What a second process gains: steps a second by one and by two, one thread each, on the same global batch.

python -m benchmarks.scaling     on the CPU, generated images of CIFAR's size; starts itself by torchrun

Beyond two processes it calculates a step of n as `compute / n + 2 (n - 1) / n * bytes / bandwidth + 2 (n - 1) * latency`: the
ring all-reduce of the gradient (Patarasu & Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002), with which loss, accuracy and
signals travel. Nothing of it is hidden behind the backward pass, and all processes are equally fast.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from cifar.loss import cross_entropy
from cifar.models.net import Net
from cifar.models.resnet import ResNet
from cifar.optimizer import sgd
from cifar.trainer import Trainer

BATCH = 128
MODELS = {"net": (Net, 100), "resnet18": (ResNet, 3)}  # and steps to time
DATA = {"classes": [], "mean": [], "std": [], "image_shape": [], "steps": 0}
LINKS = {"10 Gbit/s, 50 µs": (1.25e9, 50e-6), "100 Gbit/s, 5 µs": (12.5e9, 5e-6)}  # bytes a second, seconds a message


def measure() -> dict:
    """Time steps of every model in this process, alone or as one of several; return medians in seconds."""
    trainer = Trainer(device="cpu", threads=1)
    world, found = trainer.world, {}
    for name, (build, steps) in MODELS.items():
        torch.manual_seed(0)
        model: nn.Module = build((3, 32, 32), 10)
        state = trainer.start(model, sgd(model.parameters(), lr=1e-4), DATA)
        forward = world.replicate(model, trainer.torch_device)
        images = torch.randn(BATCH, 3, 32, 32).tensor_split(world.size)[world.rank]
        targets = torch.randint(0, 10, (BATCH,)).tensor_split(world.size)[world.rank]
        times = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            trainer.step(state, forward, cross_entropy, images, targets, BATCH)
            times.append(time.perf_counter() - started)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        found[name] = {"seconds": statistics.median(times[1:]), "bytes": size}
        if world.size > 1:
            found[name]["all_reduce"] = timed(partial(dist.all_reduce, torch.zeros(size // 4)), 10)
    return found if world.leads else {}


def timed(call: Callable[[], object], times: int) -> float:
    """Return the median seconds of a call."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def run(processes: int) -> dict:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "benchmarks.scaling", "--measure"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    one, two = run(1), run(2)
    print("| model | MB of gradient a step | steps/s, 1 process | 2 processes | gain | ms of its all-reduce |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        alone, both = one[name]["seconds"], two[name]["seconds"]
        print(
            f"| {name} | {one[name]['bytes'] / 1e6:.2f} | {1 / alone:.3g} | {1 / both:.3g} | {alone / both:.2f} "
            f"| {1000 * two[name]['all_reduce']:.2f} |"
        )
    print("\n| model | link | 2 | 4 | 8 | 16 | 32 |\n|---|---|---|---|---|---|---|")
    for name in MODELS:
        for link, (bandwidth, latency) in LINKS.items():
            gains = []
            for n in (2, 4, 8, 16, 32):
                ring = 2 * (n - 1) / n * one[name]["bytes"] / bandwidth + 2 * (n - 1) * latency
                gains.append(f"{one[name]['seconds'] / (one[name]['seconds'] / n + ring):.1f}")
            print(f"| {name} | {link} | {' | '.join(gains)} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        if found := measure():
            print(json.dumps(found))
    else:
        main()
