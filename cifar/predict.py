"""`python -m cifar.predict RUN IMAGE...`: name the class of image files, and how probable the run's network finds it.

Images of any size are decoded and resized as in training on a folder of images. The command exits 1 where one of them could
not be read; the others are predicted all the same.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar.errors import one_line, reported
from cifar.evaluate import DEVICES, Network, load_network

if TYPE_CHECKING:
    from torch import Tensor


def predict(network: Network, files: Sequence[str]) -> list[dict[str, Any]]:
    """Return `{file, class, probability, probabilities: {class: p}, error}` for each file, in the order given.

    Probabilities are the softmax of the logits. `error` is None, or says why the other values are.
    """
    import torch

    keys = ("class", "probability", "probabilities", "error")
    predictions: list[dict[str, Any]] = [{"file": file} | dict.fromkeys(keys) for file in files]
    step = network.trainer.eval_batch_size
    for first in range(0, len(predictions), step):
        read, images = [], []
        for prediction in predictions[first : first + step]:
            try:
                images.append(_read(prediction["file"], network))
                read.append(prediction)
            except (OSError, ValueError) as error:
                prediction["error"] = one_line(error)
        if not images:
            continue
        for prediction, row in zip(read, network.logits(torch.stack(images)).double().softmax(1).tolist(), strict=True):
            probabilities = dict(zip(network.classes, row, strict=True))
            best = max(probabilities, key=lambda name: probabilities[name])
            if probabilities[best] != probabilities[best]:
                prediction["error"] = f"{prediction['file']}: the network's output for it is not a number"
                continue
            prediction |= {"class": best, "probability": probabilities[best], "probabilities": probabilities}
    return predictions


def cli() -> None:
    """Predict from the command line."""
    parser = argparse.ArgumentParser("cifar-predict", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--top", metavar="N", type=int, default=2, help="classes to name for an image (default: 2)")
    parser.add_argument("--device", choices=DEVICES, help="default: as in training, where it is here")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error(f"argument --top: must be at least 1, not {arguments.top}")
    with reported():
        predictions = predict(load_network(arguments.run, arguments.device), arguments.images)
        if arguments.json:
            print(json.dumps(predictions, indent=2))
        for prediction in predictions:
            if prediction["error"] is not None:
                print(f"error: {prediction['error']}", file=sys.stderr)
            elif not arguments.json:
                print(f"{prediction['file']}: {_describe(prediction['probabilities'], arguments.top)}")
        sys.stdout.flush()
        if any(prediction["error"] is not None for prediction in predictions):
            sys.exit(1)


def _read(file: str, network: Network) -> "Tensor":
    from cifar.data.imagefolder import read_image

    image = read_image(file, network.image_size)
    if tuple(image.shape) != network.image_shape:
        (_, height, width), (_, rows, columns) = image.shape, network.image_shape
        raise ValueError(f"{file}: {width}x{height} pixels, but the network takes {columns}x{rows}")
    return image


def _describe(probabilities: dict[str, float], top: int) -> str:
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])[:top]
    return ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in ranked)


if __name__ == "__main__":
    cli()
