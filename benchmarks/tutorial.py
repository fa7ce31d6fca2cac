"""The tutorial's job, ours against the loop as the tutorial has it: same network, recipe, images and number of steps.

    python -m benchmarks.tutorial IMAGES [--seeds 3] [--epochs 2] [--fast 5]

Beside it, its accuracy by another recipe for the same network: `experiment=tutorial_fast`, over `--fast` seeds.

IMAGES is a folder in torchvision's layout. The rival is a DataLoader with two workers over a data set in memory (PIL image,
ToTensor, Normalize, as torchvision's CIFAR10 gives them) around a plain loop that prints its running loss. Both are timed from
the first batch to the last test image, data, logging and evaluation included; runs alternate, and medians are compared.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cifar.data.dataset import Split
from cifar.data.imagefolder import ImageFolder
from cifar.models.net import Net


class InMemory(Dataset):
    def __init__(self, split: Split) -> None:
        from torchvision import transforms

        self.images, self.labels = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def tutorial(train: Split, test: Split, seed: int, epochs: int) -> tuple[float, float]:
    """Return the seconds and the test accuracy of the tutorial's loop."""
    torch.manual_seed(seed)
    training = DataLoader(InMemory(train), batch_size=4, shuffle=True, num_workers=2)
    testing = DataLoader(InMemory(test), batch_size=4, shuffle=False, num_workers=2)
    model, criterion = Net((3, 32, 32), 10), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    started = time.perf_counter()
    for epoch in range(epochs):
        running = 0.0
        for step, (inputs, labels) in enumerate(training):
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()
            if step % 2000 == 1999:
                print(f"[{epoch + 1}, {step + 1:5d}] loss: {running / 2000:.3f}", file=sys.stderr)
                running = 0.0
    correct = 0
    with torch.no_grad():
        for inputs, labels in testing:
            correct += (model(inputs).argmax(1) == labels).sum().item()
    return time.perf_counter() - started, correct / len(test)


def ours(images: Path, seed: int, experiment: str, *overrides: str) -> tuple[float, float]:
    """Return the seconds (training and evaluation) and the test accuracy of an experiment, logger and all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "cifar.train",
            f"experiment={experiment}",
            "data=imagefolder",
            f"data.root={images}",
        ]
        command += [f"seed={seed}", "trainer.device=cpu", f"hydra.run.dir={folder}/run", *overrides]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    return result["seconds"]["train"] + result["seconds"]["eval"], result["metrics"]["test/accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--fast", type=int, default=5)
    arguments = parser.parse_args()
    images = arguments.images.resolve()
    data = ImageFolder(root=str(images), val_size=0, batch_size=4).load()
    steps = arguments.epochs * len(data.train) // 4
    rival, same, fast = "tutorial's loop", "experiment=tutorial", "experiment=tutorial_fast"
    measured: dict[str, list[tuple[float, float]]] = {rival: [], same: [], fast: []}
    for seed in range(max(arguments.seeds, arguments.fast)):
        if seed < arguments.seeds:
            measured[rival].append(tutorial(data.train, data.test, seed, arguments.epochs))
            measured[same].append(ours(images, seed, "tutorial", f"trainer.epochs={arguments.epochs}"))
        if seed < arguments.fast:
            measured[fast].append(ours(images, seed, "tutorial_fast"))
        print(seed, {name: runs[-1] for name, runs in measured.items() if runs}, file=sys.stderr)
    print("| | seconds (median) | test accuracy (mean ± std) | n |\n|---|---|---|---|")
    for name, runs in measured.items():
        if runs:
            accuracies = [100 * run[1] for run in runs]
            spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
            median = statistics.median(run[0] for run in runs)
            print(f"| {name} | {median:.1f} | {statistics.mean(accuracies):.2f}{spread} % | {len(runs)} |")
    ratios = [theirs[0] / own[0] for theirs, own in zip(measured[rival], measured[same], strict=True)]
    if ratios:
        print(f"\nSame recipe, {steps:,} steps, seed by seed: median {statistics.median(ratios):.2f} times the rate")
        print(f"(from {min(ratios):.2f} to {max(ratios):.2f})")
        if measured[fast]:
            share = statistics.median(r[0] for r in measured[rival]) / statistics.median(r[0] for r in measured[fast])
            print(f"tutorial_fast: 1/{share:.1f} of the loop's time")


if __name__ == "__main__":
    main()
