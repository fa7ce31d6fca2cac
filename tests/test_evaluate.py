import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from cifar import checkpoint
from cifar.config import CONF, ConfigError
from cifar.data.digits import Digits
from cifar.evaluate import cli, draw, evaluate, load_network, map_labels, measure
from cifar.models.mlp import MLP
from cifar.models.torchvision import classifier
from cifar.run import RunError

MEAN, STD = [0.4, 0.5, 0.3], [0.2, 0.3, 0.25]
COLORS = {"cat": (255, 0, 0), "ant": (0, 255, 0), "bee": (0, 0, 255)}  # in the network's order, which is not sorted
SIDE = 4


def write_run(
    folder: Path, model: nn.Module, overrides: list[str], classes: list[str], side: int, **content: Any
) -> Path:
    """Leave in `folder` what a finished run leaves there, as far as evaluation needs it."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", ["data=digits", "model=mlp", "logger=none", "trainer.device=cpu", *overrides])
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    data = {"classes": classes, "mean": MEAN, "std": STD, "image_shape": [3, side, side]}
    checkpoint.save(
        {"model": model.state_dict(), "ema": None, "data": data} | content, folder / "checkpoints" / "last.pt"
    )
    return folder


def color_network() -> MLP:
    """Softmax regression whose logit for a class is the mean of its channel: red is a cat, green an ant, blue a bee."""
    model = MLP((3, SIDE, SIDE), 3, widths=[])
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3).repeat_interleave(SIDE * SIDE, 1) / SIDE**2)
        model[1].bias.zero_()
    return model


def color_logits(name: str) -> list[float]:
    return [(value / 255 - mean) / std for value, mean, std in zip(COLORS[name], MEAN, STD, strict=True)]


def log_softmax(logits: list[float]) -> list[float]:
    normaliser = math.log(sum(math.exp(value) for value in logits))
    return [value - normaliser for value in logits]


@pytest.fixture
def color_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", color_network(), ["model.widths=[]"], list(COLORS), SIDE)


def paint(path: Path, name: str, side: int = 2 * SIDE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), COLORS[name]).save(path)
    return path


def ten_digits() -> list[str]:
    return [str(digit) for digit in range(10)]


@pytest.fixture
def digits_run(tmp_path: Path) -> Path:
    model = MLP((3, 8, 8), 10, widths=[16])
    return write_run(tmp_path / "run", model, ["data.image_size=8", "model.widths=[16]"], ten_digits(), 8)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which `reported` changes
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    cli()


def test_measure_is_the_formulas() -> None:
    probabilities = [
        [0.70, 0.20, 0.10],  # class 0, right
        [0.08, 0.69, 0.23],  # class 0, taken for 1, as sure as the one before: the same bin, 10/15 to 11/15
        [0.25, 0.35, 0.40],  # class 2, right
        [0.05, 0.00, 0.95],  # class 2, right
    ]
    labels = [0, 0, 2, 2]
    result = measure(torch.tensor(probabilities).log(), torch.tensor(labels), ["a", "b", "c"], F.cross_entropy)
    assert result["n"] == 4
    assert result["accuracy"] == 3 / 4
    assert result["loss"] == pytest.approx(-sum(map(math.log, [0.70, 0.08, 0.40, 0.95])) / 4, abs=1e-6)
    assert result["confusion"] == [[1, 1, 0], [0, 0, 0], [0, 0, 2]]
    assert result["per_class"] == {"a": 0.5, "b": None, "c": 1.0}
    assert result["classes"] == ["a", "b", "c"]
    gap = 2 / 4 * abs(1 / 2 - (0.70 + 0.69) / 2) + 1 / 4 * (1 - 0.40) + 1 / 4 * (1 - 0.95)
    assert result["ece"] == pytest.approx(gap, abs=1e-6)


def test_a_confidence_of_one_is_in_the_last_bin() -> None:
    logits = torch.tensor([[1000.0, 0.0], [math.log(0.95), math.log(0.05)]])  # wrong, and right
    result = measure(logits, torch.tensor([1, 0]), ["a", "b"], F.cross_entropy)
    assert result["ece"] == pytest.approx(abs(1 / 2 - (1 + 0.95) / 2), abs=1e-6)


def test_a_network_that_diverged_has_no_figures() -> None:
    result = measure(torch.full((2, 3), torch.nan), torch.tensor([0, 1]), ["a", "b", "c"], F.cross_entropy)
    assert (result["loss"], result["ece"], result["n"]) == (None, None, 2)
    json.dumps(result, allow_nan=False)


def test_own_test_split_is_measured_as_plain_torch_does(digits_run: Path) -> None:
    result = evaluate(load_network(digits_run))

    split, _ = Digits(image_size=8).read_test()
    model = MLP((3, 8, 8), 10, widths=[16])
    model.load_state_dict(checkpoint.load(digits_run / "checkpoints" / "last.pt")["model"])
    images = (split.images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        logits = model(images)
    predicted = logits.argmax(1)
    pairs = list(zip(split.labels.tolist(), predicted.tolist(), strict=True))
    confusion = [[pairs.count((row, column)) for column in range(10)] for row in range(10)]
    assert result["n"] == 359
    assert result["confusion"] == confusion
    assert result["accuracy"] == (predicted == split.labels).sum().item() / 359
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, split.labels).item(), abs=1e-6)
    assert result["per_class"] == {str(k): row[k] / sum(row) for k, row in enumerate(confusion)}
    confidences = logits.double().softmax(1).amax(1)
    gaps = 0.0
    for bin_ in range(15):
        inside = (confidences >= bin_ / 15) & (confidences < (bin_ + 1) / 15)
        gaps += abs((predicted == split.labels)[inside].double().sum() - confidences[inside].sum()).item() / 359
    assert result["ece"] == pytest.approx(gaps, abs=1e-6)


def test_loss_is_the_runs_own(tmp_path: Path) -> None:
    overrides = ["loss=mse", "data.image_size=8", "model.widths=[]"]
    network = load_network(write_run(tmp_path, MLP((3, 8, 8), 10, []), overrides, ten_digits(), 8))
    split, _ = Digits(image_size=8).read_test()
    expected = ((network.logits(split.images) - F.one_hot(split.labels, 10)) ** 2).mean().item()
    assert evaluate(network)["loss"] == pytest.approx(expected, abs=1e-6)


def test_classes_of_other_data_are_matched_by_name(color_run: Path, tmp_path: Path) -> None:
    # The folder's classes are bee (0) and cat (1); to the network cat is 0 and bee is 2.
    for number, (label, color) in enumerate(
        [("bee", "bee"), ("bee", "bee"), ("bee", "ant"), ("cat", "cat"), ("cat", "bee")]
    ):
        paint(tmp_path / "photos" / label / f"{number}.png", color)
    result = evaluate(load_network(color_run), "imagefolder", str(tmp_path / "photos"))
    assert result["classes"] == ["cat", "ant", "bee"]
    assert result["confusion"] == [[1, 0, 1], [0, 0, 0], [0, 1, 2]]
    assert result["per_class"] == {"cat": 1 / 2, "ant": None, "bee": 2 / 3}
    assert result["accuracy"] == 3 / 5
    log_p = {name: log_softmax(color_logits(name)) for name in COLORS}
    total = 2 * log_p["bee"][2] + log_p["ant"][2] + log_p["cat"][0] + log_p["bee"][0]
    assert result["loss"] == pytest.approx(-total / 5, abs=1e-5)


def test_other_data_is_its_test_split_where_it_has_one(color_run: Path, tmp_path: Path) -> None:
    paint(tmp_path / "photos" / "train" / "cat" / "1.png", "ant")
    paint(tmp_path / "photos" / "test" / "cat" / "1.png", "cat")
    result = evaluate(load_network(color_run), "imagefolder", str(tmp_path / "photos"))
    assert (result["n"], result["accuracy"]) == (1, 1.0)


def test_further_settings_of_the_data(color_run: Path, tmp_path: Path) -> None:
    paint(tmp_path / "photos" / "cat" / "1.png", "cat")
    (tmp_path / "photos" / "cat" / "2.png").write_text("no image")
    network = load_network(color_run)
    with pytest.raises(ValueError, match=r"cat/2\.png.*data\.on_error=skip"):
        evaluate(network, "imagefolder", str(tmp_path / "photos"))
    assert evaluate(network, "imagefolder", str(tmp_path / "photos"), ["data.on_error=skip"])["n"] == 1
    with pytest.raises(ConfigError, match=r"data\.on_eror: .*takes no such argument"):
        evaluate(network, "imagefolder", str(tmp_path / "photos"), ["data.on_eror=skip"])
    with pytest.raises(ValueError, match=r"trainer\.epochs=1: expected a setting of the data"):
        evaluate(network, overrides=["trainer.epochs=1"])
    with pytest.raises(ConfigError, match=r"data\._target_=os\.system is not allowed"):
        evaluate(network, overrides=["data._target_=os.system"])
    with pytest.raises(ValueError, match=r"data\.root: --data imagefolder needs --root DIR"):
        evaluate(network, "imagefolder")


def test_classes_that_the_run_does_not_know_are_named(color_run: Path, tmp_path: Path) -> None:
    for label in ("cat", "dog", "eel"):
        paint(tmp_path / "photos" / label / "1.png", "cat")
    with pytest.raises(
        ValueError, match=r"^the run does not know the data's classes dog, eel; it knows cat, ant, bee$"
    ):
        evaluate(load_network(color_run), "imagefolder", str(tmp_path / "photos"))
    assert map_labels(torch.tensor([0, 1, 1]), ["b", "a"], ["a", "c", "b"]).tolist() == [2, 0, 0]


def test_images_of_another_size_are_refused(digits_run: Path) -> None:
    network = load_network(digits_run)
    with pytest.raises(ValueError, match="images are 9x9 pixels, but the network takes 8x8"):
        evaluate(network, overrides=["data.image_size=9"])
    assert network.cfg.data.image_size == 8  # as it was


def test_the_weights_are_the_best_then_the_last_and_averaged_where_there_are_such(tmp_path: Path) -> None:
    models = [MLP((3, SIDE, SIDE), 3, []) for _ in range(4)]
    last, average, best, best_average = [model.state_dict() for model in models]

    def ema(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"module.{name}": value for name, value in weights.items()} | {"n_averaged": torch.tensor(3)}

    def bias(which: str | None = None) -> list[float]:
        return load_network(folder, which=which).model.state_dict()["1.bias"].tolist()

    folder = write_run(tmp_path / "run", models[0], ["model.widths=[]"], list(COLORS), SIDE, ema=ema(average))
    assert bias() == average["1.bias"].tolist()
    with pytest.raises(checkpoint.CheckpointError, match=r"best\.pt: no such checkpoint"):
        bias("best")
    content = checkpoint.load(folder / "checkpoints" / "last.pt")
    checkpoint.save(content | {"model": best, "ema": ema(best_average)}, folder / "checkpoints" / "best.pt")
    assert bias() == bias("best") == best_average["1.bias"].tolist()
    assert bias("last") == average["1.bias"].tolist()
    checkpoint.save(content | {"ema": None}, folder / "checkpoints" / "last.pt")
    assert bias("last") == last["1.bias"].tolist()


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", MLP((3, 8, 8), 10, [5]), ["model.widths=[7]"], ten_digits(), 8)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"last\.pt: holds another model's weights: .*1\.weight is \(5, 192\), not \(7, 192\)",
    ):
        load_network(folder)


def test_a_target_outside_the_allow_list_is_refused(color_run: Path, tmp_path: Path) -> None:
    path = color_run / ".hydra" / "config.yaml"
    settings = OmegaConf.load(path)
    settings.model = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}
    OmegaConf.save(settings, path)
    with pytest.raises(ConfigError, match=r"model\._target_=os\.mkdir is not allowed"):
        load_network(color_run)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [([], "run: no such folder"), ([".hydra/"], "not a run's folder"), ([".hydra/config.yaml"], "no checkpoint in it")],
)
def test_what_a_folder_lacks(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("seed: 0")
    with pytest.raises(RunError, match=message):
        load_network(tmp_path / "run")


def test_the_file_of_pretrained_weights_is_not_needed_any_more(tmp_path: Path) -> None:
    model = classifier((3, 32, 32), 10, "squeezenet1_1")
    overrides = ["model=torchvision", "model.name=squeezenet1_1", "model.weights=gone.pt", "trainer.channels_last=true"]
    before = torch.get_rng_state()
    network = load_network(write_run(tmp_path, model, overrides, ten_digits(), 32))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in network.model.state_dict().items())
    assert not network.model.training
    assert network.model.features[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_precision_and_batches_are_the_runs(tmp_path: Path) -> None:
    model = MLP((3, 8, 8), 10, [16])
    overrides = ["model.widths=[16]", "trainer.precision=bf16", "trainer.eval_batch_size=3"]
    network = load_network(write_run(tmp_path, model, overrides, ten_digits(), 8))
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    normal = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(normal).float()
    assert torch.equal(network.logits(images), expected)
    assert not torch.equal(network.logits(images), model(normal))
    sizes = []
    network.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    network.logits(images)
    network.logits(images, batch_size=4)
    assert sizes == [3, 2, 4, 1]


def test_a_run_made_on_a_gpu_is_evaluated_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    overrides = ["model.widths=[]", "trainer.device=cuda", "trainer.precision=fp16"]
    folder = write_run(tmp_path, color_network(), overrides, list(COLORS), SIDE)
    trainer = load_network(folder).trainer
    assert (trainer.torch_device, trainer.precision) == (torch.device("cpu"), "fp32")
    with pytest.raises(ValueError, match=r"device=cuda: this machine .* has none"):
        load_network(folder, device="cuda")


def test_json_is_all_that_is_printed(digits_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    call(monkeypatch, digits_run, "--json", "--batch-size", 100)
    out, err = capsys.readouterr()
    assert json.loads(out) == evaluate(load_network(digits_run), batch_size=100)
    assert list(json.loads(out)) == ["accuracy", "loss", "n", "ece", "per_class", "classes", "confusion"]
    assert err == f"confusion matrix: {digits_run / 'confusion.png'}\n"
    with Image.open(digits_run / "confusion.png") as image:
        image.load()
        assert image.format == "PNG"


def test_report_for_people(color_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for number, (label, color) in enumerate([("bee", "bee"), ("bee", "ant"), ("bee", "bee"), ("cat", "cat")]):
        paint(tmp_path / "photos" / label / f"{number}.png", color)
    call(monkeypatch, color_run, "--data", "imagefolder", "--root", tmp_path / "photos")
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    log_p = {name: log_softmax(color_logits(name)) for name in COLORS}
    loss = -(2 * log_p["bee"][2] + log_p["ant"][2] + log_p["cat"][0]) / 4
    assert ["accuracy", "75.00", "%", "of", "4", "images"] in lines
    assert ["loss", f"{loss:.4f}"] in lines
    assert ["cat", "1", "100.00", "%"] in lines
    assert ["ant", "0"] in lines
    assert ["bee", "3", "66.67", "%", "ant", "(1)"] in lines
    assert out.splitlines()[-1] == f"confusion matrix: {color_run / 'confusion-imagefolder.png'}"
    assert (color_run / "confusion-imagefolder.png").exists()
    assert err == ""


def test_errors_are_one_line(color_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments, message in [
        (["nowhere"], "error: nowhere: no such folder; give a run's folder\n"),
        ([color_run, "--png", "nowhere/c.png"], "error: --png nowhere/c.png: there is no folder nowhere\n"),
    ]:
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, *arguments)
        assert (stop.value.code, *capsys.readouterr()) == (1, "", message)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, color_run, "--batch-size", 0)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: argument --batch-size: must be at least 1, not 0\n")


def test_the_picture_shows_counts_names_and_contrast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    draw({"classes": ["a$b$", "猫"], "confusion": [[9, 1], [0, 0]]}, "run: 90 %", tmp_path / "two.png")
    axes = figures[0].axes[0]
    assert [(text.get_text(), text.get_color()) for text in axes.texts] == [
        ("9", "white"),
        ("1", "black"),
        ("0", "black"),
        ("0", "black"),
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a$b$", "猫"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a$b$", "猫"]
    assert not any(label.get_parse_math() for label in (*axes.get_yticklabels(), *axes.get_xticklabels(), axes.title))
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("run: 90 %", "predicted", "true")
    assert axes.images[0].get_array().tolist() == [[0.9, 0.1], [0.0, 0.0]]

    many = {"classes": list("abcdefghijklmnopqrstu"), "confusion": torch.eye(21, dtype=torch.int64).tolist()}
    draw(many, "run", tmp_path / "many.png")
    assert len(figures[1].axes[0].texts) == 0
    with Image.open(tmp_path / "many.png") as image:
        assert (
            image.convert("RGB").getpixel((image.width // 3, image.height * 3 // 4))[2] > 200
        )  # off the diagonal: pale


def test_torch_is_not_imported_before_arguments_are_read() -> None:
    code = "import sys, cifar.evaluate, cifar.predict; print([m for m in ('torch', 'matplotlib', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
