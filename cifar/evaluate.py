"""`python -m cifar.evaluate RUN`: measure a run's network again, on its own test split or on other data.

Prints accuracy, loss, calibration error and each class's accuracy, and draws the confusion matrix. On its own test split, on
the device it was trained on, a run gives exactly the `test/accuracy` of its result.json.
"""

import argparse
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar.atomic import replacing
from cifar.errors import reported
from cifar.run import Run, RunError

if TYPE_CHECKING:  # torch takes seconds to import: only once there is something to compute
    from omegaconf import DictConfig
    from torch import Tensor, nn

    from cifar.data.batches import Normalize
    from cifar.data.dataset import Split
    from cifar.trainer import Trainer

log = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda", "mps")
NUMBERED = 20  # up to so many classes, the confusion matrix is drawn with its counts


@dataclass(frozen=True)
class Network:
    """A run's network, ready to be asked: in evaluation mode on its device, with what it must know of images."""

    cfg: "DictConfig"  # the run's configuration, checked
    checkpoint: Path  # where the weights are from
    model: "nn.Module"
    trainer: "Trainer"  # how it computes: device, precision, memory layout
    normalize: "Normalize"
    classes: list[str]
    image_shape: tuple[int, ...]

    @property
    def image_size(self) -> int | None:
        """The side of the square that images are resized to; None where the run's are no squares."""
        _, height, width = self.image_shape
        return height if height == width else None

    def logits(self, images: "Tensor", batch_size: int | None = None) -> "Tensor":
        """Return the logits, float32 (n, classes) on the CPU, of images uint8 (n, c, h, w); by default in the run's batches."""
        import torch

        from cifar.data.batches import Batches
        from cifar.data.dataset import Split

        split = Split(images, torch.empty(len(images), dtype=torch.int64)).to(self.trainer.torch_device)
        size = batch_size or self.trainer.eval_batch_size
        batches = Batches(split, self.normalize, size, memory_format=self.trainer.memory_format)
        return self.trainer.infer(self.model, batches).cpu()


def load_network(folder: Path, device: str | None = None, which: str | None = None) -> Network:
    """Build the network of the run in `folder` from its configuration, and load its checkpoint's weights.

    `device` None: the one it was trained on, or the best there is where that isn't here. `which` is "best" or "last"; None:
    the best where there is one. Raises RunError, ConfigError or CheckpointError naming the folder, the key or the file.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give a run's folder")
    run = Run(folder)
    settings = run.settings()
    path = {"best": run.best, "last": run.last}[which] if which else run.checkpoint

    import torch
    from omegaconf import OmegaConf

    from cifar import checkpoint
    from cifar.config import build, check
    from cifar.data.batches import Normalize

    cfg = OmegaConf.create(settings)
    check(cfg)
    content = checkpoint.load(path)
    if "data" not in content:
        raise checkpoint.CheckpointError(f"{path}: lacks data; it was not written by this version of the trainer")
    data = content["data"]
    if cfg.model._target_ == "cifar.models.torchvision.classifier":
        cfg.model.weights = None  # the file that training started from need not be here

    trainer = build(cfg.trainer)(**_hardware(cfg, device))
    with torch.random.fork_rng(devices=[]):  # the initial weights are of no interest
        model = build(cfg.model)(tuple(data["image_shape"]), len(data["classes"]))
    model.to(trainer.torch_device, memory_format=trainer.memory_format)
    try:
        checkpoint.load_weights(model, checkpoint.evaluated_weights(content))
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from None
    normalize = Normalize(data["mean"], data["std"], trainer.torch_device)
    return Network(cfg, path, model.eval(), trainer, normalize, list(data["classes"]), tuple(data["image_shape"]))


def evaluate(
    network: Network,
    group: str | None = None,
    root: str | None = None,
    overrides: Sequence[str] = (),
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Measure a network on the run's own test split or, with `group`, on that of `conf/data/GROUP.yaml` found at `root`.

    `overrides` are further settings of the data, `data.KEY=VALUE`. Returns what `measure` does. Raises ValueError where the
    images have another shape, or where there are classes that the network doesn't know.
    """

    from cifar.config import build

    loss = build(network.cfg.loss)
    split, classes = read_test(network, group, root, overrides)
    if tuple(split.images.shape[1:]) != network.image_shape:
        height, width = split.images.shape[2:]
        raise ValueError(
            f"images are {width}x{height} pixels, but the network takes {network.image_shape[2]}x{network.image_shape[1]}"
        )
    labels = map_labels(split.labels, classes, network.classes)
    return measure(network.logits(split.images, batch_size), labels, network.classes, loss)


