import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cifar import checkpoint
from cifar.data.imagefolder import read_image
from cifar.evaluate import load_network
from cifar.models.mlp import MLP
from cifar.predict import cli, predict
from tests.test_evaluate import COLORS, SIDE, color_logits, color_network, log_softmax, paint, write_run


@pytest.fixture
def color_run(tmp_path: Path) -> Path:
    overrides = ["model.widths=[]", "trainer.eval_batch_size=2"]
    return write_run(tmp_path / "run", color_network(), overrides, list(COLORS), SIDE)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which `reported` changes
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    cli()


def probabilities(color: str) -> list[float]:
    return [math.exp(value) for value in log_softmax(color_logits(color))]


def test_probabilities_are_the_softmax_in_the_order_given(color_run: Path, tmp_path: Path) -> None:
    colors = ["bee", "cat", "ant", "cat", "bee"]
    files = [str(paint(tmp_path / f"{5 - number}.png", color)) for number, color in enumerate(colors)]
    predictions = predict(load_network(color_run), files)
    assert [prediction["file"] for prediction in predictions] == files
    assert [prediction["class"] for prediction in predictions] == colors
    for prediction, color in zip(predictions, colors, strict=True):
        assert list(prediction) == ["file", "class", "probability", "probabilities", "error"]
        assert list(prediction["probabilities"]) == ["cat", "ant", "bee"]
        assert list(prediction["probabilities"].values()) == pytest.approx(probabilities(color), abs=1e-5)
        assert prediction["probability"] == prediction["probabilities"][color]
        assert prediction["error"] is None


def test_an_image_is_resized_as_in_training(tmp_path: Path) -> None:
    model = MLP((3, SIDE, SIDE), 3, [8])
    network = load_network(write_run(tmp_path / "run", model, ["model.widths=[8]"], list(COLORS), SIDE))
    noise = torch.randint(256, (30, 20, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "noise.png")
    mean, std = network.normalize.mean, network.normalize.std
    with torch.no_grad():
        logits = model((read_image(tmp_path / "noise.png", SIDE) / 255 - mean) / std)[0]
    (prediction,) = predict(network, [str(tmp_path / "noise.png")])
    assert list(prediction["probabilities"].values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-6)


def test_images_that_are_no_squares_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", MLP((3, 4, 6), 3, []), ["model.widths=[]"], list(COLORS), 4)
    content = checkpoint.load(folder / "checkpoints" / "last.pt")
    checkpoint.save(
        content | {"data": content["data"] | {"image_shape": [3, 4, 6]}}, folder / "checkpoints" / "last.pt"
    )
    Image.new("RGB", (6, 4)).save(tmp_path / "fits.png")
    Image.new("RGB", (4, 6)).save(tmp_path / "turned.png")
    network = load_network(folder)
    mean, std = network.normalize.mean, network.normalize.std
    fits, turned = predict(network, [str(tmp_path / "fits.png"), str(tmp_path / "turned.png")])
    with torch.no_grad():
        expected = network.model((torch.zeros(1, 3, 4, 6) - mean) / std)[0].softmax(0).tolist()
    assert list(fits["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
    assert turned["error"] == f"{tmp_path / 'turned.png'}: 4x6 pixels, but the network takes 6x4"


def test_what_cannot_be_read_has_an_error_and_the_others_a_class(
    color_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "broken.png").write_text("no image")
    cat, bee = paint(tmp_path / "cat.png", "cat"), paint(tmp_path / "bee.png", "bee")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, color_run, tmp_path / "missing.png", tmp_path / "broken.png", cat, tmp_path, bee, "--json")
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    predictions = json.loads(out)
    assert [prediction["class"] for prediction in predictions] == [None, None, "cat", None, "bee"]
    for position, reason in [(0, "missing.png: no such file"), (1, "broken.png: cannot be read"), (3, ": not a file")]:
        prediction = predictions[position]
        assert reason in prediction["error"]
        assert (prediction["probability"], prediction["probabilities"]) == (None, None)
        assert f"error: {prediction['error']}\n" in err
    assert len(err.splitlines()) == 3


def test_a_line_a_file_for_people(
    color_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cat = paint(tmp_path / "cat.png", "cat")
    ranked = sorted(zip(probabilities("cat"), COLORS, strict=True), reverse=True)
    texts = [f"{name} {100 * probability:.1f} %" for probability, name in ranked]
    assert texts[0].startswith("cat ")
    call(monkeypatch, color_run, cat)
    assert capsys.readouterr() == (f"{cat}: {texts[0]}, {texts[1]}\n", "")
    call(monkeypatch, color_run, cat, "--top", 1)
    assert capsys.readouterr() == (f"{cat}: {texts[0]}\n", "")


def test_a_network_that_diverged_predicts_nothing(tmp_path: Path) -> None:
    model = color_network()
    model[1].bias.data.fill_(torch.nan)
    network = load_network(write_run(tmp_path / "run", model, ["model.widths=[]"], list(COLORS), SIDE))
    (prediction,) = predict(network, [str(paint(tmp_path / "cat.png", "cat"))])
    assert prediction["class"] is None
    assert "not a number" in prediction["error"]


def test_errors_are_one_line(color_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "nowhere", "cat.png")
    assert (stop.value.code, *capsys.readouterr()) == (1, "", "error: nowhere: no such folder; give a run's folder\n")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, color_run)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: the following arguments are required: IMAGE\n")
