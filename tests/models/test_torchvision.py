import logging
import re
from collections import OrderedDict

import pytest
import torch
import torchvision

from cifar.models.torchvision import classifier

CIFAR = (3, 32, 32)


def assert_same(state, expected):
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def saved(tmp_path):
    """Write a state dict to a file and return its name."""

    def save(state):
        file = tmp_path / "weights.pt"
        torch.save(state, file)
        return str(file)

    return save


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("squeezenet1_1", {}),
        ("mobilenet_v3_small", {}),
        ("googlenet", {"aux_logits": False, "init_weights": False}),
    ],
)
def test_is_torchvisions_model(name, arguments, monkeypatch):
    if name == "googlenet":  # its initialisation takes seconds and is not what is tested here
        monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    torch.manual_seed(0)
    model = classifier(CIFAR, 7, name)
    after = torch.rand(1)
    torch.manual_seed(0)
    expected = torchvision.models.get_model(name, weights=None, num_classes=7, **arguments)
    assert torch.equal(after, torch.rand(1))  # the check of the image shape draws nothing
    assert_same(model.state_dict(), expected.state_dict())

    assert all(module.training for module in model.modules())
    images = torch.randn(2, *CIFAR)
    torch.manual_seed(1)
    logits = model(images)
    torch.manual_seed(1)
    assert torch.equal(logits, expected(images))
    assert logits.shape == (2, 7)


def test_default_is_mobilenet_v3_small():
    shapes = {key: value.shape for key, value in classifier(CIFAR, 10).state_dict().items()}
    expected = torchvision.models.mobilenet_v3_small(num_classes=10).state_dict()
    assert shapes == {key: value.shape for key, value in expected.items()}


@pytest.mark.parametrize(
    ("name", "side", "key", "shape"),
    [
        ("vit_b_32", 64, "encoder.pos_embedding", (1, 1 + 2 * 2, 768)),
        # 448 / 32 = 14: two partitions of 7 where the usual 224 gives one
        ("maxvit_t", 448, "classifier.5.weight", (10, 512)),
    ],
)
def test_models_built_for_the_image_size(name, side, key, shape):
    with torch.device("meta"):  # shapes alone: these models are large
        assert classifier((3, side, side), 10, name).state_dict()[key].shape == shape


def test_all_weights_of_a_file_with_the_same_classes(saved, caplog):
    source = torchvision.models.resnet18(num_classes=10).state_dict()
    with caplog.at_level(logging.INFO, "cifar.models.torchvision"):
        model = classifier(CIFAR, 10, "resnet18", saved(source))
    assert_same(model.state_dict(), source)
    assert caplog.messages[0].endswith("left out: none")


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("squeezenet1_1", "classifier.1")])
def test_head_for_other_classes_is_left_out(name, head, saved, caplog):
    source = torchvision.models.get_model(name, num_classes=1000).state_dict()
    file = saved(source)
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "cifar.models.torchvision"):
        model = classifier(CIFAR, 10, name, file)
    torch.manual_seed(0)
    initial = torchvision.models.get_model(name, num_classes=10).state_dict()
    heads = {f"{head}.weight", f"{head}.bias"}
    assert heads < set(initial)
    assert_same(model.state_dict(), {key: (initial if key in heads else source)[key] for key in initial})
    assert caplog.messages == [f"model.weights={file}: loaded; left out: {head}.weight, {head}.bias"]


def test_auxiliary_heads_of_a_file_are_left_out(saved, caplog, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    source = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False).state_dict()
    auxiliary = [key for key in source if key.startswith("aux")]
    assert auxiliary
    with caplog.at_level(logging.INFO, "cifar.models.torchvision"):
        model = classifier(CIFAR, 10, "googlenet", saved(source))
    assert_same(model.state_dict(), {key: value for key, value in source.items() if key not in auxiliary})
    assert caplog.messages[0].endswith(f"left out: {', '.join(auxiliary)}")


def test_densenet_files_with_the_names_of_2017(saved):
    source = torchvision.models.densenet121(num_classes=10).state_dict()
    old = OrderedDict(
        (re.sub(r"(denselayer\d+\.(norm|conv))(\d)", r"\1.\3", key), value) for key, value in source.items()
    )
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert_same(classifier(CIFAR, 10, "densenet121", saved(old)).state_dict(), source)