def read_test(
    network: Network, group: str | None, root: str | None, overrides: Sequence[str]
) -> tuple["Split", tuple[str, ...]]:
    """Return the test split, in the network's image size, and its classes; for the arguments see `evaluate`."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from cifar.config import CONF, build, check

    cfg = network.cfg.copy()
    if group is not None:
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("config", [f"data={group}"])
        OmegaConf.set_struct(cfg, False)  # `check` names unknown keys, and those that there are
        cfg.data.image_size = network.image_size
    if wrong := [item for item in overrides if not item.startswith("data.") or "=" not in item]:
        raise ValueError(f"{wrong[0]}: expected a setting of the data, data.KEY=VALUE")
    cfg.merge_with_dotlist(list(overrides))
    if root is not None:
        cfg.data.root = root
    if OmegaConf.is_missing(cfg.data, "root"):
        raise ValueError(f"data.root: --data {group} needs --root DIR, the folder that holds the data")
    check(cfg)
    return build(cfg.data)().read_test()


def map_labels(labels: "Tensor", classes: Sequence[str], known: Sequence[str]) -> "Tensor":
    """Renumber labels into `classes`, int64 (n,), as labels into `known`, by the classes' names; ValueError naming others."""
    import torch

    number = {name: label for label, name in enumerate(known)}
    if unknown := [name for name in classes if name not in number]:
        raise ValueError(f"the run does not know the data's classes {_some(unknown)}; it knows {_some(known)}")
    return torch.tensor([number[name] for name in classes])[labels]


def measure(
    logits: "Tensor", labels: "Tensor", classes: Sequence[str], loss: "Callable[[Tensor, Tensor], Tensor]"
) -> dict[str, Any]:
    """Compare logits (n, classes) with labels int64 (n,), both on the CPU.

    Returns `{accuracy, loss, n, ece, per_class: {class: accuracy}, classes, confusion}` as plain values. Accuracies are
    fractions; `confusion` counts images, a row for each true class, a column for each predicted one. A class without images
    has accuracy None; loss and ECE of a network that diverged are None.

    ECE is the expected calibration error, the mean gap between confidence and accuracy over 15 equal bins of confidence,
    weighted by their images: Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.
    """
    import torch

    from cifar.trainer import accuracy

    count = len(classes)
    confusion = torch.bincount(labels * count + logits.argmax(1), minlength=count**2).view(count, count).tolist()
    mean_loss = loss(logits, labels).item()
    return {
        "accuracy": accuracy(logits, labels),
        "loss": mean_loss if math.isfinite(mean_loss) else None,
        "n": len(labels),
        "ece": _calibration_error(logits, labels),
        "per_class": {
            name: row[label] / sum(row) if any(row) else None
            for label, (name, row) in enumerate(zip(classes, confusion, strict=True))
        },
        "classes": list(classes),
        "confusion": confusion,
    }


def draw(result: dict[str, Any], title: str, path: Path) -> None:
    """Draw the confusion matrix as a PNG: colour is the share of the true class, numbers are images."""
    from matplotlib.figure import Figure

    classes, confusion = result["classes"], result["confusion"]
    count = len(classes)
    shares = [[images / max(sum(row), 1) for images in row] for row in confusion]
    side = (
        max(3.0, 0.55 * count) if count <= NUMBERED else min(max(6.0, 0.14 * count), 28.0)
    )  # of the matrix, in inches
    cell = 72 * side / count  # in points, as sizes of letters are
    size = min(10.0, 0.75 * cell)
    rotation = 90 if 0.65 * size * max(map(len, classes)) > cell else 0

    figure = Figure(figsize=(side, side), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, cax=figure.add_axes((1 + 0.15 / side, 0, 0.15 / side, 1)), label="share of the true class")
    # No mathematics: names may hold a $.
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.set_xticks(range(count), classes, rotation=rotation, fontsize=size, parse_math=False)
    axes.set_yticks(range(count), classes, fontsize=size, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= NUMBERED:
        for row in range(count):
            for column in range(count):
                color = "white" if shares[row][column] > 0.65 else "black"
                axes.text(column, row, str(confusion[row][column]), ha="center", va="center", color=color, fontsize=9)
    with warnings.catch_warnings(), replacing(path) as temporary:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it is drawn as a box
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.15)