def test_format_version_of_a_file_is_kept(saved):
    """MNASNet refuses a state dict whose version is lost."""
    source = torchvision.models.mnasnet0_5(num_classes=10).state_dict()
    assert_same(classifier(CIFAR, 10, "mnasnet0_5", saved(source)).state_dict(), source)


def renamed(state):
    return {f"module.{key}": value for key, value in state.items()}


def without_stem(state):
    return {key: value for key, value in state.items() if key != "features.0.weight"}


def with_wide_stem(state):
    return {**state, "features.0.weight": torch.zeros(96, 3, 3, 3)}


def with_wide_head(state):
    return {**state, "classifier.1.weight": torch.zeros(10, 256, 1, 1)}


def with_another(state):
    return {**state, "extra": torch.zeros(1)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            renamed,
            "52 missing (features.0.weight, features.0.bias, features.3.squeeze.weight, ...), 52 unknown "
            "(module.features.0.weight, module.features.0.bias, module.features.3.squeeze.weight, ...)",
        ),
        (without_stem, "1 missing (features.0.weight)"),
        (with_wide_stem, "1 of another shape (features.0.weight (96, 3, 3, 3) for (64, 3, 3, 3))"),
        (with_wide_head, "1 of another shape (classifier.1.weight (10, 256, 1, 1) for (10, 512, 1, 1))"),
        (with_another, "1 unknown (extra)"),
    ],
)
def test_weights_of_another_model(change, reason, saved):
    file = saved(change(torchvision.models.squeezenet1_1(num_classes=10).state_dict()))
    with pytest.raises(ValueError, match=r"model\.weights") as error:
        classifier(CIFAR, 10, "squeezenet1_1", file)
    assert message(error) == f"model.weights={file}: not the weights of this model.name: {reason}"


def test_file_of_something_else(saved, tmp_path):
    file = saved({"model": {"fc.weight": torch.zeros(1)}, "epoch": 3})
    with pytest.raises(ValueError, match=r"model\.weights=.*: no state dict") as error:
        classifier(CIFAR, 10, "squeezenet1_1", file)
    message(error)
    for content in (b"", b"PK\x03\x04", b"not tensors\n", bytes(range(256))):
        (tmp_path / "junk").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.weights=.*/junk: cannot be read as tensors") as error:
            classifier(CIFAR, 10, "squeezenet1_1", str(tmp_path / "junk"))
        message(error)


def test_file_with_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save(Code(), tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"model\.weights=.*cannot be read as tensors"):
        classifier(CIFAR, 10, "squeezenet1_1", str(tmp_path / "code.pt"))
    assert not (tmp_path / "ran").exists()


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.weights=.*/absent\.pt: no such file") as error:
        classifier(CIFAR, 10, "squeezenet1_1", str(tmp_path / "absent.pt"))
    message(error)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet81", "resnet18"),
        ("VGG11_BN", "vgg11_bn"),
        ("zzz", "resnet18, vit_b_16"),
        ("fcn_resnet50", "resnet50"),  # a segmentation model
        ("quantized_resnet18", "resnet18"),
    ],
)
def test_unknown_name(name, close):
    with pytest.raises(ValueError, match=r"model\.name") as error:
        classifier(CIFAR, 10, name)
    assert message(error).startswith(f"model.name={name} is no classifier of torchvision: try {close}")


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [("squeezenet1_1", (3, 8, 8)), ("vit_b_32", (3, 40, 40)), ("vit_b_32", (3, 32, 64)), ("maxvit_t", (3, 32, 32))],
)
def test_images_that_the_model_cannot_take(name, image_shape):
    with torch.device("meta"), pytest.raises(ValueError, match=r"model\.name") as error:
        classifier(image_shape, 10, name)
    channels, height, width = image_shape
    text = message(error)
    assert text.startswith(f"model.name={name} cannot take {channels} x {height} x {width} images: ")
    assert text.endswith("; try data.image_size=224")
    assert ": ;" not in text


def test_images_without_three_channels():
    with pytest.raises(ValueError, match="model=torchvision") as error:
        classifier((1, 28, 28), 10)
    assert message(error) == (
        "model=torchvision needs images of 3 channels, not 1 x 28 x 28: use model=net, mlp or resnet18"
    )