def print_report(result: dict[str, Any]) -> None:
    """Print a result for people."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    console.print(f"accuracy  {_percent(result['accuracy'])} of {result['n']:,} images", style="bold")
    console.print(f"loss      {_figure(result['loss'])}")
    console.print(f"ECE       {_figure(result['ece'])}  (expected calibration error, 15 bins)")
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("class", overflow="fold")
    table.add_column("images", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("most often taken for", overflow="fold")
    for label, (name, row) in enumerate(zip(result["classes"], result["confusion"], strict=True)):
        wrong = [0 if column == label else images for column, images in enumerate(row)]
        confused = f"{result['classes'][wrong.index(max(wrong))]} ({max(wrong):,})" if any(wrong) else ""
        table.add_row(name, f"{sum(row):,}", _percent(result["per_class"][name]), confused)
    console.print()
    console.print(table)


def cli() -> None:
    """Evaluate a run from the command line."""
    parser = argparse.ArgumentParser("cifar-evaluate", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--data", metavar="GROUP", help="other data, from conf/data/GROUP.yaml; classes match by name")
    parser.add_argument("--root", metavar="DIR", help="folder that holds the data (data.root)")
    parser.add_argument(
        "overrides", metavar="data.KEY=VALUE", nargs="*", help="further settings of the data, as in training"
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: best where there is one, else last")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--png", metavar="FILE", type=Path, help="confusion matrix; default: RUN/confusion[-GROUP].png")
    parser.add_argument("--device", choices=DEVICES, help="default: as in training, where it is here")
    parser.add_argument("--batch-size", metavar="N", type=int, help="images a batch; default: as in training")
    arguments = parser.parse_intermixed_args()
    if arguments.batch_size is not None and arguments.batch_size < 1:
        parser.error(f"argument --batch-size: must be at least 1, not {arguments.batch_size}")
    group = arguments.data
    png = arguments.png or arguments.run / (
        "confusion.png" if group is None else f"confusion-{group.replace('/', '-')}.png"
    )
    with reported():
        if arguments.png and not png.parent.is_dir():
            raise FileNotFoundError(f"--png {png}: there is no folder {png.parent}")
        network = load_network(arguments.run, arguments.device, arguments.checkpoint)
        result = evaluate(network, group, arguments.root, arguments.overrides, arguments.batch_size)
        if arguments.json:
            print(json.dumps(result))
        else:
            print(f"{network.checkpoint} on {group or 'its own test split'}\n")
            print_report(result)
        sys.stdout.flush()  # the numbers are there before anything can go wrong with the picture
        of = arguments.run.resolve().name if group is None else f"{arguments.run.resolve().name} on {group}"
        draw(result, f"{of}: accuracy {_percent(result['accuracy'])}, n = {result['n']:,}", png)
        print(f"confusion matrix: {png}", file=sys.stderr if arguments.json else sys.stdout)


def _hardware(cfg: "DictConfig", device: str | None) -> dict[str, str]:
    """Return the trainer's device and precision for this machine, which need not be the one that trained."""
    from cifar.trainer import pick_device

    try:
        name = pick_device(device or cfg.trainer.device).type
    except ValueError:
        if device:
            raise
        name = pick_device("auto").type
    precision = cfg.trainer.precision
    if name == "cpu" and precision == "fp16":
        log.warning("trainer.precision=fp16 needs a GPU: computing in fp32")
        precision = "fp32"
    return {"device": name, "precision": precision}


def _calibration_error(logits: "Tensor", labels: "Tensor") -> float | None:
    from torchmetrics.functional.classification import multiclass_calibration_error  # takes seconds

    probabilities = logits.double().softmax(1)
    if not probabilities.isfinite().all():
        return None
    # torchmetrics counts a confidence of exactly 1 (in float32, which it computes in) in a sixteenth bin.
    probabilities = probabilities.clamp(max=1 - 2**-24)
    return multiclass_calibration_error(
        probabilities, labels, num_classes=logits.shape[1], n_bins=15, norm="l1", validate_args=False
    ).item()


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


if __name__ == "__main__":
    cli()
